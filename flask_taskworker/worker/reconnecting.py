"""Keeps a consumer connected: a connection that is lost is opened anew."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import kombu

from .. import clock
from ..broker import broker_connection, drop, is_hopeless, recoverable_errors
from ..exceptions import BrokerUnavailableError

if TYPE_CHECKING:
    from ..config import Config

log = logging.getLogger("flask_taskworker.worker")

#: Pauses between attempts to reach the broker again, in seconds; the last one repeats.
RECONNECT_PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)


class Reconnecting:
    """A connection to the broker, and what to do when it fails.

    :param config: says which broker.
    :param pause: waits for some seconds.
    """

    def __init__(self, config: Config, pause: Callable[[float], None]) -> None:
        self._config = config
        self._pause = pause
        self._proven = False  # whether this connection has carried a whole turn
        self._next_complaint = clock.monotonic()
        self.connection: kombu.Connection | None = None
        #: After these errors another connection, or the same one later, may succeed.
        self.errors: tuple[type[BaseException], ...] = ()

    def run(self, consume: Callable[[kombu.Connection], None], is_done: Callable[[], bool]) -> None:
        """Consume on one connection after the other.

        :param consume: returns when there is no more to do on a connection.
        :param is_done: whether there is no more to do at all.
        :raises BrokerError: if the broker can be used neither now nor later, as with a
            damaged database file.
        """
        failures, worked = 0, False
        while not is_done():
            self._proven = False
            connection = self.connection = broker_connection(self._config, role="consume")
            self.errors = (*recoverable_errors(connection), BrokerUnavailableError)
            try:
                consume(connection)
                _close_quietly(connection)
            except self.errors as exc:
                worked = worked or self._proven
                if is_hopeless(exc) and not worked:
                    raise  # better to end than to try for ever
                failures = 0 if self._proven else failures
                pause = RECONNECT_PAUSES[min(failures, len(RECONNECT_PAUSES) - 1)]
                failures += 1
                cause = str(exc).rstrip(".") or type(exc).__name__
                log.error("no connection to the broker: %s. Trying again in %.1f s", cause, pause)
                self._pause(pause)
            except Exception:  # a fault in a transport must not end the worker
                log.exception("the broker connection failed in an unexpected way; starting it anew")
                self._pause(RECONNECT_PAUSES[-1])
            finally:
                drop(connection)

    def repeat(self, turn: Callable[[], bool], may_stay: Callable[[], bool]) -> None:
        """Take turns on a connection until one says that it was the last.

        :param may_stay: whether a connection that has worked is kept when it fails.
        """
        while True:
            try:
                if turn():
                    return
                self._proven = True
            except self.errors as exc:
                if not self._proven or not may_stay():
                    raise
                if clock.monotonic() >= self._next_complaint:
                    log.warning("the broker cannot be used now: %s", exc)
                    self._next_complaint = clock.monotonic() + RECONNECT_PAUSES[-1]
                self._pause(RECONNECT_PAUSES[1])


def _close_quietly(connection: kombu.Connection) -> None:
    try:
        connection.release()
    except Exception as exc:
        log.debug("closing the broker connection: %r", exc)
