"""Sleeping until there is something to do, without polling where that can be had."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
from typing import TYPE_CHECKING

from ... import clock
from .doorbell import BROADCASTS, MESSAGES, Slot
from .listener import Listener

if TYPE_CHECKING:
    from .channel import Channel
    from .transport import Transport

log = logging.getLogger(__name__)

#: Without a doorbell a sleeper looks this often at first, and ever more rarely, in seconds.
_POLL_FIRST, _POLL_LAST = 0.002, 0.2
#: How often a sleeper asks anew when the next delayed message is due, in seconds.
_DELAYED = 1.0
#: How often one that reads broadcasts alone looks for those of other hosts, where the database
#: cannot wake it, in seconds.
_BROADCAST_POLL = 0.5


class Sleeper:
    """Where the thread that drains a connection sleeps.

    Arm the bell, look once more, sleep: whatever is committed after the look rings.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._pid = os.getpid()
        self._slot: Slot | None = None
        self._slot_refused = False
        self._broadcasts = transport.options.broadcasts
        self._listener = Listener(self._broadcasts)
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self._sleeping: int | None = None
        self._poll = _POLL_FIRST
        self._delayed_at = 0.0

    def wait(self, timeout: float, wake: int | None) -> None:
        """See :meth:`.transport.Transport.wait`."""
        if self._pid != os.getpid():
            self._start_afresh()
        deadline = clock.monotonic() + timeout
        for channel in list(self._transport.channels):
            channel.flush()
        consuming = [channel for channel in self._transport.channels if channel._consumers]
        # Who cannot take a message need not be woken for one.
        hungry = [channel for channel in consuming if channel.can_claim()]
        slot = self._bell(consuming) if hungry else None
        if not hungry:
            self._listener.disarm()
        self._sleeping = threading.get_ident()
        try:
            delayed = not self._broadcasts  # nobody delays those
            while not self._once(consuming, hungry, slot, deadline, wake, delayed):
                # A delayed message of this host rings; of others, once a second is enough.
                delayed = not self._broadcasts and clock.monotonic() >= self._delayed_at
        finally:
            self._sleeping = None
            self._listener.woken()
            if slot is not None:
                slot.disarm()

    def _once(
        self,
        consuming: list[Channel],
        hungry: list[Channel],
        slot: Slot | None,
        deadline: float,
        wake: int | None,
        delayed: bool,
    ) -> bool:
        """Look, sleep once. True when the wait is over."""
        if delayed:
            self._delayed_at = clock.monotonic() + _DELAYED
        interruption = self._interruption()
        if slot is not None:
            slot.arm()
        heard = bool(hungry) and self._listener.arm(hungry[0].database, hungry[0].held())
        if any(channel.settlements for channel in consuming):
            return True
        for channel in consuming:
            if not self._broadcasts:  # the duties are those of who runs tasks
                held = channel.held()
                held.database.janitor.run(held)
            if channel.has_work(delayed):
                self._poll = _POLL_FIRST
                return True
        now = clock.monotonic()
        if now >= deadline:
            return True
        fds = [fd for fd in (wake, interruption) if fd is not None]
        if slot is not None:
            fds.append(slot.fileno())
        notified = self._listener.fileno() if hungry else None
        if notified is not None:
            fds.append(notified)
        until = min(deadline, self._look_again(consuming, hungry, slot is not None, heard))
        readable = _readable(fds, until - now)
        if slot is not None:
            slot.drain()
        return readable or clock.monotonic() >= deadline

    def _look_again(
        self, consuming: list[Channel], hungry: list[Channel], rung: bool, heard: bool
    ) -> float:
        """When to look without having been woken, on the monotonic clock.

        :param rung: whether publishers on this host wake us.
        :param heard: whether publishers on every host do.
        """
        now = clock.monotonic()
        if not consuming:
            return now + 3600
        times = [now + self._transport.options.fallback_interval]
        if not self._broadcasts:
            times += [channel.database.janitor.next_at for channel in consuming]
        if hungry and not (rung or heard):
            times.append(now + self._poll)
            self._poll = min(self._poll * 2, _POLL_LAST)
        for channel in hungry:
            database = channel.database
            if database.dialect.remote_poll is not None and not heard:
                poll = _BROADCAST_POLL if self._broadcasts else database.dialect.remote_poll
                times.append(now + poll)
            due = channel.next_due()
            if due is not None:
                times.append(now + due - database.now())
        return min(times)

    def interrupt(self) -> None:
        """End the sleep, if another thread is asleep here."""
        if self._sleeping is not None and self._sleeping != threading.get_ident():
            pair = self._pair
            if pair is not None:
                with contextlib.suppress(OSError):  # full: it is being woken already
                    pair[1].send(b"!")

    def _interruption(self) -> int:
        """What :meth:`interrupt` makes readable; earlier calls are forgotten."""
        if self._pair is None:
            self._pair = socket.socketpair()
            for end in self._pair:
                end.setblocking(False)
        with contextlib.suppress(OSError):
            while self._pair[0].recv(64):
                pass
        return self._pair[0].fileno()

    def busy(self) -> None:
        """Messages were delivered: the next sleep is not near."""
        self._listener.awake()

    def _bell(self, consuming: list[Channel]) -> Slot | None:
        if self._slot is None and consuming and not self._slot_refused:
            bell = consuming[0].database.doorbell
            try:
                self._slot = bell.slot(BROADCASTS if self._broadcasts else MESSAGES)
            except OSError as exc:
                self._slot_refused = True
                if bell.path is not None:
                    log.warning("no doorbell (%s): looking for messages up to every 0.2 s", exc)
        return self._slot

    def _start_afresh(self) -> None:
        """In a forked child: the parent's sockets are not ours to listen on."""
        self.close()
        self._pid = os.getpid()
        self._slot_refused = False

    def close(self) -> None:
        self._listener.close()
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.close()
        pair, self._pair = self._pair, None
        for end in pair or ():
            end.close()


def _readable(fds: list[int], timeout: float) -> bool:
    timeout = max(0.0, timeout)
    if hasattr(select, "poll"):
        poller = select.poll()
        for fd in fds:
            poller.register(fd, select.POLLIN)
        # Rounded up: to wake a moment too early would be to look in vain.
        return bool(poller.poll(timeout * 1000 + 1))
    return bool(select.select(fds, [], [], timeout)[0])
