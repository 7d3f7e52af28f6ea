"""The command line, behind two doors: ``flask taskworker ...`` and ``taskworker -A target ...``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from flask.cli import ScriptInfo

from . import __version__
from .app import TaskApp
from .config import mask_url
from .exceptions import BrokerUnavailableError, ConfigurationError, TaskWorkerError
from .target import from_flask_cli, from_target

if TYPE_CHECKING:
    from .transports.sql.channel import Channel
    from .worker.supervisor import Worker

LEVELS = ("debug", "info", "warning", "error", "critical")

#: Exit codes: usage or configuration, and a broker that cannot be reached.
USAGE, UNAVAILABLE = 2, 75


class UsageProblem(click.ClickException):
    """A fault in the configuration or the command, shown as one line."""

    exit_code = USAGE


class Unavailable(click.ClickException):
    """A broker that cannot be reached, shown as one line."""

    exit_code = UNAVAILABLE


class Group(click.Group):
    """A group whose commands end with one line where this package raises."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokerUnavailableError as exc:
            raise Unavailable(str(exc)) from exc
        except TaskWorkerError as exc:
            raise UsageProblem(str(exc)) from exc


@click.group("taskworker", cls=Group)
@click.option(
    "-A",
    "--app",
    "target",
    metavar="TARGET",
    help="Where the task worker is: module, module:attribute or module:factory(). "
    "Default: the app that Flask finds.",
)
@click.version_option(__version__, prog_name="Flask-TaskWorker")
@click.pass_context
def taskworker(ctx: click.Context, target: str | None) -> None:
    """Run background tasks of a Flask app."""
    ctx.meta["flask_taskworker.target"] = target


def load_task_app(ctx: click.Context) -> TaskApp:
    """The task app that the command line names."""
    target = ctx.meta.get("flask_taskworker.target")
    if target:
        return from_target(target)
    info = ctx.find_object(ScriptInfo)
    return from_flask_cli(info if info is not None else ScriptInfo())


@taskworker.command()
@click.option(
    "-l",
    "--loglevel",
    type=click.Choice(LEVELS, case_sensitive=False),
    default="info",
    show_default=True,
    help="What to log.",
)
@click.option(
    "-c",
    "--concurrency",
    type=click.IntRange(min=1),
    help="How many tasks run at once. Default: TASKER_CONCURRENCY.",
)
@click.option(
    "-Q",
    "--queues",
    metavar="NAMES",
    help="The queues to read, with commas between. Default: the default queue and those that "
    "tasks name.",
)
@click.option(
    "-n", "--hostname", metavar="NAME", help="Node name; %h is the host. Default: worker@%h"
)
@click.option(
    "-P",
    "--pool",
    type=click.Choice(("threads", "solo")),
    default="threads",
    show_default=True,
    help="Where tasks run.",
)
@click.option("--burst", is_flag=True, help="End when the queues are empty.")
@click.option("-q", "--quiet", is_flag=True, help="No banner at the start.")
@click.pass_context
def worker(
    ctx: click.Context,
    loglevel: str,
    concurrency: int | None,
    queues: str | None,
    hostname: str | None,
    pool: str,
    burst: bool,
    quiet: bool,
) -> None:
    """Run tasks until SIGINT or SIGTERM. The second signal stops at once."""
    from .worker.supervisor import POOLS, Worker, os_signals

    task_app = load_task_app(ctx)
    _log_to_stderr(loglevel)
    process = Worker(
        task_app,
        queues=_names(queues),
        concurrency=concurrency,
        pool=next(name for name in POOLS if name == pool),
        hostname=hostname,
        burst=burst,
    )
    if not quiet:
        click.echo(banner(process), err=True)
    with os_signals(process):
        process.run()


@taskworker.group()
def db() -> None:
    """The tables of the queue in a SQL database."""


@db.command("init")
@click.pass_context
def db_init(ctx: click.Context) -> None:
    """Create the tables, for workers whose database role may not."""
    task_app = load_task_app(ctx)
    with _sql_channel(task_app) as channel:
        channel.held()
        task_app.backend.prepare()
        click.echo(f"The tables are there: {channel.database.label}")


@db.command("migrate-kombu")
@click.argument("source")
@click.option("--dry-run", is_flag=True, help="Only count.")
@click.pass_context
def db_migrate_kombu(ctx: click.Context, source: str, dry_run: bool) -> None:
    """Take over what waits in the tables of Celery's sqla+ broker at SOURCE, a database URL.

    Stop Celery's workers first.
    """
    from .transports.sql.from_kombu import migrate

    with _sql_channel(load_task_app(ctx)) as channel:
        done = migrate(source, channel, dry_run=dry_run)
    verb = "would be moved" if dry_run else "moved"
    for queue, count in sorted(done.moved.items()):
        click.echo(f"{count} messages {verb} from queue {queue}")
    if not done.moved:
        click.echo(f"0 messages {verb}")
    notes = {
        f"{done.unknown} rows had been fetched by a worker: done or lost, nobody can tell. They "
        "stay where they are and are not run.": done.unknown,
        f"{done.passing} answers and events of processes that are gone were left.": done.passing,
        f"{len(done.unreadable)} rows hold no message; their ids: "
        f"{', '.join(map(str, done.unreadable[:20]))}": len(done.unreadable),
    }
    for note, count in notes.items():
        if count:
            click.echo(note, err=True)


@contextmanager
def _sql_channel(task_app: TaskApp) -> Iterator[Channel]:
    """A channel of the app's SQL broker."""
    from .broker import broker_connection

    url = task_app.config.broker_url
    if not url.startswith("taskworker+"):
        raise ConfigurationError(
            f"the broker {mask_url(url)} is no SQL database; this command is for TASKER_ENGINE "
            "'sqlalchemy'"
        )
    with broker_connection(task_app.config, role="publish") as connection:
        yield connection.default_channel


def _names(queues: str | None) -> list[str] | None:
    if queues is None:
        return None
    names = [name.strip() for name in queues.split(",") if name.strip()]
    if not names:
        raise ConfigurationError("-Q names no queue; write for example -Q default,mail")
    return names


def banner(process: Worker) -> str:
    """What a worker says of itself at its start."""
    config = process.app.config
    rows = {
        "node": process.hostname,
        "broker": mask_url(config.broker_url),
        "results": mask_url(config.result_backend) if config.result_backend else "off",
        "pool": f"{process.pool_name}, {process.pool.size} at once",
        "queues": ", ".join(process.queues),
        "tasks": _task_names(sorted(process.app.registry)),
    }
    lines = [f"Flask-TaskWorker {__version__}"]
    lines += [f"  {name:<8} {value}" for name, value in rows.items()]
    return "\n".join([*lines, "  Ctrl-C to stop"])


def _task_names(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none: is the module with the tasks imported by the app?"
    return f"{len(names)} ({shown}{', ...' if len(names) > 8 else ''})"


def _log_to_stderr(level: str) -> None:
    """Log our own messages; the root logger and the app's handlers stay as they are."""
    logger = logging.getLogger("flask_taskworker")
    logger.setLevel(level.upper())
    if not any(getattr(handler, "_taskworker_cli", False) for handler in logger.handlers):
        handler = logging.StreamHandler()
        handler._taskworker_cli = True  # type: ignore[attr-defined]
        handler.setFormatter(
            logging.Formatter("[%(asctime)s: %(levelname)s/%(threadName)s] %(message)s")
        )
        logger.addHandler(handler)
        logger.propagate = False


def main() -> None:
    """The ``taskworker`` command."""
    taskworker.main(prog_name="taskworker", args=sys.argv[1:])
