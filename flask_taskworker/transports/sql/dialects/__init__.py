"""What differs between the databases: statements, locks, and how errors look."""

from __future__ import annotations

from sqlalchemy.engine import URL

from .base import Dialect, TableNames


def dialect_for(url: URL, names: TableNames, notify: bool = True) -> Dialect:
    """The dialect of a URL that :func:`..url.parse` accepted.

    :param notify: whether publishes wake sleepers on other hosts, where the database can.
    """
    backend = url.get_backend_name()
    if backend == "sqlite":
        from .sqlite import SQLiteDialect

        return SQLiteDialect(url, names)
    if backend == "postgresql":
        from .postgresql import PostgreSQLDialect

        return PostgreSQLDialect(url, names, notify)
    from .mysql import MySQLDialect

    return MySQLDialect(url, names)


__all__ = ["Dialect", "TableNames", "dialect_for"]
