"""``taskworker db``: the tables of the queue in a SQL database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from ..config import mask_url
from ..exceptions import ConfigurationError
from .root import load_task_app, taskworker

if TYPE_CHECKING:
    from ..app import TaskApp
    from ..transports.sql.channel import Channel


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
    from ..transports.sql.from_kombu import migrate

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
    from ..broker import broker_connection

    url = task_app.config.broker_url
    if not url.startswith("taskworker+"):
        raise ConfigurationError(
            f"the broker {mask_url(url)} is no SQL database; this command is for TASKER_ENGINE "
            "'sqlalchemy'"
        )
    with broker_connection(task_app.config, role="publish") as connection:
        yield connection.default_channel
