"""Queues, bindings and topic patterns."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from .codec import checked_name
from .errors import DatabaseUnavailableError

if TYPE_CHECKING:
    from .connection import HeldConnection
    from .dialects.base import Encoded


def queue_id(connection: HeldConnection, name: str, create: bool = True) -> int | None:
    """The id of a queue, from the database.

    :param create: make the queue if there is none.
    :returns: None if there is none and none is to be made.
    """
    database, dialect = connection.database, connection.database.dialect
    for _ in range(3):
        row = connection.execute(dialect.select_queue, (checked_name(name, "queue"),)).fetchone()
        if row is not None:
            database.queue_ids[name] = row[0]
            return int(row[0])
        database.queue_ids.pop(name, None)
        if not create:
            return None
        dialect.insert_queue(connection, name, database.now())
    raise DatabaseUnavailableError(f"{database.label}: queue {name!r} is deleted all the time")


def put(connection: HeldConnection, queue: str, message: Encoded) -> None:
    """Add a message to a queue; the queue is created if need be."""
    database, dialect = connection.database, connection.database.dialect
    known = database.queue_ids.get(queue)
    for _ in range(3):
        if known is None:
            known = queue_id(connection, queue)
        if connection.execute(dialect.insert_message, (*message, known)).rowcount == 1:
            return
        known = None  # the queue was deleted, and perhaps created anew, by somebody else
    raise DatabaseUnavailableError(f"{database.label}: queue {queue!r} is deleted all the time")


def route(
    connection: HeldConnection, kind: str, exchange: str, routing_key: str, message: Encoded
) -> int:
    """Add a message to every queue bound to an exchange for this key.

    Bindings are read each time: one made a moment ago by another process must count.

    :param kind: the type of the exchange as far as this process knows.
    :returns: how many queues got it.
    """
    dialect = connection.database.dialect
    if kind == "fanout":
        return int(connection.execute(dialect.insert_fanout, (*message, exchange)).rowcount)
    if kind == "topic":
        targets = matching(connection, exchange, routing_key)
        return sum(
            int(connection.execute(dialect.insert_message, (*message, target)).rowcount)
            for target in targets
        )
    return int(
        connection.execute(dialect.insert_direct, (*message, exchange, routing_key)).rowcount
    )


def exchange_type(connection: HeldConnection, exchange: str) -> str | None:
    """The type another process declared an exchange with; None while nothing is bound."""
    dialect = connection.database.dialect
    rows = connection.execute(dialect.bindings_of, (exchange,)).fetchall()
    return str(rows[0][0]) if rows else None


def matching(connection: HeldConnection, exchange: str, routing_key: str) -> list[int]:
    """The queues of a topic exchange whose pattern fits a routing key, each once."""
    dialect = connection.database.dialect
    rows = connection.execute(dialect.bindings_of, (exchange,)).fetchall()
    words = tuple(routing_key.split("."))
    return sorted(
        {queue for _, rkey, queue in rows if topic_matches(tuple(rkey.split(".")), words)}
    )


@lru_cache(maxsize=4096)
def topic_matches(pattern: tuple[str, ...], words: tuple[str, ...]) -> bool:
    """AMQP's topic rule: ``*`` is one word, ``#`` any number of words, also none."""
    if not pattern:
        return not words
    head, rest = pattern[0], pattern[1:]
    if head == "#":
        return any(topic_matches(rest, words[skip:]) for skip in range(len(words) + 1))
    return bool(words) and head in ("*", words[0]) and topic_matches(rest, words[1:])
