"""``taskworker dead``: the messages that were set aside."""

from __future__ import annotations

from dataclasses import asdict

import click

from .output import json_option, show_json, show_table
from .root import FAILED, UsageProblem, load_task_app, note, taskworker


@taskworker.group()
def dead() -> None:
    """Messages that were set aside: nobody knows their task, or they kept failing their worker."""


@dead.command("list")
@click.option("-Q", "--queue", metavar="NAME", help="Only of this queue.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="NUMBER",
    default=100,
    show_default=True,
    help="At most so many, oldest first.",
)
@json_option
@click.pass_context
def dead_list(ctx: click.Context, queue: str | None, limit: int, as_json: bool) -> None:
    """Show them with the reason."""
    from ..dead_letters import listing

    letters = listing(load_task_app(ctx), queue, limit)
    if as_json:
        show_json([asdict(letter) for letter in letters])
        return
    titles = ("id", "queue", "task", "task id", "deliveries", "died", "reason")
    show_table(
        titles,
        [
            (
                letter.id, letter.queue, letter.task, letter.task_id, letter.deliveries,
                letter.died_at and letter.died_at.isoformat(timespec="seconds"), letter.reason,
            )
            for letter in letters
        ],
    )  # fmt: skip
    if len(letters) == limit:
        note(ctx, f"there may be more than {limit}: --limit")


def _choice(ids: tuple[str, ...], everything: bool) -> list[str] | None:
    if bool(ids) == everything:
        raise UsageProblem("name some ids, of the message or its task, or say --all")
    return None if everything else list(ids)


@dead.command("replay")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="All of them, or all of the queue.")
@click.option("-Q", "--queue", metavar="NAME", help="Only of this queue.")
@click.pass_context
def dead_replay(
    ctx: click.Context, ids: tuple[str, ...], everything: bool, queue: str | None
) -> None:
    """Put them back on their queues, as if they had never been delivered."""
    from ..dead_letters import replay

    chosen = _choice(ids, everything)
    _tell(ctx, replay(load_task_app(ctx), chosen, queue), "put back", chosen)


@dead.command("delete")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="All of them, or all of the queue.")
@click.option("-Q", "--queue", metavar="NAME", help="Only of this queue.")
@click.pass_context
def dead_delete(
    ctx: click.Context, ids: tuple[str, ...], everything: bool, queue: str | None
) -> None:
    """Delete them for good."""
    from ..dead_letters import delete

    chosen = _choice(ids, everything)
    _tell(ctx, delete(load_task_app(ctx), chosen, queue), "deleted", chosen)


def _tell(ctx: click.Context, count: int, verb: str, chosen: list[str] | None) -> None:
    click.echo(f"{count} messages {verb}")
    if chosen is not None and count < len(set(chosen)):
        note(ctx, f"{len(set(chosen)) - count} of the ids are none of a dead letter")
        ctx.exit(FAILED)
