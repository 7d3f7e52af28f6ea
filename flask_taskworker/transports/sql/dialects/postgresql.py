"""PostgreSQL, with psycopg 3 or psycopg2: one statement claims."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy import Table

from ..errors import DatabaseUnavailableError, DatabaseUnusableError, DeadlockError
from .base import Dialect, Encoded, Peer, Row

if TYPE_CHECKING:
    from ..connection import HeldConnection
    from ..engine import Database
    from ..options import Options

#: A statistic taken while the table was empty makes the planner sort the whole backlog for
#: each claim, a hundred times slower. The indexes are all these statements need.
_PLANNER = "SET enable_sort = off; SET enable_bitmapscan = off; SET enable_seqscan = off"
#: The second keys of two advisory locks; see _notify_if_armed.
_PUBLISHING, _SLEEPING = 1, 2
_COLUMNS = "id, queue, prio, attempts, meta, body"


class PostgreSQLDialect(Dialect):
    name: ClassVar[str] = "postgresql"
    claims_in_transaction: ClassVar[bool] = False
    remote_poll: ClassVar[float | None] = 0.2
    insert_values: ClassVar[str] = "?::smallint, ?::bigint, 0, ?::float8, ?::text, ?::bytea"
    rows_per_insert: ClassVar[int] = 1000

    def __init__(self, url: Any, names: Any, notify: bool = True) -> None:
        super().__init__(url, names)
        self.notifies = notify
        # Locks and channels are per database; the tables' name tells queues within one apart.
        digest = hashlib.sha256(f"taskworker wake {names.meta}".encode()).digest()
        self._wake_key = int.from_bytes(digest[:4], "big", signed=True)
        self._channel = f"taskworker_{digest[:8].hex()}"
        self._broadcast_channel = f"{self._channel}_all"
        self._notify = _notify_if_armed(self._wake_key, self._channel)
        if notify:
            self._add_notification()
        pick = (
            "ANY(ARRAY(SELECT id FROM {message} WHERE queue = ? AND owner = 0 "
            "ORDER BY prio, id LIMIT ? FOR UPDATE SKIP LOCKED))"
        )
        claim = (
            "UPDATE {message} SET owner = ?, attempts = attempts + 1 "
            f"WHERE id = {pick} RETURNING {_COLUMNS}"
        )
        self._claim = self.sql(claim)
        self._take = self.sql(f"DELETE FROM {{message}} WHERE id = {pick} RETURNING {_COLUMNS}")
        self._claim_with_acks = self.sql(
            "WITH acked AS (DELETE FROM {message} WHERE owner = ? AND id = ANY(?::bigint[]) "
            f"RETURNING id), claimed AS ({claim}) "
            f"SELECT {_COLUMNS} FROM claimed "
            "UNION ALL SELECT id, NULL, NULL, NULL, NULL, NULL FROM acked"
        )
        self._delete_owned = self.sql(
            "DELETE FROM {message} WHERE owner = ? AND id = ANY(?::bigint[])"
        )

    def _add_notification(self) -> None:
        """Let what stores messages wake sleepers, in the same statement."""
        returning = f" RETURNING {self._notify}"
        # The lock that the armed form holds until the commit would keep sleepers from arming.
        self.insert_message_within += f" RETURNING pg_notify('{self._channel}', '')::text"
        self.insert_message += returning
        self.insert_fanout += returning
        self.insert_direct += returning

    # -- connections ----------------------------------------------------------------------

    def connect_args(self, options: Options) -> dict[str, Any]:
        return {
            "connect_timeout": max(2, math.ceil(options.connect_timeout)),
            "keepalives": 1,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            # What is not even received in this time is not going to be.
            "tcp_user_timeout": math.ceil(1000 * (options.busy_timeout + options.answer_timeout)),
            "application_name": "flask-taskworker",
        }

    def prepare(self, raw: Any, durable: bool, busy_timeout: float) -> None:
        raw.rollback()
        raw.autocommit = True
        with raw.cursor() as cursor:
            cursor.execute(
                f"{_PLANNER}; SET client_min_messages = warning; "
                f"SET lock_timeout = {max(1, int(busy_timeout * 1000))}; "
                f"SET synchronous_commit = {'on' if durable else 'off'}"
            )

    def set_durable(self, connection: HeldConnection, durable: bool) -> None:
        connection.execute(f"SET synchronous_commit = {'on' if durable else 'off'}")

    # -- errors ---------------------------------------------------------------------------

    def is_busy(self, exc: Exception) -> bool:
        return _state(exc) in ("40P01", "40001")

    def may_wait(self, connection: HeldConnection) -> bool:
        return not connection.in_transaction

    def is_lost(self, raw: Any, exc: Exception) -> bool:
        return bool(raw.closed) or _state(exc)[:3] == "57P" or _state(exc)[:2] == "08"

    def is_no_transaction(self, exc: Exception) -> bool:
        return False  # only a warning here

    def translate(self, exc: Exception, label: str, waited: float) -> Exception:
        state = _state(exc)
        text = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        if self.is_busy(exc):
            return DeadlockError(f"{label}: {text}")
        if state == "55P03":
            return DatabaseUnavailableError(
                f"{label}: a table of the queue was locked by another session for {waited:g} s"
            )
        if state == "53100":
            return DatabaseUnavailableError(f"{label}: the server's disk is full ({text})")
        if state[:2] in ("42", "22", "23", "XX", "0A"):
            return DatabaseUnusableError(f"{label}: {text}")
        return super().translate(exc, label, waited)

    # -- tables ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def schema_lock(self, connection: HeldConnection) -> Iterator[None]:
        digest = hashlib.sha256(f"taskworker schema {self.names.meta}".encode()).digest()
        connection.begin()
        try:
            connection.execute(
                f"SELECT pg_advisory_xact_lock({int.from_bytes(digest[:8], 'big', signed=True)})"
            )
            yield
            connection.commit()
        except BaseException:
            connection.rollback()
            raise

    def after_create(self, connection: HeldConnection, table: Table) -> None:
        if table.name.endswith("message"):
            # Claims walk over dead index entries; vacuum by rows, not by share.
            connection.execute(
                f"ALTER TABLE {self.names.message} SET "
                "(autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000)"
            )

    def is_missing_table(self, exc: BaseException) -> bool:
        return _state(exc) in ("42P01", "3F000")

    # -- messages -------------------------------------------------------------------------

    def claim(self, connection: HeldConnection, owner: int, queue: int, limit: int) -> list[Row]:
        rows = connection.execute(self._claim, (owner, queue, limit)).fetchall()
        return _ordered(rows)

    def claim_with_acks(
        self,
        connection: HeldConnection,
        owner: int,
        queue: int,
        limit: int,
        acked_owner: int,
        acked: Sequence[int],
    ) -> tuple[list[Row], set[int]] | None:
        if not acked:
            return None
        rows = connection.execute(
            self._claim_with_acks, (acked_owner, list(acked), owner, queue, limit)
        ).fetchall()
        return _ordered([row for row in rows if row[1] is not None]), {
            row[0] for row in rows if row[1] is None
        }

    def take(self, connection: HeldConnection, queue: int, limit: int) -> list[Row]:
        return _ordered(connection.execute(self._take, (queue, limit)).fetchall())

    def delete_owned(self, connection: HeldConnection, owner: int, ids: Sequence[int]) -> int:
        return int(connection.execute(self._delete_owned, (owner, list(ids))).rowcount)

    def insert_messages(
        self, connection: HeldConnection, rows: Sequence[tuple[int, Encoded]]
    ) -> None:
        values = f"(?::bigint, {self.insert_values})".replace("?", self.marker)
        for start in range(0, len(rows), self.rows_per_insert):
            part = rows[start : start + self.rows_per_insert]
            params = [value for queue, row in part for value in (queue, *row)]
            insert = self.insert_head + ",".join([values] * len(part))
            if self.notifies:  # once, not once per row
                insert = f"WITH added AS ({insert} RETURNING 1) SELECT {self._notify} "
                insert += "FROM (SELECT count(*) FROM added) stored"
            connection.execute(insert, params)

    # -- waking sleepers on other hosts ---------------------------------------------------

    def listen(
        self, connection: HeldConnection, witness: HeldConnection, token: str, broadcasts: bool
    ) -> None:
        channel = self._broadcast_channel if broadcasts else self._channel
        connection.execute(f"LISTEN {channel}")
        witness.execute("SELECT pg_notify(%s, %s)", (channel, token))

    def notify_broadcast(self, connection: HeldConnection) -> None:
        if self.notifies:
            connection.execute("SELECT pg_notify(%s, '')", (self._broadcast_channel,))

    def arm(self, connection: HeldConnection) -> None:
        key = self._wake_key
        # CASE keeps the order: whoever looked for sleepers before the first lock was taken
        # holds the second one until its commit.
        connection.execute(
            f"SELECT CASE WHEN pg_advisory_lock_shared({key}, {_SLEEPING})::text = '' THEN "
            f"CASE WHEN pg_advisory_lock({key}, {_PUBLISHING})::text = '' THEN "
            f"pg_advisory_unlock({key}, {_PUBLISHING}) END END"
        )

    def disarm(self, connection: HeldConnection) -> None:
        connection.execute("SELECT pg_advisory_unlock_all()")

    def notify(self, connection: HeldConnection) -> None:
        if self.notifies:
            connection.execute(f"SELECT {self._notify}")

    def heard(self, raw: Any) -> list[str]:
        if hasattr(raw, "pgconn"):  # psycopg 3
            raw.pgconn.consume_input()
            found = []
            while (notification := raw.pgconn.notifies()) is not None:
                found.append(notification.extra.decode())
            return found
        raw.poll()
        found = [notification.payload for notification in raw.notifies]
        raw.notifies.clear()
        return found

    # -- life signs -----------------------------------------------------------------------

    def hold_lock(self, database: Database, connection: HeldConnection, consumer: int) -> bool:
        connection.execute("SELECT pg_advisory_lock(%s)", (consumer,))
        return True

    def drop_lock(self, database: Database, connection: HeldConnection, consumer: int) -> None:
        connection.execute("SELECT pg_advisory_unlock(%s)", (consumer,))

    def peers(self, database: Database, connection: HeldConnection) -> list[Peer]:
        cursor = connection.execute(
            self.sql("SELECT id, seen, pg_try_advisory_xact_lock_shared(id) FROM {consumer}")
        )
        return [Peer(id, seen, not free) for id, seen, free in cursor.fetchall()]

    def socket_of(self, raw: Any) -> int | None:
        try:
            return int(raw.fileno())
        except Exception:  # each driver has its own error for a closed connection
            return None

    def database_time(self, connection: HeldConnection) -> float | None:
        cursor = connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8")
        return float(cursor.fetchone()[0])


def _notify_if_armed(key: int, channel: str) -> str:
    """An expression that notifies only if somebody sleeps: a NOTIFY makes commits queue up.

    A sleeper holds one lock, shared, for as long as it sleeps: ``_SLEEPING``. A publisher sees
    it by trying to take it exclusively, for a microsecond. A sleeper may come between that look
    and the publisher's commit; therefore a publisher holds ``_PUBLISHING``, shared, until its
    commit, and a sleeper that has just taken its own lock waits for that one to be free once.
    So either the publisher sees the sleeper, or the sleeper sees what was published.
    """
    wake = f"pg_notify('{channel}', '')::text"
    return (
        f"CASE WHEN pg_try_advisory_xact_lock_shared({key}, {_PUBLISHING}) THEN "
        f"CASE WHEN pg_try_advisory_lock({key}, {_SLEEPING}) "
        f"THEN pg_advisory_unlock({key}, {_SLEEPING})::text ELSE {wake} END "
        f"ELSE {wake} END"
    )


def _state(exc: BaseException) -> str:
    return getattr(exc, "sqlstate", None) or getattr(exc, "pgcode", None) or ""


def _ordered(rows: list[Any]) -> list[Row]:
    """RETURNING keeps no order."""
    return sorted((Row(*row) for row in rows), key=lambda row: (row.prio, row.id))
