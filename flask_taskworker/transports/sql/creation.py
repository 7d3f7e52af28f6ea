"""Creating, completing and checking the tables, safely when many processes start at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy.schema import CreateColumn, CreateIndex, CreateTable, Table

from .errors import DatabaseUnavailableError, DatabaseUnusableError
from .schema import SCHEMA_REVISION, SCHEMA_VERSION, index_applies

if TYPE_CHECKING:
    from .connection import HeldConnection
    from .engine import Database

_VERSION, _REVISION = "schema_version", "schema_revision"


def ensure_tables(database: Database, connection: HeldConnection) -> None:
    """Create what is missing, add what an older program did not know, or raise.

    :raises DatabaseUnusableError: if something is missing and may not be created, or a
        newer program made the tables.
    """
    found = _versions(database, connection)
    if _lacks_something(database, found):
        if not database.options.create_tables:
            raise DatabaseUnusableError(_may_not(database, found))
        with database.dialect.schema_lock(connection):
            # Others may have done it while we waited for the lock: nothing is done twice.
            _complete(database, connection, new=found is None)
        _lacks_something(database, _versions(database, connection))


class _Versions(NamedTuple):
    version: int
    revision: int


def _lacks_something(database: Database, found: _Versions | None) -> bool:
    """Whether there is something to create; an error if the tables are too new for us."""
    if found is not None and found.version > SCHEMA_VERSION:
        raise DatabaseUnusableError(
            f"{database.label}: the tables {database.options.table_prefix}* are of version "
            f"{found.version}; this program knows {SCHEMA_VERSION}. Upgrade flask-taskworker."
        )
    return found is None or found.revision < SCHEMA_REVISION


def _may_not(database: Database, found: _Versions | None) -> str:
    tables = f"tables {database.options.table_prefix}*"
    trouble = f"no {tables}" if found is None else f"{tables} of an older flask-taskworker"
    return (
        f"{database.label} has {trouble}, and create_tables is off. Create or complete them with "
        "a role that may, for instance by running this once with create_tables=True."
    )


def _versions(database: Database, connection: HeldConnection) -> _Versions | None:
    """What the tables say of themselves; None if they are not there, or not complete."""
    dialect = database.dialect
    try:
        rows = connection.execute(dialect.sql("SELECT name, value FROM {meta}")).fetchall()
    except (DatabaseUnavailableError, DatabaseUnusableError) as exc:
        if exc.__cause__ is not None and dialect.is_missing_table(exc.__cause__):
            return None
        raise
    stored = dict(rows)
    if _VERSION not in stored:
        return None
    numbers = []
    for name, own in ((_VERSION, SCHEMA_VERSION), (_REVISION, SCHEMA_REVISION)):
        try:
            numbers.append(int(stored.get(name, 0)))
        except ValueError:
            raise DatabaseUnusableError(
                f"{database.label}: the {name} in {dialect.names.meta} is {stored[name]!r}, "
                f"which is no number. This program's is {own}."
            ) from None
    return _Versions(*numbers)


def _complete(database: Database, connection: HeldConnection, new: bool) -> None:
    """Create tables, columns and indexes unless they exist."""
    dialect = database.engine.dialect
    for table in database.tables.metadata.sorted_tables:
        connection.execute(str(CreateTable(table, if_not_exists=True).compile(dialect=dialect)))
        if new:
            database.dialect.after_create(connection, table)
        else:
            _add_columns(database, connection, table)
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            if index_applies(str(index.name), database.dialect.name):
                database.dialect.create_index(
                    connection,
                    str(CreateIndex(index, if_not_exists=True).compile(dialect=dialect)),
                )
    # The versions come last: until they are there, the tables are not complete.
    connection.execute(database.dialect.sql("DELETE FROM {meta} WHERE name = ?"), (_REVISION,))
    for name, own in ((_REVISION, SCHEMA_REVISION), (_VERSION, SCHEMA_VERSION)):
        connection.execute(database.dialect.insert_version, (name, str(own)))


def _add_columns(database: Database, connection: HeldConnection, table: Table) -> None:
    dialect = database.engine.dialect
    name = dialect.identifier_preparer.format_table(table)
    present = {
        column[0] for column in connection.execute(f"SELECT * FROM {name} LIMIT 0").description
    }
    for column in table.columns:
        if column.name not in present:
            ddl = CreateColumn(column).compile(dialect=dialect)
            connection.execute(f"ALTER TABLE {name} ADD COLUMN {ddl}")
