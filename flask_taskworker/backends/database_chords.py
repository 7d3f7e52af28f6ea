"""Chords and saved groups in a SQL database: their tables, and the statements on them.

A chord is one row with the number of tasks that have yet to end, and one row for each that has. Who
counts holds the chord's row, so that exactly one of the tasks is the last, however many end at once
and however often one of them is delivered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, Double, Index, Integer, LargeBinary, MetaData, String, Table
from sqlalchemy.dialects import mysql

if TYPE_CHECKING:
    from ..transports.sql.connection import HeldConnection
    from ..transports.sql.engine import Database

#: The place of a part that has none in its header: the last.
LAST = 2**31 - 1


class ChordTables:
    """The statements, in one database's dialect.

    :param metadata: gets the tables.
    :param prefix: in front of their names.
    """

    def __init__(self, database: Database, metadata: MetaData, prefix: str) -> None:
        chord, part, group = self.tables = chord_tables(metadata, prefix)
        quote = database.engine.dialect.identifier_preparer.format_table
        mark = database.dialect.marker
        ignoring = database.dialect.name not in ("sqlite", "postgresql")
        insert = "INSERT IGNORE INTO" if ignoring else "INSERT INTO"
        unless = "" if ignoring else " ON CONFLICT DO NOTHING"
        self._chord, self._part, self._group = quote(chord), quote(part), quote(group)
        here = f"WHERE group_id = {mark}"
        self.open = (
            f"{insert} {self._chord} (group_id, remaining, shape, opened) "
            f"VALUES ({mark}, {mark}, {mark}, {mark}){unless}"
        )
        self.grow = f"UPDATE {self._chord} SET remaining = remaining + 1 {here}"
        self._look = (
            f"SELECT remaining, shape FROM {self._chord} {here}{database.dialect.for_update}"
        )
        self._add = (
            f"{insert} {self._part} (group_id, task_id, place, status, result) "
            f"VALUES ({mark}, {mark}, {mark}, {mark}, {mark}){unless}"
        )
        self._count = f"UPDATE {self._chord} SET remaining = remaining - 1 {here}"
        self._parts = (
            f"SELECT task_id, place, status, result FROM {self._part} {here} ORDER BY place"
        )
        self._close = (f"DELETE FROM {self._part} {here}", f"DELETE FROM {self._chord} {here}")
        self.save_group = (
            f"{insert} {self._group} (group_id, shape, saved) VALUES ({mark}, {mark}, {mark})"
            f"{unless}"
        )
        self.restore_group = f"SELECT shape FROM {self._group} {here}"
        self.forget_group = f"DELETE FROM {self._group} {here}"
        old = f"SELECT group_id FROM {self._chord} WHERE opened < {mark}"
        self._clean = (
            f"DELETE FROM {self._part} WHERE group_id IN ({old})",
            f"DELETE FROM {self._chord} WHERE opened < {mark}",
            f"DELETE FROM {self._group} WHERE saved < {mark}",
        )

    def count(
        self, connection: HeldConnection, group_id: str, part: Sequence[Any]
    ) -> tuple[Any, Sequence[Any]] | None:
        """Count the end of a task, within a transaction.

        :param part: id, place, status and result of the task.
        :return: the chord's shape and all its parts, if none is missing any more.
        """
        found = connection.execute(self._look, (group_id,)).fetchone()
        if found is None:
            return None  # its body is sent already, or it was opened elsewhere
        remaining, shape = found
        if connection.execute(self._add, (group_id, *part)).rowcount == 1:
            connection.execute(self._count, (group_id,))
            remaining -= 1
        if remaining > 0:
            return None
        return shape, connection.execute(self._parts, (group_id,)).fetchall()

    def close(self, connection: HeldConnection, group_id: str) -> None:
        """Forget a chord and its parts, within a transaction."""
        for sql in self._close:
            connection.execute(sql, (group_id,))

    def cleanup(self, connection: HeldConnection, before: float) -> None:
        """Forget what was opened or saved before a time, in epoch seconds."""
        for sql in self._clean:
            connection.execute(sql, (before,))


def chord_tables(metadata: MetaData, prefix: str = "taskworker_") -> tuple[Table, Table, Table]:
    """The tables of chords, of their parts, and of saved groups."""
    exact = String(255).with_variant(
        mysql.VARCHAR(255, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
    )
    blob = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
    kwargs: dict[str, Any] = {
        "sqlite_with_rowid": False, "mysql_engine": "InnoDB", "mariadb_engine": "InnoDB",
        "mysql_charset": "utf8mb4", "mariadb_charset": "utf8mb4",
    }  # fmt: skip
    chord = Table(
        f"{prefix}chord",
        metadata,
        Column("group_id", exact, primary_key=True),
        # How many tasks of the header have yet to end.
        Column("remaining", Integer, nullable=False),
        # The header's result as a tuple, where it is nested.
        Column("shape", blob),
        # epoch seconds, UTC
        Column("opened", Double, nullable=False),
        Index(f"{prefix}chord_opened", "opened"),
        **kwargs,
    )
    part = Table(
        f"{prefix}chord_part",
        metadata,
        Column("group_id", exact, primary_key=True),
        Column("task_id", exact, primary_key=True),
        Column("place", Integer, primary_key=True, autoincrement=False),
        Column("status", String(50), nullable=False),
        Column("result", blob),
        **kwargs,
    )
    group = Table(
        f"{prefix}group",
        metadata,
        Column("group_id", exact, primary_key=True),
        Column("shape", blob),
        Column("saved", Double, nullable=False),
        Index(f"{prefix}group_saved", "saved"),
        **kwargs,
    )
    return chord, part, group
