"""``taskworker queues``, ``purge``, ``pause`` and ``resume``: the queues from outside."""

from __future__ import annotations

import click

from .output import json_option, show_json, show_table
from .root import UsageProblem, load_task_app, note, taskworker


@taskworker.command("queues")
@click.option(
    "-Q",
    "--queues",
    metavar="NAMES",
    help="Only these, with commas between. Default: all that the broker can list and "
    "those of the app's tasks.",
)
@json_option
@click.pass_context
def show_queues(ctx: click.Context, queues: str | None, as_json: bool) -> None:
    """What is in the queues; "-" is what the broker cannot say."""
    from ..queues import QueueState, states

    rows = states(load_task_app(ctx), _names(queues))
    if as_json:
        show_json([row._asdict() for row in rows])
        return
    show_table(QueueState._fields, rows)
    for row in rows:
        if row.waiting and row.consumers == 0:
            note(
                ctx,
                f"queue {row.name!r} holds {row.waiting} tasks and no worker reads it: "
                f"taskworker worker -Q {row.name}",
            )


@taskworker.command()
@click.option(
    "-Q",
    "--queues",
    metavar="NAMES",
    help="Only these, with commas between. Default: the default queue and those that tasks name.",
)
@click.option("-X", "--exclude-queues", metavar="NAMES", help="Queues not to empty.")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.pass_context
def purge(ctx: click.Context, queues: str | None, exclude_queues: str | None, force: bool) -> None:
    """Delete what waits in the queues. There is no way back."""
    from .. import queues as core

    task_app = load_task_app(ctx)
    excluded = set(_names(exclude_queues) or ())
    names = [n for n in _names(queues) or core.known_queues(task_app) if n not in excluded]
    if not names:
        raise UsageProblem("no queue is left to empty")
    if not force:
        states = core.states(task_app, names)
        count = sum(state.waiting + (state.delayed or 0) for state in states)
        click.confirm(f"Delete {count} messages from {_listed(names)}?", abort=True, err=True)
    deleted = core.purge(task_app, names)
    click.echo(f"{sum(deleted.values())} messages deleted from {_listed(names)}")


@taskworker.command()
@click.argument("queue")
@click.pass_context
def pause(ctx: click.Context, queue: str) -> None:
    """Stop handing out the messages of a queue, to any worker, until it is resumed."""
    from ..queues import pause as pause_queue

    pause_queue(load_task_app(ctx), queue)
    click.echo(f"queue {queue} is paused")


@taskworker.command()
@click.argument("queue")
@click.pass_context
def resume(ctx: click.Context, queue: str) -> None:
    """Hand out the messages of a paused queue again."""
    from ..queues import pause as pause_queue

    pause_queue(load_task_app(ctx), queue, paused=False)
    click.echo(f"queue {queue} is not paused")


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _listed(names: list[str]) -> str:
    return f"queue {names[0]}" if len(names) == 1 else f"queues {', '.join(names)}"
