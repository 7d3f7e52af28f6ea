"""Messages that were set aside: look at them, replay them, delete them.

Each function takes the database, as from :func:`.engine.database_for` or
``channel.database``, and works in a connection of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from .connection import HeldConnection
    from .engine import Database

__all__ = ["DeadLetter", "delete", "list", "replay"]

T = TypeVar("T")


class DeadLetter(NamedTuple):
    """A message that is not delivered any more."""

    id: int
    queue: str
    reason: str
    died_at: datetime
    #: How often it was delivered.
    attempts: int
    headers: dict[str, Any]
    properties: dict[str, Any]
    content_type: str | None
    content_encoding: str | None
    body: bytes


def list(
    database: Database, queue: str | None = None, *, limit: int = 100, after: int = 0
) -> Sequence[DeadLetter]:
    """Dead letters, oldest message first.

    :param queue: only of this queue.
    :param limit: at most so many.
    :param after: only with a larger id than this; the last id of a page begins the next.
    """

    def work(connection: HeldConnection) -> Sequence[DeadLetter]:
        only = "" if queue is None else " AND q.name = ?"
        cursor = connection.execute(
            database.dialect.sql(
                "SELECT m.id, q.name, m.reason, m.died, m.attempts, m.meta, m.body "
                "FROM {queue} q JOIN {message} m ON m.queue = q.id "
                f"WHERE m.owner = -2 AND m.id > ?{only} ORDER BY m.id LIMIT ?"
            ),
            (after, limit) if queue is None else (after, queue, limit),
        )
        return tuple(_read(row) for row in cursor.fetchall())

    return _with_connection(database, work)


def replay(database: Database, ids: Sequence[int] | None = None, queue: str | None = None) -> int:
    """Put dead letters back on their queues, as if they had never been delivered.

    :param ids: which; None: all.
    :param queue: only of this queue.
    :returns: how many.
    """
    return _change(
        database,
        "UPDATE {message} SET owner = 0, attempts = 0, reason = NULL, died = NULL",
        ids,
        queue,
        wake=True,
    )


def delete(database: Database, ids: Sequence[int] | None = None, queue: str | None = None) -> int:
    """Delete dead letters for good.

    :param ids: which; None: all.
    :param queue: only of this queue.
    :returns: how many.
    """
    return _change(database, "DELETE FROM {message}", ids, queue)


def _change(
    database: Database,
    verb: str,
    ids: Sequence[int] | None,
    queue: str | None,
    wake: bool = False,
) -> int:
    where = " WHERE owner = -2"
    params: tuple[Any, ...] = ()
    if ids is not None:
        if not ids:
            return 0
        where += f" AND id IN ({database.dialect.ids(int(id) for id in ids)})"
    if queue is not None:
        where += " AND queue IN (SELECT id FROM {queue} WHERE name = ?)"
        params = (queue,)
    sql = database.dialect.sql(verb + where)

    def work(held: HeldConnection) -> int:
        count = int(held.execute(sql, params).rowcount)
        if count and wake:
            database.wake(held)
        return count

    return _with_connection(database, work)


def _with_connection(database: Database, work: Callable[[HeldConnection], T]) -> T:
    connection = database.connect(durable=database.options.durable)
    try:
        return work(connection)
    finally:
        connection.close()


def _read(row: Any) -> DeadLetter:
    id, queue, reason, died, attempts, meta, body = row
    try:
        envelope = json.loads(meta)
    except (ValueError, TypeError, RecursionError):  # perhaps that is why it is here
        envelope = {}
    if not isinstance(envelope, dict):
        envelope = {}
    return DeadLetter(
        id,
        queue,
        reason or "",
        datetime.fromtimestamp(died or 0.0, timezone.utc),
        attempts,
        envelope.get("headers") or {},
        envelope.get("properties") or {},
        envelope.get("content_type"),
        envelope.get("content_encoding"),
        bytes(body) if isinstance(body, (bytes, bytearray, memoryview)) else str(body).encode(),
    )
