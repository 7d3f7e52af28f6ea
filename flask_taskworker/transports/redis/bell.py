"""A connection on which Redis says that a list has changed."""

from __future__ import annotations

import contextlib
import logging
import select
from collections.abc import Callable
from typing import Any

from redis.exceptions import ConnectionError, ResponseError

from ... import clock
from .wire import Wire

log = logging.getLogger(__name__)

#: A bell that was silent for this long is asked whether it still works. Seconds.
_SILENCE = 15.0
#: ... and has this long to answer. Seconds.
_ANSWER = 10.0
_PING = b"*1\r\n$4\r\nPING\r\n"
_PONG = b"*2\r\n$4\r\npong\r\n$0\r\n\r\n"


class Bell:
    """Hears of changes to what another connection has read.

    What is said does not matter: whatever comes in rings.

    :param make: a connection of redis-py, not connected yet.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._wire = Wire(make)
        self._refused = False
        self._heard = 0.0
        self._asked: float | None = None
        self._poll: select.poll | None = None

    @property
    def works(self) -> bool:
        """Whether it rings at all; some servers and proxies do not know how."""
        return self._wire.usable

    def attach(self, wire: Wire) -> None:
        """Listen to changes of what ``wire`` reads from now on."""
        self.close()
        if self._refused:
            return
        try:
            client = self._wire.command("CLIENT", "ID")
            self._wire.command("SUBSCRIBE", "__redis__:invalidate")
            wire.command("CLIENT", "TRACKING", "ON", "REDIRECT", client, "NOLOOP")
        except ResponseError as exc:
            self._refused = True
            self.close()
            log.warning("the server does not tell when messages come (%s): looking for them", exc)
            return
        sock = self._wire.socket()
        sock.setblocking(False)
        if hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(sock, select.POLLIN)
        self._heard, self._asked = clock.monotonic(), None

    def fileno(self) -> int:
        """What becomes readable when it rings."""
        return self._wire.socket().fileno()

    def rung(self) -> bool:
        """Whether it has rung since the last call.

        :raises ConnectionError: if its connection is gone, or does not answer.
        """
        rung = heard = False
        if self._poll is None or self._poll.poll(0):
            with contextlib.suppress(BlockingIOError, InterruptedError):
                while said := self._receive():
                    heard = True
                    rung = rung or said != _PONG
                self.close()
                raise ConnectionError("the connection for wake-ups was closed")
        if heard:
            self._heard, self._asked = clock.monotonic(), None
        else:
            self._check()
        return rung

    def _receive(self) -> bytes:
        try:
            return self._wire.socket().recv(65536)
        except (BlockingIOError, InterruptedError):
            raise
        except OSError as exc:
            if type(exc).__name__ == "SSLWantReadError":
                raise BlockingIOError from exc
            self.close()
            raise ConnectionError(f"the connection for wake-ups failed: {exc}") from exc

    def _check(self) -> None:
        now = clock.monotonic()
        if self._asked is not None:
            if now - self._asked > _ANSWER:
                self.close()
                raise ConnectionError("the connection for wake-ups does not answer")
        elif now - self._heard > _SILENCE:
            self._asked = now
            try:
                self._wire.socket().send(_PING)
            except OSError as exc:
                self.close()
                raise ConnectionError(f"the connection for wake-ups failed: {exc}") from exc

    def close(self) -> None:
        """Stop listening."""
        self._poll = None
        self._wire.close()
