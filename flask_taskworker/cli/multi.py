"""``taskworker multi``: several workers on one machine."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

from .output import show_json
from .root import FAILED, UsageProblem, chosen, taskworker

if TYPE_CHECKING:
    from ..worker.multi import Node, Outcome, Request

ACTIONS = ("start", "stop", "stopwait", "restart", "kill", "show", "names")


# No shared options after the name: all of them are for the workers.
@taskworker.command(
    "multi",
    cls=click.Command,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("action", type=click.Choice(ACTIONS))
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="NAMES|NUMBER [OPTIONS]")
@click.pass_context
def multi(ctx: click.Context, action: str, words: tuple[str, ...]) -> None:
    """Start and stop several workers in the background.

    NAMES are the first parts of node names; a NUMBER makes worker1, worker2 and so on. The
    OPTIONS are those of the worker; -c:2 or -Q:mail,web is for some of them only. Files are
    %n.pid and %n.log in the current folder unless --pidfile and --logfile say otherwise: give
    the same to stop. stop waits until the workers have ended; -QUIT sends another signal.
    show prints the commands, names the node names; --json first, as one JSON document.
    """
    from ..worker import multi as core

    as_json = bool(words) and words[0] in ("-j", "--json")
    request = core.parse(words[1:] if as_json else words, _flags(ctx))
    nodes = core.nodes(request, _shared(ctx))
    if action in ("show", "names"):
        lines = [node.shell_command if action == "show" else node.name for node in nodes]
        show_json(lines) if as_json else click.echo("\n".join(lines))
        return
    if as_json:
        raise UsageProblem("--json goes with show and names")
    outcomes = list(_act(action, nodes, request))
    if not all(outcome.ok for outcome in outcomes):
        ctx.exit(FAILED)


def _act(action: str, nodes: list[Node], request: Request) -> Iterable[Outcome]:
    from ..worker import multi as core

    number = request.signal or signal.SIGTERM
    if action == "kill":
        number = signal.SIGKILL
    if action != "start":
        outcomes = _each(nodes, lambda node: core.stop(node, number))
        if action != "restart":
            yield from outcomes
            return
        list(outcomes)  # one that did not run is started all the same
    yield from _each(nodes, core.start)


def _each(nodes: list[Node], step: Callable[[Node], Outcome]) -> Iterable[Outcome]:
    for node in nodes:
        outcome = step(node)
        click.echo(f"{node.name}: {outcome.text}", err=not outcome.ok)
        yield outcome


def _flags(ctx: click.Context) -> set[str]:
    """The options of a worker that take no value."""
    assert ctx.parent is not None
    worker = taskworker.get_command(ctx.parent, "worker")
    assert worker is not None
    return {
        name
        for param in worker.get_params(ctx)
        if isinstance(param, click.Option) and param.is_flag
        for name in param.opts
    }


def _shared(ctx: click.Context) -> list[str]:
    """The options before the command that the workers need as well."""
    options = (("target", "-A"), ("broker", "-b"), ("result_backend", "--result-backend"))
    words = []
    for name, option in options:
        value = chosen(ctx, name)
        if value:
            words += [option, value]
    return words
