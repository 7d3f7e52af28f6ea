"""The kombu transport ``redis://`` for workers and publishers of ours."""

from __future__ import annotations

import contextlib
import select
from typing import Any, ClassVar

from kombu.transport import redis as kombu_redis

from ... import clock
from .. import Capabilities
from .channel import Channel as RedisChannel

#: drain_events(timeout=None) waits in pieces of this many seconds.
_FOR_EVER = 3600.0
#: Where the server does not say that messages came, lists are looked at this often at first, and
#: ever more rarely. Seconds.
_POLL_FIRST, _POLL_LAST = 0.002, 0.05
#: How often the connection for fanout exchanges is checked. Seconds.
_FANOUT_CHECK = 15.0


class Transport(kombu_redis.Transport):  # type: ignore[misc]
    """Messages in Redis, in kombu's keys. At least once."""

    Channel = RedisChannel
    #: Our consumers wait here and in no event loop of kombu's.
    implements = kombu_redis.Transport.implements.extend(asynchronous=False)
    capabilities: ClassVar[Capabilities] = Capabilities(
        dead_letter=True, buffers=True, leased=True, cheap_prefetch=True, wake=True, fanout=True
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pause = _POLL_FIRST
        self._fanout_at = clock.monotonic() + _FANOUT_CHECK

    def drain_events(self, connection: Any, timeout: float | None = None) -> None:
        """Deliver what is there, or wait for it.

        :param timeout: seconds; 0: one look; None: for ever.
        :raises socket.timeout: if nothing came.
        """
        deadline = None if timeout is None else clock.monotonic() + timeout
        while not self._drain_once():
            left = _FOR_EVER if deadline is None else deadline - clock.monotonic()
            if left <= 0:
                raise TimeoutError
            self.wait(connection, left)

    def _drain_once(self) -> bool:
        delivered = False
        for channel in list(self.channels):
            delivered = channel.drain() or delivered
        if delivered:
            self._pause = _POLL_FIRST
        return delivered

    def wait(self, connection: Any, timeout: float, wake: int | None = None) -> None:
        """Sleep until there may be something to do.

        Settlements are sent first. Returns at once if there may be messages to claim.

        :param timeout: the longest sleep, in seconds.
        :param wake: a file descriptor that ends the sleep when readable; it is not read.
        """
        self._check_fanout()
        waited_for: list[Any] = [] if wake is None else [wake]
        for channel in list(self.channels):
            channel.flush(wait=False)
            listening = channel.listening()
            if listening is not None:
                waited_for.append(listening)
            if not channel.hungry():
                continue
            claims = channel.claims
            if claims.rings:
                if not channel.quiet():
                    return
                waited_for.append(claims.fileno())
                timeout = min(timeout, channel.options.fallback_interval)
            else:
                timeout = min(timeout, self._pause)
                self._pause = min(self._pause * 2, _POLL_LAST)
        _wait_for(waited_for, max(0.0, timeout))

    def _check_fanout(self) -> None:
        if clock.monotonic() >= self._fanout_at:
            self._fanout_at = clock.monotonic() + _FANOUT_CHECK
            with contextlib.suppress(*self.connection_errors):
                self.cycle.maybe_check_subclient_health()


def _wait_for(readable: list[Any], timeout: float) -> None:
    if not hasattr(select, "poll"):
        select.select(readable, [], [], timeout)
        return
    poller = select.poll()  # select() knows no more than 1024 files
    for file in readable:
        poller.register(file, select.POLLIN)
    poller.poll(timeout * 1000 + 1)
