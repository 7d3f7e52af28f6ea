"""The revoked tasks of a database, for all workers that use it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .schema import NAME_LENGTH

if TYPE_CHECKING:
    from .connection import HeldConnection


def add(connection: HeldConnection, entries: Iterable[str], until: float) -> None:
    """Keep entries until then, in epoch seconds; what is past its time goes."""
    database, dialect = connection.database, connection.database.dialect
    rows = [(entry, until) for entry in entries if len(entry) <= NAME_LENGTH]

    def work() -> None:
        for row in rows:
            connection.execute(dialect.insert_revoked, row)
        connection.execute(dialect.sql("DELETE FROM {revoked} WHERE until <= ?"), (database.now(),))

    connection.transaction(work)


def entries(connection: HeldConnection, limit: int) -> list[tuple[str, float]]:
    """The latest entries with the time until which they hold, oldest first."""
    database = connection.database
    sql = database.dialect.sql(
        "SELECT entry, until FROM {revoked} WHERE until > ? ORDER BY until DESC LIMIT ?"
    )
    rows = connection.execute(sql, (database.now(), limit)).fetchall()
    return [(str(entry), float(until)) for entry, until in rows][::-1]
