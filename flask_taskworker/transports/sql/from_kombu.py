"""Takes over the messages that wait in the tables of kombu's own SQL transport.

That transport marks a message as invisible when a worker fetches it, and leaves the row
for ever. A visible row is a message that waits. An invisible one was done, or was lost
with its worker: nobody can know, so those are counted and left alone.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from ...exceptions import ConfigurationError
from .url import file_of, identity, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .channel import Channel

#: How many messages are moved in one transaction.
BATCH = 500
#: Queues whose messages are answers or events of processes that are gone.
_PASSING = (".celery.pidbox", "reply.celery.pidbox")


@dataclass
class Migration:
    """What was done, or would be done.

    :ivar moved: how many messages of each queue.
    :ivar passing: answers and events of processes that are gone; not moved.
    :ivar unreadable: the ids of rows that hold no message; they stay where they are.
    :ivar unknown: rows that a worker had fetched: done or lost, which nobody can tell.
    """

    moved: Counter[str] = field(default_factory=Counter)
    passing: int = 0
    unreadable: list[int] = field(default_factory=list)
    unknown: int = 0


def migrate(
    source: str,
    channel: Channel,
    *,
    dry_run: bool = False,
    queue_table: str = "kombu_queue",
    message_table: str = "kombu_message",
) -> Migration:
    """Move the visible messages of kombu's tables to ``channel``, queue by queue, oldest first.

    Stop Celery's workers first. Within one database a message moves in one transaction;
    between two it is stored here before it is deleted there, so that a crash in between
    leaves it in both.

    :param source: the URL of kombu's database, with or without ``sqla+`` in front.
    :param channel: of our transport.
    :param dry_run: only count.
    :param queue_table: kombu's ``queue_tablename``.
    :param message_table: kombu's ``message_tablename``.
    :raises ConfigurationError: if the tables are not there.
    """
    url = parse(source.removeprefix("sqla+").removeprefix("sqlalchemy+"))
    file = file_of(url)
    if file is not None and not Path(file).is_file():
        raise ConfigurationError(f"there is no file {file}")  # opening would make one
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    tables = _tables(engine, queue_table, message_table)
    same = identity(url) == identity(channel.database.url)
    done, after = Migration(), 0
    with engine.connect() as connection:
        done.unknown = connection.execute(tables.count_fetched).scalar_one()
    while True:
        with engine.begin() as connection:
            rows = connection.execute(tables.waiting, {"after": after, "batch": BATCH}).all()
            if not rows:
                break
            after = rows[-1].id
            taken = _take(rows, channel, connection if same else None, done, dry_run)
            if taken and not dry_run:
                connection.execute(tables.delete, {"ids": taken})
    if done.moved and not dry_run:
        channel.wake_consumers()
    return done


def _take(
    rows: Sequence[Any],
    channel: Channel,
    connection: sa.Connection | None,
    done: Migration,
    dry_run: bool,
) -> list[int]:
    """Publish a batch of rows; return the ids of those to delete."""
    taken = []
    for row in rows:
        if row.name.endswith(_PASSING):
            done.passing += 1
            continue
        try:
            message = _message(channel, row.payload)
        except (ValueError, TypeError, KeyError, AttributeError, binascii.Error):
            done.unreadable.append(row.id)
            continue
        if not dry_run and connection is not None:
            channel.publish_in(connection, message, row.name)
        elif not dry_run:
            channel.basic_publish(message, "", row.name)
        done.moved[row.name] += 1
        taken.append(row.id)
    return taken


def _message(channel: Channel, payload: str | bytes) -> dict[str, Any]:
    stored = json.loads(payload)
    properties = dict(stored["properties"])
    body = stored["body"].encode()
    if properties.pop("body_encoding", None) == "base64":
        body = base64.b64decode(body, validate=True)
    for name in ("delivery_tag", "delivery_info"):
        properties.pop(name, None)
    eta = (stored.get("headers") or {}).get("eta")
    if isinstance(eta, str):
        properties["eta_at"] = _epoch(eta)
    message: dict[str, Any] = channel.prepare_message(
        body,
        priority=properties.pop("priority", 0),
        content_type=stored.get("content-type"),
        content_encoding=stored.get("content-encoding"),
        headers=stored.get("headers"),
        properties=properties,
    )
    return message


def _epoch(eta: str) -> float:
    moment = datetime.fromisoformat(eta[:-1] + "+00:00" if eta.endswith("Z") else eta)
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


@dataclass(frozen=True)
class _Tables:
    waiting: sa.Select[Any]
    count_fetched: sa.Select[Any]
    delete: sa.Delete


def _tables(engine: sa.Engine, queue_table: str, message_table: str) -> _Tables:
    missing = [
        name for name in (queue_table, message_table) if not sa.inspect(engine).has_table(name)
    ]
    if missing:
        raise ConfigurationError(
            f"{engine.url.render_as_string(hide_password=True)} has no table "
            f"{' and no '.join(missing)}: kombu's SQL transport was not used there, or its "
            "tables have other names"
        )
    queue = sa.table(queue_table, sa.column("id"), sa.column("name"))
    message = sa.table(
        message_table,
        sa.column("id"),
        sa.column("visible", sa.Boolean),
        sa.column("payload"),
        sa.column("queue_id"),
    )
    waiting = (
        sa.select(message.c.id, message.c.payload, queue.c.name)
        .join_from(message, queue, message.c.queue_id == queue.c.id)
        .where(message.c.visible.is_(True), message.c.id > sa.bindparam("after"))
        .order_by(message.c.id)
        .limit(sa.bindparam("batch"))
        .with_for_update(of=message)
    )
    fetched = sa.select(sa.func.count()).select_from(message).where(message.c.visible.is_(False))
    delete = sa.delete(message).where(message.c.id.in_(sa.bindparam("ids", expanding=True)))
    return _Tables(waiting, fetched, delete)
