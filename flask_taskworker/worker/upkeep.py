"""What a consumer does from time to time: heartbeats, and the maintenance of its worker."""

from __future__ import annotations

import math
from collections.abc import Callable

import kombu

from .. import clock

#: Pauses in seconds: before the first maintenance, and between two looks at the heartbeats.
FIRST_MAINTENANCE = 1.0
HEARTBEAT_CHECK = 1.0
#: A broker that expects heartbeats is never left alone for longer. Seconds.
LONGEST_WAIT = 5.0


class Upkeep:
    """Belongs to the consumer's thread.

    :param maintain: the maintenance; gives the seconds until it wants to be called again.
    """

    def __init__(self, maintain: Callable[[], float]) -> None:
        self._maintain = maintain
        self._next_maintenance = clock.monotonic() + FIRST_MAINTENANCE

    def connect(self, connection: kombu.Connection) -> None:
        """Begin with a connection."""
        self._connection = connection
        self._heartbeats = bool(connection.supports_heartbeats)
        self._next_heartbeat = clock.monotonic() + HEARTBEAT_CHECK

    def do_due(self, now: float) -> float:
        """Do what is due.

        :param now: on the monotonic clock.
        :return: when to come again, at the latest.
        """
        if now >= self._next_maintenance:
            self._next_maintenance = now + self._maintain()
        if self._heartbeats and now >= self._next_heartbeat:
            self._connection.heartbeat_check()
            self._next_heartbeat = now + HEARTBEAT_CHECK
        latest = now + LONGEST_WAIT if self._heartbeats else math.inf
        return min(self._next_maintenance, latest)
