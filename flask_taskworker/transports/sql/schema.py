"""The tables of the transport.

``build_tables(dialect=...).metadata`` can be given to Alembic next to the app's own metadata; an
app that leaves the tables to the transport excludes them with :func:`include_object`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects import mysql

#: Raised by one whenever an older program could not work with the tables any more.
SCHEMA_VERSION = 1
#: Raised by one with each addition that does not disturb older programs: a table, an index, or a
#: column that may be NULL or has a server default. Older tables get what they lack.
SCHEMA_REVISION = 2

#: ``message.owner`` of a message that anybody may claim. Positive: the consumer's id.
READY = 0
#: ... of one that waits for its ``due`` time.
DELAYED = -1
#: ... of a dead letter.
DEAD = -2

NAME_LENGTH = 255


class Tables(NamedTuple):
    metadata: MetaData
    queue: Table
    binding: Table
    consumer: Table
    message: Table
    meta: Table
    revoked: Table


def _name() -> String:
    # Names are compared byte by byte; MySQL's default collations ignore case.
    exact = mysql.VARCHAR(NAME_LENGTH, charset="utf8mb4", collation="utf8mb4_bin")
    return String(NAME_LENGTH).with_variant(exact, "mysql", "mariadb")


def _long_text() -> Text:
    return Text().with_variant(mysql.LONGTEXT(charset="utf8mb4"), "mysql", "mariadb")


def _identity() -> BigInteger:
    # SQLite generates keys only for a column declared INTEGER.
    return BigInteger().with_variant(Integer, "sqlite")


@lru_cache(maxsize=16)
def build_tables(
    prefix: str = "taskworker_", schema: str | None = None, dialect: str | None = None
) -> Tables:
    """The tables under a prefix.

    :param prefix: in front of each table and index name.
    :param schema: a PostgreSQL schema.
    :param dialect: SQLAlchemy's name of the database: only with the indexes it gets, as
        Alembic needs it; None: with those of all databases.
    """
    metadata = MetaData(schema=schema)
    kwargs: dict[str, Any] = {
        "mysql_engine": "InnoDB", "mariadb_engine": "InnoDB",
        "mysql_charset": "utf8mb4", "mariadb_charset": "utf8mb4",
    }  # fmt: skip
    queue = Table(
        f"{prefix}queue",
        metadata,
        Column("id", _identity(), primary_key=True),
        Column("name", _name(), nullable=False, unique=True),
        Column("paused", SmallInteger, nullable=False, server_default=text("0")),
        # Seconds without use after which the queue goes, and when it was last used.
        Column("expires", Double),
        Column("used", Double, nullable=False, server_default=text("0")),
        # Never reuse an id: other processes remember the ids of queues.
        sqlite_autoincrement=True,
        **kwargs,
    )
    binding = Table(
        f"{prefix}binding",
        metadata,
        Column("exchange", _name(), primary_key=True),
        Column("rkey", _name(), primary_key=True),
        Column("queue", BigInteger, primary_key=True, autoincrement=False),
        Column("type", String(16), nullable=False),
        Index(f"{prefix}binding_queue", "queue"),
        **kwargs,
    )
    consumer = Table(
        f"{prefix}consumer",
        metadata,
        Column("id", BigInteger, primary_key=True, autoincrement=False),
        Column("seen", Double, nullable=False),
        Column("host", _name(), nullable=False),
        Column("pid", Integer, nullable=False),
        **kwargs,
    )
    message = Table(f"{prefix}message", metadata, *_message_columns(), **kwargs)
    _message_indexes(prefix, message)
    if dialect is not None:
        message.indexes = {
            index for index in message.indexes if index_applies(str(index.name), dialect)
        }
    meta = Table(
        f"{prefix}meta",
        metadata,
        Column("name", String(64), primary_key=True),
        Column("value", String(255), nullable=False),
        **kwargs,
    )
    revoked = Table(
        f"{prefix}revoked",
        metadata,
        # A task's id, or a stamp as :mod:`flask_taskworker.transports.fleet` writes it.
        Column("entry", _name(), primary_key=True),
        # Until when, in epoch seconds.
        Column("until", Double, nullable=False),
        **kwargs,
    )
    return Tables(metadata, queue, binding, consumer, message, meta, revoked)


def _message_columns() -> list[Column[Any]]:
    return [
        Column("id", _identity(), primary_key=True),
        Column("queue", BigInteger, nullable=False),
        # 0 is the most urgent: 9 minus the message's priority.
        Column("prio", SmallInteger, nullable=False),
        Column("owner", BigInteger, nullable=False, server_default=text("0")),
        Column("attempts", Integer, nullable=False, server_default=text("0")),
        Column("due", Double),
        # Everything but the body, as JSON.
        Column("meta", _long_text(), nullable=False),
        Column(
            "body", LargeBinary().with_variant(mysql.LONGBLOB, "mysql", "mariadb"), nullable=False
        ),
        Column("reason", _long_text()),
        Column("died", Double),
    ]


def _message_indexes(prefix: str, message: Table) -> None:
    columns = message.c

    def partial(name: str, *parts: Any, where: str) -> None:
        Index(
            f"{prefix}{name}_part",
            *parts,
            sqlite_where=text(where),
            postgresql_where=text(where),
        ).ddl_if(callable_=_only_here)

    # Each statement repeats such a condition literally, or the index is not used.
    partial("ready", columns.queue, columns.prio, columns.id, where="owner = 0")
    partial("owned", columns.owner, where="owner > 0")
    partial("due", columns.due, where="owner = -1")
    partial("dead", columns.id, where="owner = -2")
    Index(f"{prefix}ready_full", columns.queue, columns.owner, columns.prio, columns.id).ddl_if(
        callable_=_only_here
    )
    Index(f"{prefix}due_full", columns.due).ddl_if(callable_=_only_here)


def _only_here(ddl: Any, target: Any, bind: Any, *args: Any, **kwargs: Any) -> bool:
    """For SQLAlchemy's own ``create_all``: whether the index is for this dialect."""
    return index_applies(str(target.name), kwargs["dialect"].name)


#: Dialects with indexes over a part of the rows.
PARTIAL_INDEX_DIALECTS = ("sqlite", "postgresql")


def index_applies(name: str, dialect: str) -> bool:
    """Whether an index belongs to a database of this dialect."""
    if name.endswith("_part"):
        return dialect in PARTIAL_INDEX_DIALECTS
    return not name.endswith("_full") or dialect not in PARTIAL_INDEX_DIALECTS


def include_object(prefix: str = "taskworker_") -> Callable[..., bool]:
    """A filter for Alembic's ``include_object`` that leaves the transport's tables alone.

    :param prefix: the ``table_prefix`` of the transport.
    """
    names = {table.name for table in build_tables(prefix).metadata.tables.values()}

    def include(obj: Any, name: str | None, type_: str, reflected: bool, compare_to: Any) -> bool:
        if type_ == "table":
            return name not in names
        table = getattr(obj, "table", None)
        return table is None or table.name not in names

    return include
