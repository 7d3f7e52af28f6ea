"""Staying the owner of claimed messages: registration, heartbeat, liveness lock.

The lease is on the consumer's row, not on messages, so that a heartbeat costs the same
whatever is in flight. It comes from a thread of its own with a connection of its own: a
task that keeps the consuming thread busy does not stop it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ... import clock
from .. import cut
from .errors import DatabaseUnavailableError, DatabaseUnusableError

if TYPE_CHECKING:
    from .connection import HeldConnection
    from .engine import Database

log = logging.getLogger(__name__)

#: Seconds between attempts while the database is away.
_RECONNECT = 0.2
#: How long a beat may take once somebody waits for it to end. Seconds.
_PATIENCE = 4.0


class Lease:
    """The registration of one consumer.

    :ivar id: the owner written to claimed messages.
    :ivar lost: another consumer took the registration away; claims need a new one.
    """

    __slots__ = ("id", "lost", "queues")

    def __init__(self, id: int) -> None:
        self.id = id
        self.lost = False
        #: Queues with an expiry that are in use, and their expiry in seconds.
        self.queues: dict[int, float] = {}


class _Bell:
    """Wakes the heartbeat thread: rung by others, or because its connection broke."""

    def __init__(self) -> None:
        self._ends = socket.socketpair()
        for end in self._ends:
            end.setblocking(False)

    def ring(self) -> None:
        with contextlib.suppress(OSError):  # full, so it is awake; or closed
            self._ends[1].send(b"!")

    def wait(self, timeout: float, connection: int | None) -> None:
        """Sleep up to ``timeout`` seconds, or until something comes in on a connection."""
        fds = [self._ends[0].fileno(), *([] if connection is None else [connection])]
        if hasattr(select, "poll"):
            poller = select.poll()
            for fd in fds:
                poller.register(fd, select.POLLIN)
            poller.poll(timeout * 1000)
        else:
            select.select(fds, [], [], timeout)
        with contextlib.suppress(OSError):
            while self._ends[0].recv(64):
                pass

    def close(self) -> None:
        for end in self._ends:
            end.close()


class LeaseKeeper:
    """Keeps the leases of this process alive, in one thread for one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.RLock()
        self._bell: _Bell | None = None
        self._leases: dict[int, Lease] = {}
        self._connection: HeldConnection | None = None
        self._thread: threading.Thread | None = None
        self._beats_since: float | None = None

    def register(self) -> Lease:
        """Register a consumer.

        :raises DatabaseUnavailableError: if its row cannot be written.
        """
        # Random, never used again, and known before the row exists: the lock can be
        # taken first, so that no peer ever sees the row without its lock.
        lease = Lease(secrets.randbits(62) | 1)
        database = self._database
        with self._locked():
            connection = self._connect()
            database.dialect.hold_lock(database, connection, lease.id)
            connection.execute(
                database.dialect.insert_consumer,
                (lease.id, database.now(), socket.gethostname()[:255], os.getpid()),
            )
            self._leases[lease.id] = lease
            self._start()
        return lease

    def release(self, lease: Lease) -> None:
        """End a registration; the consumer's messages have to be given back before."""
        database = self._database
        with self._locked():
            if self._leases.pop(lease.id, None) is None:
                return
            try:
                connection = self._connect()
                # In this order: if the row cannot be deleted, others see at once that it is free.
                database.dialect.drop_lock(database, connection, lease.id)
                connection.execute(database.dialect.delete_consumer, (lease.id,))
            except (DatabaseUnavailableError, DatabaseUnusableError) as exc:
                log.warning("consumer %d is not signed off: %s", lease.id, exc)
            if not self._leases:
                self._stop()

    def use_queue(self, lease: Lease, queue: int, expires: float) -> None:
        """Keep a queue from expiring while a consumer uses it."""
        lease.queues[queue] = expires
        if self._bell is not None:
            self._bell.ring()  # the next beat may be due earlier than planned

    def owns(self, consumer: int) -> bool:
        """Whether a consumer is one of this process."""
        return consumer in self._leases

    def close(self) -> None:
        """Release every lease."""
        for lease in list(self._leases.values()):
            self.release(lease)
        with self._locked():
            self._stop()

    def free(self, patience: float | None = None) -> None:
        """End a beat that gets no answer: its connection may be open at our end alone.

        :param patience: how long it may take, in seconds; the default is a third of the lease.
        """
        since = self._beats_since
        if since is None:
            return
        if clock.monotonic() - since > (patience or self._database.options.lease / 3):
            connection = self._connection
            descriptor = None if connection is None else self._socket()
            if descriptor is not None and cut(descriptor):
                log.warning("the heartbeat got no answer; its connection is cut")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The lock, however long a beat takes that holds it."""
        while not self._lock.acquire(timeout=_PATIENCE / 2):
            self.free(_PATIENCE)
        try:
            yield
        finally:
            self._lock.release()

    def abandon(self) -> None:
        """Forget everything; for a forked child."""
        self._lock = threading.RLock()
        self._leases = {}
        self._connection = None
        self._thread = None
        bell, self._bell = self._bell, None
        if bell is not None:
            bell.close()  # only this process's copy

    def beat(self) -> None:
        """Show that this process lives; mark the leases that were taken away."""
        database, dialect = self._database, self._database.dialect
        with self._lock:
            leases = [lease for lease in self._leases.values() if not lease.lost]
            if not leases:
                return
            connection = self._connect()
            database.read_clock(connection)
            now = database.now()
            ids = dialect.ids(lease.id for lease in leases)
            consumer = database.dialect.names.consumer
            changed = connection.execute(
                dialect.sql(f"UPDATE {consumer} SET seen = ? WHERE id IN ({ids})"), (now,)
            ).rowcount
            if changed != len(leases):
                cursor = connection.execute(f"SELECT id FROM {consumer} WHERE id IN ({ids})")
                left = {row[0] for row in cursor.fetchall()}
                for lease in leases:
                    if lease.id not in left:
                        lease.lost = True
                        log.warning(
                            "consumer %d lost its lease (no heartbeat for %g s?): its messages "
                            "are delivered again",
                            lease.id,
                            database.options.lease,
                        )
            for queue in {queue for lease in leases for queue in lease.queues}:
                connection.execute(dialect.touch_queue, (now, queue))

    def _connect(self) -> HeldConnection:
        connection = self._connection
        if connection is None or not connection.usable:
            connection = self._connection = self._database.connect(durable=False)
            for id in self._leases:  # a server's locks ended with the old connection
                self._database.dialect.hold_lock(self._database, connection, id)
        return connection

    def _interval(self) -> float:
        waits = [self._database.options.lease / 3]
        for lease in list(self._leases.values()):
            waits += [expires / 3 for expires in list(lease.queues.values())]
        return min(waits)

    def _start(self) -> None:
        if self._thread is None:
            self._bell = _Bell()
            self._thread = threading.Thread(
                target=self._run, args=(self._bell,), name="taskworker-lease", daemon=True
            )
            self._thread.start()

    def _stop(self) -> None:
        """End thread and connection; the lock is held, so the thread is not in a beat."""
        self._thread = None
        if self._bell is not None:
            self._bell.ring()
            self._bell = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _run(self, bell: _Bell) -> None:
        failures = 0
        while True:
            # A server ends our liveness locks with the connection: take them again before
            # anybody takes us for dead.
            wait = self._interval() if not failures else min(_RECONNECT, self._interval())
            bell.wait(wait, None if failures else self._socket())
            with self._lock:
                if self._thread is not threading.current_thread():
                    bell.close()
                    return
            self._beats_since = clock.monotonic()
            try:
                self.beat()
                failures = 0
            except (DatabaseUnavailableError, DatabaseUnusableError) as exc:
                failures += 1
                log.log(
                    logging.WARNING if failures == 1 else logging.DEBUG,
                    "no heartbeat possible: %s",
                    exc,
                )
            finally:
                self._beats_since = None

    def _socket(self) -> int | None:
        connection = self._connection
        if connection is None or not connection.usable:
            return None
        return self._database.dialect.socket_of(connection.raw)
