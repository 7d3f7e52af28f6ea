"""Results in a SQL database, by default the one that carries the messages.

Where it is the same database, the worker stores a result in the transaction that
acknowledges the message: "done" and "acknowledged" cannot disagree.
"""

from __future__ import annotations

import logging
import select
import threading
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Column, Double, Index, LargeBinary, MetaData, String, Table, Text
from sqlalchemy.dialects import mysql
from sqlalchemy.schema import CreateIndex, CreateTable

from .. import clock, states
from ..stock import Stock
from ..transports.sql.doorbell import MESSAGES, RESULTS
from ..transports.sql.engine import database_for
from ..transports.sql.errors import DatabaseUnavailableError
from .base import (
    ChordPart,
    Finish,
    Header,
    ResultBackend,
    TaskRecord,
    Transaction,
    timed_out,
)
from .database_chords import LAST, ChordTables
from .encoding import dumps, loads

if TYPE_CHECKING:
    from ..config import Config
    from ..transports.sql.connection import HeldConnection
    from ..transports.sql.doorbell import Slot
    from ..transports.sql.engine import Database

log = logging.getLogger("flask_taskworker")

T = TypeVar("T")

#: How long a statement waits for a lock. Seconds.
BUSY_TIMEOUT = 5.0
#: The longest sleep of a waiting client that is woken by the doorbell. Seconds.
LONGEST_SLEEP = 1.0
#: First and longest pause of a client that nobody can wake.
FIRST_POLL, LONGEST_POLL = 0.002, 0.1
#: How long a waiting client pauses while the database is away. Seconds.
AWAY_PAUSE = 0.5
#: How many expired results are deleted at once.
CLEANUP_ROWS = 1000

_COLUMNS = ("task_id", "status", "result", "traceback", "children", "date_done", "group_id",
            "parent_id")  # fmt: skip


class DatabaseBackend(ResultBackend):
    """Keeps records in the table ``taskworker_result``."""

    transient_errors = (DatabaseUnavailableError, OSError)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert config.result_backend is not None
        self._url = config.result_backend.removeprefix("db+")
        self._connections: Stock[HeldConnection] = Stock(
            self._connect, lambda c: c.close(), config.pool_limit, BUSY_TIMEOUT
        )
        self._prepared: _Prepared | None = None
        self._preparing = threading.Lock()

    def shares_database_with(self, broker_url: str) -> bool:
        same = self._url.removeprefix("taskworker+") == broker_url.removeprefix("taskworker+")
        return same and broker_url.startswith("taskworker+")

    def statement(self, record: TaskRecord) -> tuple[str, Sequence[Any]]:
        sql = self._sql()
        if not sql.table_exists:  # whoever runs the statement takes that for granted
            self.prepare()
        serializer = self.config.result_serializer
        children = dumps(list(record.children), serializer) if record.children else None
        return (
            sql.store,
            (
                record.task_id,
                record.status,
                dumps(record.result, serializer),
                record.traceback,
                children,
                record.date_done.timestamp() if record.date_done else None,
                record.group_id,
                record.parent_id,
            ),
        )

    def store(self, record: TaskRecord) -> None:
        sql, values = self.statement(record.done_now())

        def run(connection: HeldConnection) -> None:
            connection.execute(sql, values)
            connection.database.doorbell.ring(RESULTS)

        self._run(run)

    def fetch(self, task_id: str) -> TaskRecord | None:
        sql = self._sql().fetch
        row = self._run(lambda connection: connection.execute(sql, (task_id,)).fetchone())
        return None if row is None else self._read(row)

    def wait(self, task_id: str, timeout: float | None = None) -> TaskRecord:
        deadline = None if timeout is None else clock.monotonic() + timeout
        record = self._fetch_ready(task_id)
        if record is not None:
            return record
        away = False
        with _Sleeper(self._database()) as sleeper:
            while True:
                sleeper.arm()
                try:
                    record, away = self._fetch_ready(task_id), False
                except DatabaseUnavailableError as exc:  # it may be back before the time is over
                    if not away:
                        log.warning("the result of %s cannot be read now: %s", task_id, exc)
                    away = True
                if record is not None:
                    return record
                left = None if deadline is None else deadline - clock.monotonic()
                if left is not None and left <= 0:
                    raise timed_out(task_id, timeout)
                sleeper.sleep(left, at_least=AWAY_PAUSE if away else 0.0)

    def forget(self, task_id: str) -> None:
        sql = self._sql().forget
        self._run(lambda connection: connection.execute(sql, (task_id,)))

    def cleanup(self) -> int:
        expires = self.config.result_expires
        if not expires:
            return 0
        before = clock.wall() - expires
        with self._connections.lent() as connection:
            self._sql().chords.cleanup(connection, before)
            return int(connection.execute(self._sql().cleanup, (before,)).rowcount)

    # -- groups and chords ----------------------------------------------------------------

    def save_group(self, group_id: str, shape: Any) -> None:
        values = (group_id, dumps(shape, self.config.result_serializer), clock.wall())
        with self._connections.lent() as connection:
            connection.execute(self._sql().chords.save_group, values)

    def restore_group(self, group_id: str) -> Any:
        with self._connections.lent() as connection:
            row = connection.execute(self._sql().chords.restore_group, (group_id,)).fetchone()
        return None if row is None else loads(bytes(row[0]), self.config.result_serializer)

    def forget_group(self, group_id: str) -> None:
        with self._connections.lent() as connection:
            connection.execute(self._sql().chords.forget_group, (group_id,))

    def ensure_chords(self) -> None:
        pass

    def open_chord(
        self,
        group_id: str,
        size: int,
        shape: Any = None,
        transaction: Transaction | None = None,
    ) -> None:
        data = None if shape is None else dumps(shape, self.config.result_serializer)
        values = (group_id, size, data, clock.wall())
        if transaction is not None:
            transaction.connection.execute(self._sql().chords.open, values)
            return
        with self._connections.lent() as connection:
            connection.execute(self._sql().chords.open, values)

    def grow_chord(self, group_id: str) -> None:
        with self._connections.lent() as connection:
            connection.execute(self._sql().chords.grow, (group_id,))

    def arrive(
        self, group_id: str, part: ChordPart, finish: Finish, record: TaskRecord | None = None
    ) -> Header | None:
        serializer, chords = self.config.result_serializer, self._sql().chords
        stored = None if record is None else self.statement(record.done_now())
        place = LAST if part.index is None else part.index
        values = (part.task_id, place, part.status, dumps(part.result, serializer))
        with self._connections.lent() as connection:
            # The body goes out in this transaction if that is where messages are kept.
            shared = self.shares_database_with(self.config.broker_url)
            transaction = Transaction(connection, shared)
            sent = False

            def work() -> Header | None:
                nonlocal sent
                sent = False
                if stored is not None:
                    connection.execute(*stored)
                counted = chords.count(connection, group_id, values)
                if counted is None:
                    return None
                header = _header(group_id, *counted, serializer)
                if not finish(header, transaction):
                    return header
                chords.close(connection, group_id)
                sent = True
                return None

            unfinished = connection.transaction(work)
            if stored is not None:
                connection.database.doorbell.ring(RESULTS)
            if sent and shared:
                connection.database.doorbell.ring(MESSAGES)
        return unfinished

    def close_chord(self, group_id: str) -> None:
        with self._connections.lent() as connection:
            connection.transaction(lambda: self._sql().chords.close(connection, group_id))

    def prepare(self) -> None:
        with self._connections.lent():
            pass  # a new connection makes sure of the table

    def close(self) -> None:
        self._connections.close()

    def _fetch_ready(self, task_id: str) -> TaskRecord | None:
        record = self.fetch(task_id)
        return record if record is not None and record.status in states.READY_STATES else None

    def _read(self, row: Sequence[Any]) -> TaskRecord:
        serializer = self.config.result_serializer
        task_id, status, result, traceback, children, date_done, group_id, parent_id = row
        return TaskRecord(
            task_id=task_id,
            status=status,
            result=None if result is None else loads(bytes(result), serializer),
            traceback=traceback,
            children=None if children is None else loads(bytes(children), serializer),
            date_done=None
            if date_done is None
            else datetime.fromtimestamp(date_done, timezone.utc),
            group_id=group_id,
            parent_id=parent_id,
        )

    def _run(self, work: Callable[[HeldConnection], T]) -> T:
        """Do something that may be done twice; once more if an idle connection was lost."""
        connection = self._connections.take()
        try:
            done = work(connection)
        except BaseException as exc:
            lost = isinstance(exc, DatabaseUnavailableError) and not connection.usable
            self._connections.discard(connection)
            if not lost:
                raise
        else:
            self._connections.give_back(connection)
            return done
        self._connections.close()  # the idle ones were lost with it
        with self._connections.lent() as connection:
            return work(connection)

    # -- the database ---------------------------------------------------------------------

    def _database(self) -> Database:
        from ..broker import sql_options

        return database_for(self._url, sql_options(self.config))

    def _connect(self) -> HeldConnection:
        connection = self._database().connect(durable=False, busy_timeout=BUSY_TIMEOUT)
        try:
            self._sql().ensure_table(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _sql(self) -> _Prepared:
        prepared = self._prepared
        if prepared is None:
            with self._preparing:
                prepared = self._prepared = self._prepared or _Prepared(self._database())
        return prepared


def _header(group_id: str, shape: Any, rows: Sequence[Any], serializer: str) -> Header:
    parts = [
        ChordPart(
            task_id,
            None if place == LAST else place,
            status,
            None if result is None else loads(bytes(result), serializer),
        )
        for task_id, place, status, result in rows
    ]
    return Header(group_id, parts, None if shape is None else loads(bytes(shape), serializer))


class _Prepared:
    """The table of results and the statements on it, in one database's dialect."""

    def __init__(self, database: Database) -> None:
        options = database.options
        self.table = result_table(options.table_prefix, options.schema)
        self.chords = ChordTables(database, self.table.metadata, options.table_prefix)
        self.table_exists = False
        name = database.engine.dialect.identifier_preparer.format_table(self.table)
        mark = database.dialect.marker
        values = ", ".join([mark] * len(_COLUMNS))
        insert = f"INSERT INTO {name} ({', '.join(_COLUMNS)}) VALUES ({values}) "
        self.store = insert + _replace_unless_done(database.dialect.name, name)
        self.fetch = f"SELECT {', '.join(_COLUMNS)} FROM {name} WHERE task_id = {mark}"
        self.forget = f"DELETE FROM {name} WHERE task_id = {mark}"
        old = f"SELECT task_id FROM {name} WHERE date_done < {mark} LIMIT {CLEANUP_ROWS}"
        # MySQL has no LIMIT inside IN, but takes it one level deeper.
        self.cleanup = f"DELETE FROM {name} WHERE task_id IN (SELECT task_id FROM ({old}) old)"

    def ensure_table(self, connection: HeldConnection) -> None:
        """Create the table if it is missing; several processes may do it at once."""
        database = connection.database
        if self.table_exists or not database.options.create_tables:
            return
        dialect = database.engine.dialect
        with connection.lasting(), database.dialect.schema_lock(connection):
            for table in (self.table, *self.chords.tables):
                create = CreateTable(table, if_not_exists=True)
                connection.execute(str(create.compile(dialect=dialect)))
                for index in table.indexes:
                    create_index = CreateIndex(index, if_not_exists=True)
                    database.dialect.create_index(
                        connection, str(create_index.compile(dialect=dialect))
                    )
        self.table_exists = True


def _replace_unless_done(dialect: str, table: str) -> str:
    """The end of the INSERT: replace what :func:`.states.may_follow` lets go."""
    changed = _COLUMNS[1:]
    ready = ", ".join(f"'{state}'" for state in sorted(states.READY_STATES))
    if dialect in ("sqlite", "postgresql"):
        assignments = ", ".join(f"{column} = excluded.{column}" for column in changed)
        return (
            f"ON CONFLICT (task_id) DO UPDATE SET {assignments} "
            f"WHERE {table}.status NOT IN ({ready}) OR ({table}.status <> '{states.SUCCESS}' "
            f"AND excluded.status IN ({ready}))"
        )
    # status last: the conditions before it look at the stored one
    keep = (
        f"status = '{states.SUCCESS}' OR (status IN ({ready}) AND VALUES(status) NOT IN ({ready}))"
    )
    assignments = ", ".join(
        f"{column} = IF({keep}, {column}, VALUES({column}))" for column in (*changed[1:], "status")
    )
    return f"ON DUPLICATE KEY UPDATE {assignments}"


def result_table(prefix: str = "taskworker_", schema: str | None = None) -> Table:
    """The table of results; its ``metadata`` can be given to Alembic.

    :param prefix: in front of the table's and its index's name.
    :param schema: a PostgreSQL schema.
    """
    exact = String(255).with_variant(
        mysql.VARCHAR(255, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
    )
    blob = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
    text = Text().with_variant(mysql.LONGTEXT(charset="utf8mb4"), "mysql", "mariadb")
    return Table(
        f"{prefix}result",
        MetaData(schema=schema),
        Column("task_id", exact, primary_key=True),
        Column("status", String(50), nullable=False),
        Column("result", blob),
        Column("traceback", text),
        Column("children", blob),
        # epoch seconds, UTC
        Column("date_done", Double),
        Column("group_id", exact),
        Column("parent_id", exact),
        Index(f"{prefix}result_done", "date_done"),
        sqlite_with_rowid=False,
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        mysql_charset="utf8mb4",
        mariadb_charset="utf8mb4",
    )


class _Sleeper:
    """Sleeps until a result may be there: woken by the doorbell, or by itself now and then."""

    def __init__(self, database: Database) -> None:
        self._pause = FIRST_POLL
        # A server's results may come from another host, where no bell rings for us.
        self._longest = LONGEST_SLEEP if database.file is not None else LONGEST_POLL
        self._slot: Slot | None = None
        try:
            self._slot = database.doorbell.slot(RESULTS)
        except OSError:  # nobody can wake us
            self._longest = LONGEST_POLL

    def arm(self) -> None:
        if self._slot is not None:
            self._slot.drain()
            self._slot.arm()

    def sleep(self, left: float | None, at_least: float = 0.0) -> None:
        pause = self._longest
        if self._longest == LONGEST_POLL:
            pause, self._pause = self._pause, min(self._pause * 2, LONGEST_POLL)
        pause = max(pause, at_least)
        if left is not None:
            pause = min(pause, left)
        select.select([self._slot] if self._slot is not None else [], [], [], pause)

    def __enter__(self) -> _Sleeper:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._slot is not None:
            self._slot.close()
