"""``taskworker call``, ``result`` and ``tasks``: send tasks and read what became of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from .. import states
from .output import json_option, show_json, show_table
from .root import FAILED, NOT_READY, UNKNOWN, load_task_app, note, taskworker, without_effect

if TYPE_CHECKING:
    from ..result import AsyncResult


def _json(kind: type, name: str, example: str) -> Callable[..., Any]:
    """Reads a JSON value of one kind."""

    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        if value is None:
            return None
        try:
            found = json.loads(value)
        except ValueError as exc:
            raise click.BadParameter(
                f"{value!r} is no JSON ({exc}); write for example {example}"
            ) from None
        if not isinstance(found, kind):
            raise click.BadParameter(f"{value} is no {name}; write for example {example}")
        return found

    return read


def _moment(ctx: click.Context, param: click.Parameter, value: str | None) -> datetime | None:
    """A time of ISO 8601."""
    if value is None:
        return None
    try:
        # Python 3.10 reads no "Z"
        return datetime.fromisoformat(value[:-1] + "+00:00" if value[-1:] == "Z" else value)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is no time; write for example 2030-01-31T12:00:00+00:00"
        ) from None


def _expiry(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> datetime | float | None:
    """Seconds from now, or a time."""
    try:
        return None if value is None else float(value)
    except ValueError:
        return _moment(ctx, param, value)


def _take(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value:
        without_effect(ctx, param.opts[-1])


@taskworker.command()
@click.argument("name")
@click.option(
    "-a",
    "--args",
    callback=_json(list, "JSON array", "'[1, \"two\"]'"),
    metavar="ARRAY",
    help="The positional arguments, a JSON array.",
)
@click.option(
    "-k",
    "--kwargs",
    callback=_json(dict, "JSON object", '\'{"to": "ada"}\''),
    metavar="OBJECT",
    help="The keyword arguments, a JSON object.",
)
@click.option(
    "--eta", callback=_moment, metavar="TIME", help="Not before this time, ISO 8601 with a zone."
)
@click.option("--countdown", type=float, metavar="SECONDS", help="Not before so many seconds.")
@click.option(
    "--expires",
    callback=_expiry,
    metavar="TIME|SECONDS",
    help="Not after this time, or so many seconds.",
)
@click.option("--queue", metavar="NAME", help="The queue to send it to.")
@click.option("--priority", type=int, metavar="0-9", help="9 is most urgent.")
@click.option("--serializer", metavar="NAME", help="How the arguments are written.")
@click.option("--id", "task_id", metavar="ID", help="An id of your own.")
@click.option(
    "--exchange",
    expose_value=False,
    callback=_take,
    metavar="NAME",
    help="Celery's; no effect: name the queue.",
)
@click.option(
    "--routing-key",
    expose_value=False,
    callback=_take,
    metavar="KEY",
    help="Celery's; no effect: name the queue.",
)
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Wait so long for the result and print it.",
)
@json_option
@click.pass_context
def call(
    ctx: click.Context,
    /,
    name: str,
    args: list[Any] | None,
    kwargs: dict[str, Any] | None,
    wait: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Send the task NAME and print its id; another program may be the one that defines it."""
    task_app = load_task_app(ctx)
    if name not in task_app.registry:
        known = task_app.registry.explain_missing(name)
        note(ctx, f"{known} It is sent all the same, for a worker that knows it.")
    given: Any = {key: value for key, value in options.items() if value is not None}
    handle = task_app.send_by_name(name, args or [], kwargs or {}, given)
    if wait is None:
        show_json({"id": handle.id}) if as_json else click.echo(handle.id)
        return
    note(ctx, f"sent as {handle.id}")
    handle.get(timeout=wait, propagate=False)
    _show(ctx, handle, as_json=as_json, traceback=False)


@taskworker.command()
@click.argument("task_id")
@click.option("--traceback", is_flag=True, help="The traceback of a failed task, nothing else.")
@click.option(
    "-t", "--task", expose_value=False, callback=_take, metavar="NAME", help="Celery's; no effect."
)
@json_option
@click.pass_context
def result(ctx: click.Context, task_id: str, traceback: bool, as_json: bool) -> None:
    """What became of a task.

    Exit 0 and the result if it succeeded, 1 if it failed or was revoked, 3 if it is not done
    yet, 4 if nothing is stored about it: then it waits in its queue, or the id is wrong.
    """
    handle = load_task_app(ctx).result(task_id)
    _show(ctx, handle, as_json=as_json, traceback=traceback)


def _show(ctx: click.Context, handle: AsyncResult[Any], *, as_json: bool, traceback: bool) -> None:
    state = handle.state
    failed = state in states.EXCEPTION_STATES
    if as_json:
        value = handle.info
        show_json(
            {
                "id": handle.id,
                "state": state,
                "result": f"{type(value).__name__}: {value}" if failed else value,
                "traceback": handle.traceback,
                "date_done": handle.date_done,
            }
        )
    elif state == states.PENDING:
        click.echo(f"{handle.id}: nothing is stored; it waits, or the id is wrong", err=True)
    elif traceback:
        click.echo((handle.traceback or "").rstrip())
    elif state not in states.READY_STATES:
        click.echo(f"{handle.id}: {state}, not done yet", err=True)
    elif failed:
        click.echo((handle.traceback or f"{state}: {handle.info!r}").rstrip(), err=True)
    else:
        value = handle.info
        click.echo(value if isinstance(value, str) else json.dumps(value, default=str))
    ctx.exit(_exit_code(state))


def _exit_code(state: str) -> int:
    if state == states.PENDING:
        return UNKNOWN
    if state not in states.READY_STATES:
        return NOT_READY
    return 0 if state == states.SUCCESS else FAILED


@taskworker.command()
@json_option
@click.pass_context
def tasks(ctx: click.Context, as_json: bool) -> None:
    """The tasks that the app defines."""
    from ..registry import location

    task_app = load_task_app(ctx)
    rows = []
    for name, task in sorted(task_app.registry.items()):
        options = {k: v for k, v in task.options_.items() if k not in ("name", "queue")}
        queue = task.options_.get("queue", task_app.config.default_queue)
        rows.append((name, queue, options, location(task.run)))
    titles = ("name", "queue", "options", "defined")
    if as_json:
        show_json([dict(zip(titles, row, strict=True)) for row in rows])
        return
    show_table(
        titles,
        [(n, q, [f"{k}={v!r}" for k, v in o.items()] or None, where) for n, q, o, where in rows],
    )
