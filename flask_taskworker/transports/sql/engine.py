"""The databases this process uses, one object each.

Fork: a child starts with an empty registry. It opens its own connections and neither uses
nor closes the ones it inherited, because both would talk on its parent's sockets.

Threads: a :class:`Database` may be used from any thread; a connection out of
:meth:`Database.connect` belongs to one thread at a time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import create_engine
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DBAPIError, NoSuchModuleError
from sqlalchemy.pool import NullPool

from ... import clock
from ...exceptions import ConfigurationError
from . import creation
from .connection import HeldConnection
from .dialects import Dialect, TableNames, dialect_for
from .doorbell import MESSAGES, Doorbell, path_for
from .errors import DatabaseUnavailableError, DatabaseUnusableError
from .forking import at_fork, gate
from .janitor import Janitor
from .lease import LeaseKeeper
from .locks import ProcessLocks
from .options import Options
from .schema import Tables, build_tables
from .url import file_of, identity, parse

if TYPE_CHECKING:
    from collections.abc import Hashable

log = logging.getLogger(__name__)

_databases: dict[Hashable, Database] = {}
_lock = threading.Lock()
#: The liveness locks of SQLite files. One file may be several databases: by another prefix,
#: another option or another spelling of its URL.
_process_locks: dict[str, ProcessLocks] = {}
#: What a forked child inherited: kept for ever, so that no destructor closes it.
_inherited: list[Any] = []


def database_for(url: str, options: Options | Mapping[str, Any] | None = None) -> Database:
    """The object for a database; always the same one within this process.

    :param url: a SQLAlchemy URL, with or without ``taskworker+`` in front.
    :param options: the transport options. Prefix, schema and whether to ring tell
        databases apart; of the rest, those of the first caller count.
    :raises ConfigurationError: if the URL or an option is impossible.
    """
    if not isinstance(options, Options):
        options = Options.read(options or {})
    parsed = parse(url)
    key = (
        os.getpid(), identity(parsed), options.table_prefix, options.schema, options.doorbell,
        options.notify,
    )  # fmt: skip
    found = _databases.get(key)
    if found is None:
        # SQLAlchemy imports a database's module when it is first named: a fork in the middle
        # would leave the lock of that import taken for ever in the child.
        with gate.inside(), _lock:
            found = _databases.get(key)
            if found is None:
                found = _databases[key] = Database(parsed, options)
    return found


class Database:
    """A database with the transport's tables in it.

    :ivar engine: SQLAlchemy's engine, without a pool.
    :ivar dialect: statements and habits.
    :ivar doorbell: ring it after a commit that somebody may wait for.
    :ivar label: names the database in messages; holds no password.
    :ivar inherited: True in a forked child: take a new one from :func:`database_for`.
    """

    def __init__(self, url: URL, options: Options) -> None:
        self.url = url
        self.options = options
        self.inherited = False
        self.tables: Tables = build_tables(options.table_prefix, options.schema)
        self.file = file_of(url)
        self.label = str(self.file) if self.file else url.render_as_string(hide_password=True)
        self.engine: Engine = self._create_engine()
        quote = self.engine.dialect.identifier_preparer.format_table
        self.dialect: Dialect = dialect_for(
            url,
            TableNames(*(quote(table) for table in self.tables[1:])),
            options.notify,
        )
        driver: Any = self.engine.dialect.dbapi
        self.dialect.driver_errors = (driver.Error,)
        #: Ids of queues by name. May be stale: every use verifies the id.
        self.queue_ids: dict[str, int] = {}
        self.doorbell = Doorbell(self._bell_path() if options.doorbell else None)
        self.keeper = LeaseKeeper(self)
        self.janitor = Janitor(self)
        self._connections: weakref.WeakSet[HeldConnection] = weakref.WeakSet()
        self._ready = False
        self._setup = threading.Lock()
        # The database's clock against this process's monotonic one.
        self._clock_offset: float | None = None

    def connect(self, durable: bool = False, busy_timeout: float | None = None) -> HeldConnection:
        """Open a connection; the tables exist when it is there.

        :param durable: whether its commits wait for the disk.
        :param busy_timeout: seconds a statement waits for a lock; None: as in the options.
        :raises DatabaseUnavailableError: if the server does not answer, or the like.
        :raises DatabaseUnusableError: if waiting does not help.
        """
        try:
            connection = self._open(durable, busy_timeout)
        except DatabaseUnavailableError:
            self.janitor.lost_touch()
            raise
        if not self._ready:
            try:
                with self._setup:
                    if not self._ready:
                        with connection.lasting():
                            creation.ensure_tables(self, connection)
                        self._ready = True
            except BaseException:
                connection.close()
                raise
        return connection

    def now(self) -> float:
        """The time by which delayed messages and leases are judged, in epoch seconds.

        A server's own clock where there is one; then setting the clock of this host
        changes nothing.
        """
        if self._clock_offset is None:
            return clock.wall()
        return clock.monotonic() + self._clock_offset

    def wake(self, connection: HeldConnection) -> None:
        """Wake sleeping consumers, after a commit that made messages ready.

        Not for new messages: the statement that stores them notifies by itself.
        """
        self.doorbell.ring(MESSAGES)
        # What is committed is committed; who is not woken looks by himself before long.
        with contextlib.suppress(DatabaseUnavailableError, DatabaseUnusableError):
            self.dialect.notify(connection)

    def read_clock(self, connection: HeldConnection) -> None:
        """Compare the clocks once more."""
        before = clock.monotonic()
        told = self.dialect.database_time(connection)
        if told is not None:
            self._clock_offset = told - (before + clock.monotonic()) / 2

    @property
    def process_locks(self) -> ProcessLocks:
        """The liveness locks of a SQLite file."""
        prefix = self.options.table_prefix.rstrip("_") or "_"
        path = f"{self.file}-{prefix}-live"
        found = _process_locks.get(path)
        if found is None:
            found = _process_locks.setdefault(path, ProcessLocks(path))
        return found

    def dispose(self) -> None:
        """Close what this process holds. The next use opens everything again."""
        with _lock:
            for key, database in list(_databases.items()):
                if database is self:
                    del _databases[key]
        self.keeper.close()
        for connection in list(self._connections):
            connection.close()
        self.doorbell.close()
        if self.file is not None:
            self.process_locks.close()
        self.engine.dispose()

    def _open(self, durable: bool, busy_timeout: float | None) -> HeldConnection:
        wait = self.options.busy_timeout if busy_timeout is None else busy_timeout
        dialect = self.dialect
        raw: Any = None
        try:
            with gate.inside():
                fairy = self.engine.raw_connection()
                raw = fairy.driver_connection
                fairy.detach()
                dialect.prepare(raw, durable, wait)
        except DBAPIError as exc:
            raise dialect.translate(_cause(exc), self.label, wait) from exc.orig
        except dialect.driver_errors as exc:
            _close_quietly(raw)
            raise dialect.translate(exc, self.label, wait) from exc
        except BaseException:
            _close_quietly(raw)
            raise
        connection = HeldConnection(self, raw, durable, wait)
        self._connections.add(connection)
        if self._clock_offset is None:
            self.read_clock(connection)
        return connection

    def _create_engine(self) -> Engine:
        # dialect_for() needs quoted names, quoting needs an engine: arguments come later.
        from sqlalchemy import event

        try:
            engine = create_engine(self.url, poolclass=NullPool)
        except NoSuchModuleError as exc:
            raise ConfigurationError(f"{self.label}: {exc}") from None
        except ModuleNotFoundError as exc:
            raise ConfigurationError(_missing_driver(self.url, exc)) from None

        @event.listens_for(engine, "do_connect")
        def add_arguments(dialect: Any, record: Any, args: Any, kwargs: dict[str, Any]) -> None:
            for name, value in self.dialect.connect_args(self.options).items():
                if name == "client_flag":  # bits, of which SQLAlchemy sets some
                    kwargs[name] = kwargs.get(name, 0) | value
                else:
                    kwargs.setdefault(name, value)

        return engine

    def _bell_path(self) -> str:
        # Scheme, driver and user may differ between processes that share a database.
        server = f"{self.url.host}:{self.url.port}/{self.url.database}/{self.options.schema}"
        return path_for(server, self.options.table_prefix, self.file)


def _missing_driver(url: URL, exc: ModuleNotFoundError) -> str:
    extra = {"postgresql": "postgresql"}.get(url.get_backend_name(), "mysql")
    return (
        f"{url.drivername} needs the module {exc.name!r}, which is not installed: "
        f"pip install 'flask-taskworker[{extra}]'"
    )


def _cause(exc: DBAPIError) -> Exception:
    return exc.orig if isinstance(exc.orig, Exception) else exc


def _close_quietly(raw: Any) -> None:
    if raw is not None:
        try:
            raw.close()
        except Exception:  # it was broken already
            log.debug("closing a failed connection", exc_info=True)


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it
    for database in _databases.values():
        database.inherited = True
        database.keeper.abandon()
        for connection in list(database._connections):
            connection.abandon()
            _keep_for_ever(connection.raw)
        _inherited.append(database)
    _databases.clear()
    _process_locks.clear()  # a child inherits none of them


def _keep_for_ever(raw: Any) -> None:
    """Take a reference that is never given back.

    A list would do until the interpreter exits; then it runs the destructors, and some
    drivers say goodbye to the server in theirs.
    """
    _inherited.append(raw)
    try:
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(raw))
    except (ImportError, AttributeError):  # PyPy runs no destructors at exit
        pass


at_fork(_after_fork_in_child)
