"""MariaDB 10.6 and later, MySQL 8, with PyMySQL or mysqlclient."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ....exceptions import MessageTooLargeError
from ..errors import DatabaseUnavailableError, DatabaseUnusableError, DeadlockError
from .base import Dialect, Encoded, Peer, Row

if TYPE_CHECKING:
    from ..connection import HeldConnection
    from ..engine import Database
    from ..options import Options

_DEADLOCK = (1213, 1020)
_LOCK_TIMEOUT = 1205
_LOST = (2006, 2013, 2014, 2055, 1053, 1927, 4031, 0)
_DISK_FULL = (1021, 1114)
_READ_ONLY = (1290, 1792, 1836)
#: The flag of a connection that takes several statements at once.
_MULTI_STATEMENTS = 1 << 16
_MISSING_TABLE = 1146
_DUPLICATE_INDEX = 1061
#: Bytes that take two in a statement.
_ESCAPED = (b"\0", b"\n", b"\r", b"\x1a", b'"', b"'", b"\\")
#: How many candidates a claim looks at for each message it wants.
_AHEAD = 4
#: The most candidates a claim looks at when others have locked the first ones.
_WINDOW = 512


class MySQLDialect(Dialect):
    name: ClassVar[str] = "mysql"
    remote_poll: ClassVar[float | None] = 0.2
    # MariaDB turns EXISTS into a join that first collects the whole backlog; a LIMIT forbids it.
    has_ready: ClassVar[str] = (
        "(SELECT 1 FROM {message} m WHERE m.queue = q.id AND m.owner = 0 LIMIT 1) IS NOT NULL"
    )

    def __init__(self, url: Any, names: Any) -> None:
        super().__init__(url, names)
        #: The longest statement the server takes, in bytes; 0 before the first connection.
        self._packet = 0
        self._is_pymysql = url.get_driver_name() == "pymysql"
        # Candidates are read from a snapshot and then locked by primary key: a locking scan
        # of the index would walk over every deleted entry that is not purged yet. A short
        # table would be read as a whole, in its own order, were the index not forced.
        self._select_ready = self.sql(
            "SELECT m.id, m.queue, m.prio, m.attempts, m.meta, m.body FROM "
            "(SELECT id FROM {message} WHERE queue = ? AND owner = 0 ORDER BY prio, id LIMIT ?) c "
            "STRAIGHT_JOIN {message} m FORCE INDEX (PRIMARY) ON m.id = c.id "
            "WHERE m.owner = 0 LIMIT ? "
            "FOR UPDATE SKIP LOCKED"
        )
        # With queue 0, see delete_queue_messages: what was in somebody's hands is not his for ever.
        self._all_queues = self.sql("(SELECT id FROM {queue} UNION ALL SELECT 0) q")
        self._count_candidates = self.sql(
            "SELECT count(*) FROM (SELECT 1 FROM {message} WHERE queue = ? AND owner = 0 LIMIT ?) c"
        )
        # Only delayed messages have a due time. min(due) would read all of them.
        self.next_due = self.sql(
            "SELECT (SELECT due FROM {message} WHERE due IS NOT NULL AND owner = -1 "
            "ORDER BY due LIMIT 1)"
        )
        self.insert_version = self.sql("INSERT IGNORE INTO {meta} (name, value) VALUES (?, ?)")
        self.insert_revoked = self.sql("INSERT IGNORE INTO {revoked} (entry, until) VALUES (?, ?)")
        self.insert_queue_sql = self.sql("INSERT IGNORE INTO {queue} (name, used) VALUES (?, ?)")
        # PyMySQL sends many rows at once only if VALUES holds nothing but placeholders.
        self._insert_plain = self.sql(
            "INSERT INTO {message} (queue, prio, owner, due, meta, body) VALUES (?, ?, ?, ?, ?, ?)"
        )

    # -- connections ----------------------------------------------------------------------

    def connect_args(self, options: Options) -> dict[str, Any]:
        connecting = max(1, math.ceil(options.connect_timeout))
        self._patience = options.busy_timeout + options.answer_timeout
        return {
            "connect_timeout": connecting,
            # In PyMySQL it is the limit for the greeting, too: prepare() raises it.
            "read_timeout": connecting if self._is_pymysql else math.ceil(self._patience),
            "write_timeout": math.ceil(self._patience),
            "charset": "utf8mb4",
            "client_flag": _MULTI_STATEMENTS,
        }

    def prepare(self, raw: Any, durable: bool, busy_timeout: float) -> None:
        if self._is_pymysql:
            raw._read_timeout = self._patience  # it has no public way
        raw.autocommit(True)
        with raw.cursor() as cursor:
            # Under REPEATABLE READ, updates of ranges lock gaps against every publisher.
            cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
            cursor.execute("SELECT @@max_allowed_packet")
            self._packet = int(cursor.fetchone()[0])
            cursor.execute(
                f"SET SESSION innodb_lock_wait_timeout = {max(1, math.ceil(busy_timeout))}"
            )

    # -- errors ---------------------------------------------------------------------------

    def is_busy(self, exc: Exception) -> bool:
        return _code(exc) in _DEADLOCK

    def may_wait(self, connection: HeldConnection) -> bool:
        return not connection.in_transaction

    def is_lost(self, raw: Any, exc: Exception) -> bool:
        return _code(exc) in _LOST

    def translate(self, exc: Exception, label: str, waited: float) -> Exception:
        code = _code(exc)
        text = str(exc.args[1]) if len(exc.args) > 1 else str(exc)
        if code in _DEADLOCK:
            return DeadlockError(f"{label}: {text}")
        if code == _LOCK_TIMEOUT:
            return DatabaseUnavailableError(
                f"{label}: rows of the queue were locked by another session for {waited:g} s"
            )
        if code in _DISK_FULL:
            return DatabaseUnavailableError(f"{label}: the server's disk is full ({text})")
        if code in _READ_ONLY:
            return DatabaseUnusableError(f"{label} cannot be written: {text}")
        return super().translate(exc, label, waited)

    # -- tables ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def schema_lock(self, connection: HeldConnection) -> Iterator[None]:
        # Locks are the server's, names of tables the database's.
        scope = f"{self.url.database}.{self.names.meta}"
        name = "taskworker-schema-" + hashlib.sha256(scope.encode()).hexdigest()[:32]
        if connection.execute("SELECT GET_LOCK(%s, 20)", (name,)).fetchone()[0] != 1:
            raise DatabaseUnavailableError(
                f"{self.url.render_as_string()}: another process creates the tables and does "
                "not finish"
            )
        try:
            yield
        finally:
            connection.execute("SELECT RELEASE_LOCK(%s)", (name,)).fetchall()

    def create_index(self, connection: HeldConnection, ddl: str) -> None:
        # MySQL knows no IF NOT EXISTS here.
        try:
            connection.execute(ddl.replace("IF NOT EXISTS ", ""))
        except (DatabaseUnavailableError, DatabaseUnusableError) as exc:
            if exc.__cause__ is None or _code(exc.__cause__) != _DUPLICATE_INDEX:
                raise

    def check_size(self, row: Encoded) -> None:
        # The server ends the connection in the middle of a statement that is too long, so the
        # sender would see nothing but a lost connection, again and again.
        size = 2 * (len(row.body) + len(row.meta)) + 1024
        if not self._packet or size <= self._packet:
            return
        escaped = sum(row.body.count(byte) for byte in _ESCAPED)
        size = len(row.body) + escaped + 2 * len(row.meta) + 1024
        if size > self._packet:
            raise MessageTooLargeError(
                f"a message of {len(row.body)} bytes needs a statement of {size} bytes; the "
                f"server's max_allowed_packet is {self._packet}. Store the data elsewhere and "
                "send a reference, or raise that setting of the server."
            )

    def is_missing_table(self, exc: BaseException) -> bool:
        return _code(exc) == _MISSING_TABLE

    # -- messages -------------------------------------------------------------------------

    def select_ready(self, connection: HeldConnection, queue: int, limit: int) -> list[Any]:
        cursor = connection.execute(self._select_ready, (queue, limit * _AHEAD, limit))
        return self._in_order(connection, queue, limit, cursor.fetchall())

    def _in_order(
        self, connection: HeldConnection, queue: int, limit: int, found: Sequence[Any]
    ) -> list[Any]:
        """The rows of a claim, sorted; a wider look if others have locked all the first."""
        window = limit * _AHEAD
        while not found and window < _WINDOW:
            seen = connection.execute(self._count_candidates, (queue, window)).fetchone()[0]
            if seen < window:
                break  # there are no more that others have not locked
            window = min(window * 2, _WINDOW)
            found = connection.execute(self._select_ready, (queue, window, limit)).fetchall()
        return sorted(found, key=lambda row: (row[2], row[0]))

    def claim_with_acks(
        self,
        connection: HeldConnection,
        owner: int,
        queue: int,
        limit: int,
        acked_owner: int,
        acked: Sequence[int],
    ) -> tuple[list[Row], set[int]] | None:
        table = self.names.message
        begin = "BEGIN; "
        if acked:
            begin += f"DELETE FROM {table} WHERE owner = {acked_owner:d} "
            begin += f"AND id IN ({self.ids(acked)}); "

        def work() -> list[Any] | None:
            connection.in_transaction = True
            done = connection.script(begin + self._select_ready, (queue, limit * _AHEAD, limit))
            if acked and done[1].rowcount != len(acked):
                connection.rollback()
                return None  # somebody took messages away: settle one by one
            rows = self._in_order(connection, queue, limit, done[-1].rows)
            commit = "COMMIT"
            if rows:
                ids = self.ids(row[0] for row in rows)
                commit = (
                    f"UPDATE {table} SET owner = {owner:d}, attempts = attempts + 1 "
                    f"WHERE id IN ({ids}); COMMIT"
                )
            connection.script(commit)
            connection.in_transaction = False
            return rows

        rows = connection.retried(work)
        return None if rows is None else (_delivered(rows), set(acked))

    def owned_by(self, connection: HeldConnection, owner: int) -> list[int]:
        cursor = connection.execute(
            f"SELECT m.id FROM {self._all_queues} STRAIGHT_JOIN {self.names.message} m "
            f"ON m.queue = q.id AND m.owner = {owner:d}"
        )
        return [row[0] for row in cursor.fetchall()]

    def orphans(self, connection: HeldConnection) -> list[tuple[int, int]]:
        cursor = connection.execute(
            f"SELECT m.id, m.owner FROM {self._all_queues} "
            f"STRAIGHT_JOIN {self.names.message} m ON m.queue = q.id AND m.owner > 0 "
            f"WHERE NOT EXISTS (SELECT 1 FROM {self.names.consumer} c WHERE c.id = m.owner) "
            "LIMIT 1000"
        )
        return [(row[0], row[1]) for row in cursor.fetchall()]

    def insert_binding(
        self, connection: HeldConnection, exchange: str, rkey: str, queue: int, kind: str
    ) -> None:
        connection.execute(
            self.sql(
                "INSERT IGNORE INTO {binding} (exchange, rkey, queue, type) VALUES (?, ?, ?, ?)"
            ),
            (exchange, rkey, queue, kind),
        )

    def insert_messages(
        self, connection: HeldConnection, rows: Sequence[tuple[int, Encoded]]
    ) -> None:
        if rows:
            # This form the driver turns into INSERTs of many rows.
            connection.executemany(self._insert_plain, [(queue, *row) for queue, row in rows])

    # -- life signs -----------------------------------------------------------------------

    def hold_lock(self, database: Database, connection: HeldConnection, consumer: int) -> bool:
        cursor = connection.execute("SELECT GET_LOCK(%s, 0)", (f"taskworker:{consumer:d}",))
        return bool(cursor.fetchone()[0] == 1)

    def drop_lock(self, database: Database, connection: HeldConnection, consumer: int) -> None:
        connection.execute("SELECT RELEASE_LOCK(%s)", (f"taskworker:{consumer:d}",)).fetchall()

    def peers(self, database: Database, connection: HeldConnection) -> list[Peer]:
        cursor = connection.execute(
            self.sql("SELECT id, seen, IS_FREE_LOCK(CONCAT('taskworker:', id)) FROM {consumer}")
        )
        return [Peer(id, seen, free != 1) for id, seen, free in cursor.fetchall()]

    def socket_of(self, raw: Any) -> int | None:
        opened = getattr(raw, "_sock", None)  # PyMySQL has no public way
        return None if opened is None else int(opened.fileno())

    def database_time(self, connection: HeldConnection) -> float | None:
        # UNIX_TIMESTAMP(NOW(6)) would be an hour off for an hour when summer time ends.
        cursor = connection.execute(
            "SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6))"
        )
        return float(cursor.fetchone()[0]) / 1e6


def _delivered(rows: Sequence[Any]) -> list[Row]:
    """As claimed rows are now: this delivery counts."""
    return [
        Row(id, queue, prio, attempts + 1, meta, body)
        for id, queue, prio, attempts, meta, body in rows
    ]


def _code(exc: BaseException) -> int:
    code = exc.args[0] if exc.args else None
    return code if isinstance(code, int) else -1
