"""One child process as the pool sees it: the jobs in its line, and its end."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import signal
import socket
import termios
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ... import clock
from ..delivery import Delivery
from . import wire

if TYPE_CHECKING:
    from .nursery import Nursery

#: What the kernel holds for one child at most, about. Bytes.
LINE_BYTES = 1 << 18


@dataclass
class Given:
    """A delivery that was written to a line.

    ``end`` is where its frame ends in all that was written. ``since`` is when its run began, on
    the monotonic clock, where the child says so. ``out_of_time`` says that the pool has ended it
    at its hard limit.
    """

    number: int
    delivery: Delivery
    end: int
    since: float | None = None
    warned: bool = False
    out_of_time: bool = False

    def next_limit(self) -> float | None:
        """When its next time limit is over, on the monotonic clock; None if it has none."""
        if self.since is None or self.out_of_time:
            return None
        hard, soft = self.delivery.limits
        dues = [] if soft is None or self.warned else [self.since + soft]
        if hard is not None:
            dues.append(self.since + hard)
        return min(dues, default=None)

    def at_soft_limit(self, now: float) -> bool:
        """Whether it is the soft limit that is over now, and the task has to be told."""
        assert self.since is not None
        hard, soft = self.delivery.limits
        if self.warned or soft is None or (hard is not None and self.since + hard <= now):
            return False
        self.warned = True
        return True


class Offspring:
    """A child process, from before its birth to its end.

    :param serial: its number in the pool, and its byte in the file of turns.
    :param turns: that file.
    :param runs: how many jobs it may be given.
    :param nursery: where it is made.
    """

    def __init__(self, serial: int, turns: int, runs: float, nursery: Nursery) -> None:
        self.serial = serial
        self.nursery = nursery
        self.pid: int | None = None
        self.born = clock.monotonic()
        self.runs_left = runs
        self.done = 0
        #: It gets no more jobs, and ends when its line is empty.
        self.leaving = False
        self.dead = False
        self.jobs: deque[Given] = deque()
        self.frames = wire.Frames()
        self._turns = turns
        # The reading end of the line stays open here, to take back what is not read yet.
        self._line, self.tail = socket.socketpair()
        self.results, self.reports = socket.socketpair()
        self._line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LINE_BYTES)
        for end in (self._line, self.tail, self.results):
            end.setblocking(False)
        self._written = 0
        self._outgoing = bytearray()

    # -- its line -------------------------------------------------------------------------

    @property
    def clogged(self) -> bool:
        """Whether something waits for space in the line."""
        return bool(self._outgoing)

    def line_fileno(self) -> int:
        """Writable when there is space in the line."""
        return self._line.fileno()

    def give(self, number: int, delivery: Delivery) -> None:
        """Put a delivery at the end of the line."""
        data = wire.job_frame(number, delivery)
        self._written += len(data)
        self.jobs.append(Given(number, delivery, self._written))
        self.runs_left -= 1
        self._outgoing += data
        self.push()

    def push(self) -> None:
        """Write what the line has space for."""
        while self._outgoing:
            try:
                sent = self._line.send(memoryview(self._outgoing)[: 1 << 20])
            except BlockingIOError:
                return
            except OSError:  # its end is being reported
                return
            del self._outgoing[:sent]
        if self.leaving:
            with contextlib.suppress(OSError):
                self._line.shutdown(socket.SHUT_WR)

    def taken(self) -> list[Given]:
        """The jobs that the child has read and not reported."""
        if not self.jobs:
            return []
        unread = array.array("i", [0])
        fcntl.ioctl(self.tail, termios.FIONREAD, unread)
        read = self._written - len(self._outgoing) - unread[0]
        return [job for job in self.jobs if job.end <= read]

    def recall(self) -> list[Given]:
        """Take back the jobs that the child has not read, in their order."""
        if not self.jobs:
            return []
        try:
            fcntl.lockf(self._turns, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self.serial)
        except OSError:
            return []  # it reads just now
        try:
            back = len(self._outgoing)
            self._outgoing.clear()
            with contextlib.suppress(BlockingIOError):
                while data := self.tail.recv(1 << 20):
                    back += len(data)
        finally:
            fcntl.lockf(self._turns, fcntl.LOCK_UN, 1, self.serial)
        self._written -= back
        recalled: list[Given] = []
        while self.jobs and self.jobs[-1].end > self._written:
            recalled.append(self.jobs.pop())
        self.runs_left += len(recalled)
        recalled.reverse()
        return recalled

    def dismiss(self) -> list[Given]:
        """Let it end after what it runs; return what it has not started."""
        self.leaving = True
        recalled = self.recall()
        self.push()
        return recalled

    # -- its end --------------------------------------------------------------------------

    def job(self, number: int) -> Given | None:
        """A job in the line by its number."""
        return next((job for job in self.jobs if job.number == number), None)

    def signal_task(self, number: int) -> None:
        """Send a signal to the child alone."""
        if self.pid is not None and not self.dead:
            with contextlib.suppress(OSError):
                os.kill(self.pid, number)

    def signal_all(self, number: int) -> None:
        """Send a signal to the child and to what its task has started."""
        if self.pid is None or self.dead:
            return
        try:
            os.killpg(self.pid, number)
        except OSError:  # it has no group of its own yet, or is gone
            self.signal_task(number)

    def kill(self) -> None:
        """End it at once, and what its task has started."""
        self.signal_all(signal.SIGKILL)

    def close(self) -> None:
        for end in (self._line, self.tail, self.results, self.reports):
            end.close()
