"""``inspect``, ``control``, ``status`` and ``events``: watch and steer the workers.

The forms of the answers and the exit codes are Celery's, for the scripts that read them.
"""

from __future__ import annotations

import json
import pprint
import textwrap
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .output import show_json
from .root import NO_REPLY, is_quiet, load_task_app, taskworker

if TYPE_CHECKING:
    from ..app import TaskApp
    from ..worker.commands import Command

F = TypeVar("F", bound=Callable[..., Any])


class NoReply(click.ClickException):
    """No worker answered."""

    exit_code = NO_REPLY

    def __init__(self) -> None:
        super().__init__("No nodes replied within time constraint")


def _asks(function: F) -> F:
    """The options of a verb that waits for answers."""
    for option in (
        click.option(
            "-t",
            "--timeout",
            type=click.FloatRange(min=0, min_open=True),
            default=1.0,
            show_default=True,
            help="How long to wait for the next answer, in seconds.",
        ),
        click.option(
            "-d", "--destination", metavar="NAMES", help="Only these nodes, with commas between."
        ),
        click.option("-j", "--json", "as_json", is_flag=True, help="Print JSON."),
    ):
        function = option(function)
    return function


def _lists(kind: str) -> Callable[[F], F]:
    def show(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
        if wanted:
            click.echo(_listing(kind), nl=False)
            ctx.exit()

    return click.option(
        "--list",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show,
        help="List the commands.",
    )


@taskworker.command()
@click.argument("command")
@click.argument("arguments", nargs=-1)
@_lists("inspect")
@_asks
@click.pass_context
def inspect(
    ctx: click.Context,
    command: str,
    arguments: tuple[str, ...],
    timeout: float,
    destination: str | None,
    as_json: bool,
) -> None:
    """Ask the workers something: ping, active, stats and so on; --list shows all."""
    given = _arguments("inspect", command, arguments)
    asked = load_task_app(ctx).control.inspect(
        _names(destination), timeout, None if as_json else _show
    )
    replies = asked.request(command, **given)
    if not replies:
        raise NoReply
    _finish(ctx, replies, as_json)


@taskworker.command()
@click.argument("command")
@click.argument("arguments", nargs=-1)
@_lists("control")
@_asks
@click.pass_context
def control(
    ctx: click.Context,
    command: str,
    arguments: tuple[str, ...],
    timeout: float,
    destination: str | None,
    as_json: bool,
) -> None:
    """Tell the workers to do something: revoke, pool_grow, pause_queue and so on; --list."""
    given = _arguments("control", command, arguments)
    replies = _told(
        load_task_app(ctx),
        command,
        given,
        destination=_names(destination),
        reply=True,
        timeout=timeout,
        callback=None if as_json else _show,
    )
    if not replies:
        raise NoReply
    if as_json:
        show_json(replies)


def _told(app: TaskApp, command: str, given: Mapping[str, Any], **options: Any) -> Any:
    """Broadcast a command; what the broker keeps for all workers is written here as well."""
    keeping: dict[str, Callable[..., Any]] = {
        "revoke": app.control.revoke,
        "revoke_by_stamped_headers": app.control.revoke_by_stamped_headers,
        "pause_queue": app.control.pause_queue,
        "resume_queue": app.control.resume_queue,
    }
    if command in keeping:
        return keeping[command](**given, **options)
    return app.control.broadcast(command, given, **options)


@taskworker.command()
@_asks
@click.pass_context
def status(ctx: click.Context, timeout: float, destination: str | None, as_json: bool) -> None:
    """Show the workers that are online."""
    callback = None if as_json else lambda reply: _show(reply, body=False)
    replies = load_task_app(ctx).control.inspect(_names(destination), timeout, callback).ping()
    if not replies:
        raise NoReply
    _finish(ctx, replies, as_json)


@taskworker.command()
@click.option("-d", "--dump", is_flag=True, help="Print a line for each event; also without it.")
@click.option("-j", "--json", "as_json", is_flag=True, help="Print a JSON object for each event.")
@click.pass_context
def events(ctx: click.Context, dump: bool, as_json: bool) -> None:
    """Print what happens, as it happens, until Ctrl-C."""
    from ..events import receive

    app = load_task_app(ctx)
    names: dict[str, str] = {}

    def ready() -> None:
        app.control.heartbeat()
        if not is_quiet(ctx):
            click.echo("-> evdump: starting capture...", err=as_json)

    for event in receive(app, on_ready=ready):
        click.echo(json.dumps(event) if as_json else _line(event, names))


# -- what was asked -----------------------------------------------------------------------


def _commands(kind: str) -> dict[str, Command]:
    from ..worker.questions import COMMANDS

    return {
        name: command
        for name, command in sorted(COMMANDS.items())
        if command.kind == kind and command.visible
    }


def _listing(kind: str) -> str:
    formatter = click.HelpFormatter()
    with formatter.section(f"{kind.capitalize()} Commands"):
        formatter.write_dl(
            [
                (f"{name} {command.signature}".rstrip(), command.help)
                for name, command in _commands(kind).items()
            ]
        )
    return formatter.getvalue()


def _arguments(kind: str, name: str, words: tuple[str, ...]) -> dict[str, Any]:
    """The words of the command line as the command's arguments."""
    known = _commands(kind)
    if name not in known:
        raise click.UsageError(
            f"Command {name} not recognized. Available {kind} commands: {', '.join(known)}"
        )
    command, rest = known[name], list(words)
    given: dict[str, Any] = {}
    for argument, read in command.args:
        if rest:
            word = rest.pop(0)
            try:
                given[argument] = read(word)
            except ValueError:
                raise click.UsageError(
                    f"{argument} of {name!r} cannot be {word!r}: {name} {command.signature}"
                ) from None
    if command.variadic:
        given[command.variadic] = rest
    elif rest:
        raise click.UsageError(f"Command {name!r} takes arguments: {command.signature}")
    return given


def _names(destination: str | None) -> list[str] | None:
    names = [name.strip() for name in (destination or "").split(",") if name.strip()]
    return names or None


# -- what was answered --------------------------------------------------------------------


def _finish(ctx: click.Context, replies: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(replies)
    elif not is_quiet(ctx):
        click.echo(f"\n{len(replies)} {'node' if len(replies) == 1 else 'nodes'} online.")


def _show(reply: Mapping[str, Any], body: bool = True) -> None:
    node, answer = next(iter(reply.items()))
    word, text = _pretty(answer)
    click.echo(f"->  {click.style(f'{node}:', fg='cyan', bold=True)} {word}")
    if body and text:
        click.echo(textwrap.indent(text, "    "))


def _pretty(answer: Any) -> tuple[str, str]:
    good = click.style("OK", fg="green", bold=True)
    if isinstance(answer, dict) and "ok" in answer:
        return good, textwrap.indent(_pretty(answer["ok"])[1], "    ")
    if isinstance(answer, dict) and "error" in answer:
        bad = click.style("ERROR", fg="red", bold=True)
        return bad, textwrap.indent(_pretty(answer["error"])[1], "    ")
    if isinstance(answer, list):
        return good, "\n".join(f"* {item}" for item in answer) or "- empty -"
    if isinstance(answer, dict):
        return good, json.dumps(answer, sort_keys=True, indent=4)
    return good, answer if isinstance(answer, str) else pprint.pformat(answer)


_WORDS = {
    "worker-offline": "shutdown",
    "worker-online": "started",
    "worker-heartbeat": "heartbeat",
}
#: The names of so many tasks are remembered.
_REMEMBERED = 4096


def _in_line(value: object) -> str:
    text = str(value)
    return repr(text) if "\n" in text else text


def _line(event: Mapping[str, Any], names: dict[str, str]) -> str:
    """An event as Celery's dumper prints it.

    :param names: what is known of tasks by id; grows.
    """
    fields = dict(event)
    type, hostname = fields.pop("type"), fields.pop("hostname", "?")
    at = datetime.fromtimestamp(float(fields.pop("timestamp", 0)), timezone.utc)
    about = ""
    if type.startswith("task-"):
        uuid = str(fields.pop("uuid", ""))
        if "name" in fields:
            name, args, kwargs = (fields.pop(key, "") for key in ("name", "args", "kwargs"))
            names[uuid] = f"{name}({uuid}) args={args} kwargs={kwargs}"
            if len(names) > _REMEMBERED:
                del names[next(iter(names))]
        about = f" {names.get(uuid, uuid)}"
    word = _WORDS.get(type, type.replace("-", " "))
    shown = ", ".join(f"{key}={_in_line(fields[key])}" for key in sorted(fields))
    return f"{hostname} [{at}] {word}{':' if shown else ''}{about} {shown}".rstrip()
