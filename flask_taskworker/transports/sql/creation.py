"""Creating and checking the tables, safely when many processes start at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy.schema import CreateIndex, CreateTable

from .errors import DatabaseUnavailableError, DatabaseUnusableError
from .schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from .connection import HeldConnection
    from .engine import Database


def ensure_tables(database: Database, connection: HeldConnection) -> None:
    """Create what is missing, or raise.

    :raises DatabaseUnusableError: if tables are missing and may not be created, or a
        newer program made them.
    """
    version = _version(database, connection)
    if version is None:
        if not database.options.create_tables:
            raise DatabaseUnusableError(
                f"{database.label} has no tables {database.options.table_prefix}*, and "
                "create_tables is off. Create them with a role that may, for instance by "
                "running this once with create_tables=True."
            )
        with database.dialect.schema_lock(connection):
            _create(database, connection)
        version = _version(database, connection)
    if version is not None and version > SCHEMA_VERSION:
        raise DatabaseUnusableError(
            f"{database.label}: the tables {database.options.table_prefix}* are of version "
            f"{version}; this program knows {SCHEMA_VERSION}. Upgrade flask-taskworker."
        )


def _version(database: Database, connection: HeldConnection) -> int | None:
    dialect = database.dialect
    try:
        row = connection.execute(
            dialect.sql("SELECT value FROM {meta} WHERE name = 'schema_version'")
        ).fetchone()
    except (DatabaseUnavailableError, DatabaseUnusableError) as exc:
        if exc.__cause__ is not None and dialect.is_missing_table(exc.__cause__):
            return None
        raise
    if row is None:
        return None
    try:
        return int(row[0])
    except ValueError:
        raise DatabaseUnusableError(
            f"{database.label}: the schema_version in {dialect.names.meta} is {row[0]!r}, which "
            f"is no number. This program's is {SCHEMA_VERSION}."
        ) from None


def _create(database: Database, connection: HeldConnection) -> None:
    dialect = database.engine.dialect
    for table in database.tables.metadata.sorted_tables:
        connection.execute(str(CreateTable(table, if_not_exists=True).compile(dialect=dialect)))
        database.dialect.after_create(connection, table)
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            if _applies(database, index.name):
                database.dialect.create_index(
                    connection,
                    str(CreateIndex(index, if_not_exists=True).compile(dialect=dialect)),
                )
    # The version comes last: until it is there, the tables are not complete.
    connection.execute(database.dialect.insert_version, ("schema_version", str(SCHEMA_VERSION)))


def _applies(database: Database, name: object) -> bool:
    from .schema import index_applies

    return index_applies(str(name), database.dialect.name)
