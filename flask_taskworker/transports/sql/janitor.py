"""Duties any consumer does for all: due messages, dead consumers, unused queues."""

from __future__ import annotations

import logging
import math
import random
import threading
from typing import TYPE_CHECKING

from ... import clock

if TYPE_CHECKING:
    from .connection import HeldConnection
    from .dialects.base import Peer
    from .engine import Database

log = logging.getLogger(__name__)

#: Seconds between looks for dead consumers, where a lock tells at once who is dead.
_REAP = 0.5
_EXPIRE = 2.0
_MAINTAIN = 30.0
#: A clock that is set by less than so many seconds changes nothing.
_JUMP = 1.0


class Janitor:
    """Runs what is due, in whichever consuming thread comes along."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._busy = threading.Lock()
        #: When something is due next, on the monotonic clock.
        self.next_at = 0.0
        self._reap_at = self._expire_at = 0.0
        self._maintain_at = clock.monotonic() + _MAINTAIN
        # Consumer -> (its last sign of life, when we first saw exactly that one).
        self._watched: dict[int, tuple[float, float]] = {}
        self._free_since: dict[int, float] = {}
        self._lost_touch_at = -math.inf
        # The clock that queues expire by against the steady one, and when that changed.
        self._clock_gap: float | None = None
        self._jumped_at = -math.inf

    def run(self, connection: HeldConnection) -> bool:
        """Do what is due.

        :param connection: of the calling thread, outside a transaction.
        :returns: whether messages became ready.
        """
        self._database.keeper.free()
        now = clock.monotonic()
        if now < self.next_at or not self._busy.acquire(blocking=False):
            return False
        try:
            found = False
            reap, expire, maintain = (
                now >= at for at in (self._reap_at, self._expire_at, self._maintain_at)
            )
            # First of all: other threads of this process sleep until the next time, and would
            # not sleep at all while this one is at work.
            if reap:
                self._reap_at = now + _REAP * random.uniform(0.8, 1.2)
            if expire:
                self._expire_at = now + _EXPIRE * random.uniform(0.8, 1.2)
            if maintain:
                self._maintain_at = now + _MAINTAIN * random.uniform(0.8, 1.2)
            self.next_at = min(self._reap_at, self._expire_at, self._maintain_at)
            if reap:
                found = self.reap(connection) > 0
            if expire:
                self.expire_queues(connection)
            if maintain:
                self._database.dialect.maintain(self._database, connection)
                found = self._free_orphans(connection) > 0 or found
            return found
        finally:
            self._busy.release()

    def lost_touch(self) -> None:
        """The database could not be reached: meanwhile no peer could show that it lives."""
        self._lost_touch_at = clock.monotonic()
        self._watched, self._free_since = {}, {}

    def promote(self, connection: HeldConnection) -> int:
        """Make delayed messages ready whose time has come.

        :returns: how many.
        """
        dialect = self._database.dialect

        def work() -> int:
            cursor = connection.execute(dialect.select_due, (self._database.now(),))
            ids = [row[0] for row in cursor.fetchall()]
            if not ids:
                return 0
            return int(
                connection.execute(
                    f"UPDATE {dialect.names.message} SET owner = 0, due = NULL "
                    f"WHERE owner = -1 AND id IN ({dialect.ids(ids)})"
                ).rowcount
            )

        return connection.transaction(work)

    def reap(self, connection: HeldConnection) -> int:
        """Take the messages of dead consumers back.

        :returns: how many became ready.
        """
        database = self._database
        peers = database.dialect.peers(database, connection)
        present = {peer.id for peer in peers}
        self._watched = {id: seen for id, seen in self._watched.items() if id in present}
        self._free_since = {id: at for id, at in self._free_since.items() if id in present}
        count = 0
        for peer in peers:
            if not database.keeper.owns(peer.id) and self._is_dead(peer):
                count += self._take_back(connection, peer)
        return count

    def expire_queues(self, connection: HeldConnection) -> None:
        """Delete queues that nobody used for longer than they asked to be kept."""
        dialect = self._database.dialect
        now, steady = self._database.now(), clock.monotonic()
        if self._clock_gap is None:
            self._clock_gap = now - steady
        elif abs(now - steady - self._clock_gap) > _JUMP:
            self._clock_gap, self._jumped_at = now - steady, steady
        cursor = connection.execute(dialect.expired_queues, (now,))
        for queue, expires in cursor.fetchall():
            if steady - self._jumped_at < expires:
                continue  # in the time after the jump, whoever uses it will say so
            if delete_queue(self._database, connection, queue, unused_at=now):
                log.debug("queue %d expired", queue)

    def _is_dead(self, peer: Peer) -> bool:
        now = clock.monotonic()
        seen, since = self._watched.get(peer.id, (None, 0.0))
        if seen != peer.seen:
            self._watched[peer.id] = (peer.seen, now)
            since = now
        # Judged by our own steady clock: no clock of any host has to be right.
        if now - since >= self._database.options.lease:
            return True
        if self._database.dialect.free_lock_is_proof and peer.alive is False:
            return True
        # A server that was away has forgotten every lock, also those of peers that live.
        away = now - self._lost_touch_at < self._database.options.lease
        if peer.alive is not False or away:
            self._free_since.pop(peer.id, None)
            return False
        # A server's lock is also free while its holder reconnects.
        return now - self._free_since.setdefault(peer.id, now) >= _REAP

    def _take_back(self, connection: HeldConnection, peer: Peer) -> int:
        database, dialect = self._database, self._database.dialect

        def work() -> int:
            gone = connection.execute(dialect.reap_consumer, (peer.id, peer.seen)).rowcount
            if not gone:
                return 0  # it gave a sign of life, or somebody else was faster
            ids = dialect.owned_by(connection, peer.id)
            if ids:
                connection.execute(
                    f"UPDATE {dialect.names.message} SET owner = 0 "
                    f"WHERE owner = {peer.id:d} AND id IN ({dialect.ids(ids)})"
                )
            return len(ids)

        count = connection.transaction(work)
        if count:
            log.warning("consumer %d is dead: %d message(s) are delivered again", peer.id, count)
            database.wake(connection)
        return count

    def _free_orphans(self, connection: HeldConnection) -> int:
        """Messages whose owner is not registered, which only edits by hand bring about."""
        dialect = self._database.dialect

        def work() -> int:
            dialect.delete_left_over(connection)
            ids = [id for id, _ in dialect.orphans(connection)]
            if ids:
                connection.execute(
                    f"UPDATE {dialect.names.message} SET owner = 0 "
                    f"WHERE owner > 0 AND id IN ({dialect.ids(ids)})"
                )
            return len(ids)

        return connection.transaction(work)


def delete_queue(
    database: Database, connection: HeldConnection, queue: int, unused_at: float | None = None
) -> bool:
    """Delete a queue with its bindings and messages.

    :param unused_at: only if it has expired at this time: somebody may have used it since the
        look that found it, and would be left with a queue that is not there.
    :returns: whether it is gone.
    """
    dialect = database.dialect
    delete = dialect.sql("DELETE FROM {queue} WHERE id = ?")
    params: tuple[float, ...] = (queue,)
    if unused_at is not None:
        delete += dialect.sql(" AND used + expires < ?")
        params = (queue, unused_at)

    def work() -> bool:
        deleted = connection.execute(delete, params).rowcount
        if unused_at is not None and not deleted:
            return False
        connection.execute(dialect.sql("DELETE FROM {binding} WHERE queue = ?"), (queue,))
        dialect.delete_queue_messages(connection, queue)
        return True

    return connection.transaction(work)
