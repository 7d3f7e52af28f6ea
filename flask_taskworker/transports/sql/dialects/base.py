"""The statements every database understands, and the hooks where they differ.

A statement is written once with ``?`` and ``{table}`` and turned into the driver's own
form when the dialect is made. Ids that this program generated are written into the text
of ``IN (...)`` lists; everything else is a parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from sqlalchemy import Table
from sqlalchemy.engine import URL

from ..errors import DatabaseUnavailableError, DatabaseUnusableError

if TYPE_CHECKING:
    from ..connection import HeldConnection
    from ..engine import Database
    from ..options import Options


#: Classes of PEP 249 for errors that another try does not mend.
_FAULTS = {"ProgrammingError", "DataError", "IntegrityError", "NotSupportedError"}


class TableNames(NamedTuple):
    """The names of the tables, quoted for use in a statement."""

    queue: str
    binding: str
    consumer: str
    message: str
    meta: str
    revoked: str


class Row(NamedTuple):
    """A claimed message; ``attempts`` counts this delivery."""

    id: int
    queue: int
    prio: int
    attempts: int
    meta: str
    body: bytes


class Encoded(NamedTuple):
    """A message as it is stored, in the order of the INSERT's parameters."""

    prio: int
    owner: int
    due: float | None
    meta: str
    body: bytes


class Peer(NamedTuple):
    """A row of the consumer table; ``alive`` is None where no lock can tell."""

    id: int
    seen: float
    alive: bool | None


class Dialect:
    """Statements and habits of one kind of database."""

    name: ClassVar[str]
    #: The driver's placeholder.
    marker: ClassVar[str] = "%s"
    begin: str = "BEGIN"
    #: False where one statement claims; True where SELECT and UPDATE need a transaction.
    claims_in_transaction: ClassVar[bool] = True
    #: Whether looking before each claim is worth it: it saves an empty write transaction, but
    #: costs a round trip.
    looks_first: ClassVar[bool] = False
    #: Whether a free liveness lock proves at once that its holder is dead.
    free_lock_is_proof: ClassVar[bool] = False
    #: Whether the database itself can wake sleepers, on whichever host they are.
    notifies: bool = False
    #: How often an idle consumer that only this host can wake looks for messages of other
    #: hosts, in seconds; None if nobody on another host can publish.
    remote_poll: ClassVar[float | None] = None

    #: What the driver raises.
    driver_errors: tuple[type[Exception], ...] = ()

    def __init__(self, url: URL, names: TableNames) -> None:
        self.url = url
        self.names = names
        self._ready_queues: dict[int, str] = {}
        sql = self.sql
        into = "INSERT INTO {message} (queue, prio, owner, attempts, due, meta, body) "
        values = self.insert_values
        #: Publishes only if the queue still exists: a cached id may be stale.
        self.insert_message = sql(into + f"SELECT id, {values} FROM {{queue}} WHERE id = ?")
        routed = into + (
            f"SELECT q.id, {values} FROM {{queue}} q WHERE q.id IN "
            "(SELECT b.queue FROM {binding} b WHERE b.exchange = ?"
        )
        self.insert_fanout = sql(routed + ")")
        self.insert_direct = sql(routed + " AND b.rkey = ?)")
        #: For a transaction that may last.
        self.insert_message_within = self.insert_message
        self.insert_head = sql(into) + "VALUES "
        self._insert_plain = self.insert_head + sql(f"(?, {values})")
        self.select_queue = sql("SELECT id FROM {queue} WHERE name = ?")
        self.touch_queue = sql("UPDATE {queue} SET used = ? WHERE id = ?")
        self.update_queue = sql("UPDATE {queue} SET used = ?, expires = ? WHERE id = ?")
        self.expired_queues = sql(
            "SELECT id, expires FROM {queue} WHERE expires IS NOT NULL AND used + expires < ?"
        )
        self.count_ready = sql(
            "SELECT count(*) FROM (SELECT 1 FROM {message} WHERE queue = ? AND owner = 0 LIMIT ?) c"
        )
        self.bindings_of = sql(
            "SELECT b.type, b.rkey, q.id FROM {binding} b JOIN {queue} q ON q.id = b.queue "
            "WHERE b.exchange = ?"
        )
        self.next_due = sql("SELECT min(due) FROM {message} WHERE owner = -1")
        self.select_due = sql(
            "SELECT id FROM {message} WHERE owner = -1 AND due <= ? ORDER BY due LIMIT 1000"
        )
        self.insert_queue_sql = sql(
            "INSERT INTO {queue} (name, used) VALUES (?, ?) ON CONFLICT DO NOTHING"
        )
        self.insert_version = sql(
            "INSERT INTO {meta} (name, value) VALUES (?, ?) ON CONFLICT DO NOTHING"
        )
        self.insert_revoked = sql(
            "INSERT INTO {revoked} (entry, until) VALUES (?, ?) ON CONFLICT DO NOTHING"
        )
        self.insert_consumer = sql(
            "INSERT INTO {consumer} (id, seen, host, pid) VALUES (?, ?, ?, ?)"
        )
        self.delete_consumer = sql("DELETE FROM {consumer} WHERE id = ?")
        self.reap_consumer = sql("DELETE FROM {consumer} WHERE id = ? AND seen = ?")

    #: Whether queue ``q`` holds a ready message.
    has_ready: ClassVar[str] = (
        "EXISTS (SELECT 1 FROM {message} m WHERE m.queue = q.id AND m.owner = 0)"
    )
    #: The values of an INSERT ... SELECT, in the order of :class:`Encoded`.
    insert_values: ClassVar[str] = "?, ?, 0, ?, ?, ?"

    def sql(self, text: str) -> str:
        """A statement in the driver's form; ``{message}`` and the like are tables."""
        return text.format(**self.names._asdict()).replace("?", self.marker)

    # -- connections ----------------------------------------------------------------------

    def connect_args(self, options: Options) -> dict[str, Any]:
        """Arguments for the driver's ``connect``."""
        return {}

    def prepare(self, raw: Any, durable: bool, busy_timeout: float) -> None:
        """Set a new connection up: autocommit, durability, waits."""
        raise NotImplementedError

    def set_durable(self, connection: HeldConnection, durable: bool) -> None:
        """Change whether commits wait for the disk."""

    def executemany(self, cursor: Any, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        cursor.executemany(sql, rows)
        return int(cursor.rowcount)

    # -- errors ---------------------------------------------------------------------------

    def is_busy(self, exc: Exception) -> bool:
        """Whether another connection's lock was in the way."""
        return False

    def may_wait(self, connection: HeldConnection) -> bool:
        """Whether the failed statement may simply be run again."""
        return False

    def is_lost(self, raw: Any, exc: Exception) -> bool:
        """Whether the connection is gone."""
        return False

    def is_no_transaction(self, exc: Exception) -> bool:
        """Whether a ROLLBACK failed because there was nothing to undo."""
        return False

    def translate(self, exc: Exception, label: str, waited: float) -> Exception:
        """The error to raise in place of the driver's."""
        kinds = {kind.__name__ for kind in type(exc).__mro__}
        if kinds & _FAULTS:
            return DatabaseUnusableError(f"{label}: {exc}")
        return DatabaseUnavailableError(f"{label}: {exc}")

    # -- tables ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def schema_lock(self, connection: HeldConnection) -> Any:
        """Keep other processes from creating tables at the same time."""
        raise NotImplementedError
        yield

    def after_create(self, connection: HeldConnection, table: Table) -> None:
        """Settings of a table that CREATE TABLE could not carry."""

    def create_index(self, connection: HeldConnection, ddl: str) -> None:
        """Create an index unless it exists."""
        connection.execute(ddl)

    def check_size(self, row: Encoded) -> None:
        """Refuse a message that the server would not accept.

        :raises MessageTooLargeError: naming the server's setting.
        """

    def is_missing_table(self, exc: BaseException) -> bool:
        """Whether a statement failed because its table does not exist."""
        raise NotImplementedError

    # -- messages -------------------------------------------------------------------------

    def ids(self, ids: Iterable[int]) -> str:
        """The inside of ``IN (...)``."""
        return ",".join(map(str, ids))

    def claim(self, connection: HeldConnection, owner: int, queue: int, limit: int) -> list[Row]:
        """Make up to ``limit`` ready messages of a queue ours, most urgent and oldest first."""
        rows = self.select_ready(connection, queue, limit)
        if rows:
            connection.execute(
                f"UPDATE {self.names.message} SET owner = {owner:d}, attempts = attempts + 1 "
                f"WHERE id IN ({self.ids(row[0] for row in rows)})"
            )
        return [
            Row(id, queue, prio, _counted(attempts), meta, body)
            for id, queue, prio, attempts, meta, body in rows
        ]

    def claim_with_acks(
        self,
        connection: HeldConnection,
        owner: int,
        queue: int,
        limit: int,
        acked_owner: int,
        acked: Sequence[int],
    ) -> tuple[list[Row], set[int]] | None:
        """Acknowledge and claim in as few round trips as can be, in one transaction.

        :returns: the claimed rows and the ids that were acknowledged; None if the database
            has no shorter way, or this time it does not apply.
        """
        return None

    def take(self, connection: HeldConnection, queue: int, limit: int) -> list[Row]:
        """Remove and return up to ``limit`` ready messages of a queue."""
        rows = self.select_ready(connection, queue, limit)
        if rows:
            self.delete_ids(connection, [row[0] for row in rows])
        return [
            Row(id, queue, prio, _counted(attempts), meta, body)
            for id, queue, prio, attempts, meta, body in rows
        ]

    def select_ready(self, connection: HeldConnection, queue: int, limit: int) -> list[Any]:
        """Ready messages, locked against other consumers."""
        raise NotImplementedError

    def delete_ids(self, connection: HeldConnection, ids: Sequence[int]) -> None:
        connection.execute(f"DELETE FROM {self.names.message} WHERE id IN ({self.ids(ids)})")

    def delete_owned(self, connection: HeldConnection, owner: int, ids: Sequence[int]) -> int:
        """Delete what is still ours.

        :returns: how many messages that were.
        """
        return int(
            connection.execute(
                f"DELETE FROM {self.names.message} "
                f"WHERE owner = {owner:d} AND id IN ({self.ids(ids)})"
            ).rowcount
        )

    def select_owned(self, connection: HeldConnection, owner: int, ids: Sequence[int]) -> set[int]:
        """Which of some messages are still ours; locked until the transaction ends."""
        cursor = connection.execute(
            f"SELECT id FROM {self.names.message} "
            f"WHERE owner = {owner:d} AND id IN ({self.ids(ids)}){self.for_update}"
        )
        return {row[0] for row in cursor.fetchall()}

    #: Appended to a SELECT whose rows are changed next.
    for_update: ClassVar[str] = " FOR UPDATE"

    def ready_queues(
        self, connection: HeldConnection, names: Sequence[str]
    ) -> list[tuple[int, str]]:
        """Which of some queues exist, hold a ready message and are not paused."""
        sql = self._ready_queues.get(len(names))
        if sql is None:
            places = ",".join("?" * len(names))
            sql = self._ready_queues[len(names)] = self.sql(
                f"SELECT q.id, q.name FROM {{queue}} q WHERE q.name IN ({places}) "
                f"AND q.paused = 0 AND {self.has_ready}"
            )
        return [(row[0], row[1]) for row in connection.execute(sql, names).fetchall()]

    def insert_messages(
        self, connection: HeldConnection, rows: Sequence[tuple[int, Encoded]]
    ) -> None:
        """Store messages in queues that exist, within a transaction."""
        if rows:
            connection.executemany(self._insert_plain, [(queue, *row) for queue, row in rows])

    def owned_by(self, connection: HeldConnection, owner: int) -> list[int]:
        """The messages of a consumer."""
        # SQLite uses the index of owners only if its condition is there word for word.
        cursor = connection.execute(
            f"SELECT id FROM {self.names.message} WHERE owner > 0 AND owner = {owner:d}"
        )
        return [row[0] for row in cursor.fetchall()]

    def orphans(self, connection: HeldConnection) -> list[tuple[int, int]]:
        """Messages (id, owner) of consumers that are not registered."""
        cursor = connection.execute(
            f"SELECT m.id, m.owner FROM {self.names.message} m WHERE m.owner > 0 AND NOT EXISTS "
            f"(SELECT 1 FROM {self.names.consumer} c WHERE c.id = m.owner) LIMIT 1000"
        )
        return [(row[0], row[1]) for row in cursor.fetchall()]

    def insert_queue(self, connection: HeldConnection, name: str, now: float) -> None:
        """Create a queue unless it exists."""
        connection.execute(self.insert_queue_sql, (name, now))

    def insert_binding(
        self, connection: HeldConnection, exchange: str, rkey: str, queue: int, kind: str
    ) -> None:
        """Create a binding unless it exists."""
        connection.execute(
            self.sql(
                "INSERT INTO {binding} (exchange, rkey, queue, type) VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO NOTHING"
            ),
            (exchange, rkey, queue, kind),
        )

    def delete_queue_messages(self, connection: HeldConnection, queue: int) -> None:
        for state in ("owner = 0", "owner = -1", "owner = -2"):
            connection.execute(
                self.sql(f"DELETE FROM {{message}} WHERE {state} AND queue = ?"), (queue,)
            )
        # What somebody holds is his to delete: SQLite gives the id of a deleted row to the
        # next one, and a late settlement would hit it. Queue 0 is nobody's.
        connection.execute(
            self.sql("UPDATE {message} SET queue = 0 WHERE owner > 0 AND queue = ?"), (queue,)
        )

    def delete_left_over(self, connection: HeldConnection) -> None:
        """Delete what came back from consumers after its queue was deleted."""
        for state in ("owner = 0", "owner = -2"):
            connection.execute(self.sql(f"DELETE FROM {{message}} WHERE {state} AND queue = 0"))

    # -- waking sleepers on other hosts ---------------------------------------------------

    def listen(
        self, connection: HeldConnection, witness: HeldConnection, token: str, broadcasts: bool
    ) -> None:
        """Make ``connection`` hear of publishes, and have ``witness`` send it a token.

        :param broadcasts: of those to an exchange, and of no others.
        """
        raise NotImplementedError

    def arm(self, connection: HeldConnection) -> None:
        """Ask to be notified. All that was published without notice is visible after this."""
        raise NotImplementedError

    def disarm(self, connection: HeldConnection) -> None:
        """Spare publishers the notifying."""
        raise NotImplementedError

    def notify(self, connection: HeldConnection) -> None:
        """Wake who is armed; after a commit that made messages ready without an INSERT."""

    def notify_broadcast(self, connection: HeldConnection) -> None:
        """Wake who listens to broadcasts, after the commit of one."""

    def heard(self, raw: Any) -> list[str]:
        """What came in for a listening connection, without waiting."""
        raise NotImplementedError

    # -- life signs -----------------------------------------------------------------------

    def hold_lock(self, database: Database, connection: HeldConnection, consumer: int) -> bool:
        """Take the lock that ends with this process.

        :returns: whether there is such a lock.
        """
        raise NotImplementedError

    def drop_lock(self, database: Database, connection: HeldConnection, consumer: int) -> None:
        """Give the lock back."""
        raise NotImplementedError

    def peers(self, database: Database, connection: HeldConnection) -> list[Peer]:
        """All consumers, and whether their locks are held."""
        raise NotImplementedError

    def socket_of(self, raw: Any) -> int | None:
        """The descriptor that becomes readable when the server ends the connection."""
        return None

    def database_time(self, connection: HeldConnection) -> float | None:
        """The server's clock in epoch seconds; None where it is this host's."""
        return None

    def maintain(self, database: Database, connection: HeldConnection) -> None:
        """Housekeeping that is due now and then."""


def _counted(attempts: Any) -> int:
    """One delivery more; SQLite keeps whatever somebody wrote into the column by hand."""
    return attempts + 1 if isinstance(attempts, int) else 1
