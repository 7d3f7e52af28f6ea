"""What lies in the queues, for people and monitors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import dead_letters

if TYPE_CHECKING:
    from .connection import HeldConnection
    from .engine import Database


class QueueState(NamedTuple):
    """A queue and the number of messages in it, by what keeps them there."""

    name: str
    waiting: int
    delayed: int
    unacked: int
    dead: int
    paused: bool


def queue_states(connection: HeldConnection) -> list[QueueState]:
    """All queues, by name, save those that vanish with the process that reads them.

    Counts every message: it takes about a second for a million of them.
    """
    sql = connection.database.dialect.sql
    # One condition a statement, word for word as in the index that answers it.
    waiting, delayed, unacked, dead = (
        dict(
            connection.execute(
                sql(f"SELECT queue, count(*) FROM {{message}} WHERE {state} GROUP BY queue")
            ).fetchall()
        )
        for state in ("owner = 0", "owner = -1", "owner > 0", "owner = -2")
    )
    rows = connection.execute(
        sql("SELECT id, name, paused FROM {queue} WHERE expires IS NULL ORDER BY name")
    ).fetchall()
    return [
        QueueState(
            name,
            waiting.get(id, 0),
            delayed.get(id, 0),
            unacked.get(id, 0),
            dead.get(id, 0),
            bool(paused),
        )
        for id, name, paused in rows
    ]


class DeadLetters:
    """The dead letters of a database, for :mod:`flask_taskworker.dead_letters`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def list(self, queue: str | None, limit: int) -> Sequence[dead_letters.DeadLetter]:
        """The oldest ones."""
        return dead_letters.list(self._database, queue, limit=limit)

    def replay(self, ids: Sequence[int], queue: str | None) -> int:
        """Put some back on their queues."""
        return dead_letters.replay(self._database, ids, queue)

    def delete(self, ids: Sequence[int], queue: str | None) -> int:
        """Delete some."""
        return dead_letters.delete(self._database, ids, queue)
