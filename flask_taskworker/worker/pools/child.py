"""A child process of the processes pool: takes one job after the other and runs it.

Jobs wait in a socket, its *line*. The parent holds the reading end of the line as well, so
that it can take back what has not been read; a lock says who reads.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

from ... import clock, signals, states
from ...backends.base import TaskRecord
from ...backends.encoding import encode_exception
from ...exceptions import InvalidMessageError, SoftTimeLimitExceeded
from ...message import Unreadable, parse
from ..delivery import Delivery, Outcome, Settlement
from ..executor import Executor
from . import mark_started, wire

if TYPE_CHECKING:
    from ...app import TaskApp

log = logging.getLogger("flask_taskworker.worker")


class SoftLimit:
    """Raises SoftTimeLimitExceeded in the task that runs, when the parent sends SIGUSR1.

    The signal may come late, when the run it was meant for has ended: it counts only if
    the limit of the current run is over.
    """

    def __init__(self) -> None:
        self._since = 0.0
        self._due: float | None = None
        self._inside = self._missed = False

    def install(self) -> None:
        signal.signal(signal.SIGUSR1, self._on_signal)

    def begin(self, since: float) -> None:
        """A run begins, by the clock that the parent goes by as well."""
        self._since, self._due, self._missed = since, None, False

    def _on_signal(self, signum: int, frame: object) -> None:
        if not self._inside:
            self._missed = True
        elif self._due is None or clock.monotonic() >= self._due:
            self._inside = False
            raise SoftTimeLimitExceeded

    def __call__(self, seconds: float | None) -> SoftLimit:
        """A block in which the limit holds; with None only an order from outside ends it."""
        self._due = None if seconds is None else self._since + seconds
        return self

    def __enter__(self) -> None:
        self._inside = True
        if self._missed and self._due is not None and clock.monotonic() >= self._due:
            self._inside = False
            raise SoftTimeLimitExceeded

    def __exit__(self, *exc_info: object) -> None:
        self._inside = False


class Line:
    """The reading end of the jobs, shared with the parent.

    :param line: the socket.
    :param turns: a file, and in it the byte whose lock says who reads.
    """

    def __init__(self, line: socket.socket, turns: int, turn: int) -> None:
        self._line = line
        line.setblocking(False)
        self._turns, self._turn = turns, turn

    def next_job(self) -> wire.Job | None:
        """Wait for a job and take it; None when there will be no more."""
        while True:
            select.select([self._line], [], [])
            fcntl.lockf(self._turns, fcntl.LOCK_EX, 1, self._turn)
            try:
                head = self._read(4, patient=False)
                if head is None:
                    continue  # the parent took it back
                if not head:
                    return None
                data = self._read(wire.length_of(head), patient=True)
            finally:
                fcntl.lockf(self._turns, fcntl.LOCK_UN, 1, self._turn)
            if not data:
                return None  # the parent died while it wrote
            return wire.read_job(wire.read_frame(data))

    def _read(self, count: int, *, patient: bool) -> bytes | None:
        """So many bytes; nothing at the end of the line; None if there is none just now."""
        parts: list[bytes] = []
        left = count
        while left:
            try:
                part = self._line.recv(min(left, 1 << 20))
            except BlockingIOError:
                if not parts and not patient:
                    return None
                select.select([self._line], [], [])
                continue
            if not part:
                return b""
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


class Child:
    """Runs jobs until the line ends.

    :param app: the app whose tasks these are.
    :param options: ``hostname``, ``atomic`` and ``memory`` as the pool has them.
    :param line: where the jobs come from.
    :param results: where reports go to.
    """

    def __init__(
        self, app: TaskApp, options: dict[str, Any], line: Line, results: socket.socket
    ) -> None:
        self._app = app
        self._line = line
        self._results = results
        self._soft = SoftLimit()
        self._executor = Executor(
            app,
            options["hostname"],
            stores_with_settlement=options["atomic"],
            alarm=self._soft,
            settled_elsewhere=True,
        )
        self._measures = bool(options["memory"])

    def serve(self) -> None:
        """Run what comes."""
        self._soft.install()
        while (job := self._line.next_job()) is not None:
            started, since = clock.wall(), clock.monotonic()
            self._soft.begin(since)
            if job.watched or job.limits != (None, None):
                self._report(wire.start_frame(job.number, started, since))
            outcome = self._run(job)
            memory = _memory() if self._measures else 0
            self._report(wire.end_frame(job.number, started, outcome, memory))

    def _run(self, job: wire.Job) -> Outcome:
        message = parse(job.raw, self._app.config.accept_content)
        if isinstance(message, Unreadable):
            return self._refuse(message)
        delivery = Delivery(
            job.raw,
            message,
            job.queue,
            0,
            acknowledged=job.acknowledged,
            watched=job.watched,
            limits=job.limits,
        )
        mark_started(delivery)
        return self._executor.run(delivery)

    def _refuse(self, unreadable: Unreadable) -> Outcome:
        log.error("a message is parked: %s", unreadable.reason)
        if unreadable.task_id is not None:
            error = encode_exception(InvalidMessageError(unreadable.reason))
            record = TaskRecord(unreadable.task_id, states.FAILURE, error).done_now()
            try:
                self._app.backend.store(record)
            except Exception as exc:  # its sender waits longer; the message is what counts
                log.warning("result of %s is not stored: %s", unreadable.task_id, exc)
        return Outcome(Settlement.DEAD_LETTER, reason=unreadable.reason)

    def _report(self, data: bytes) -> None:
        try:
            self._results.sendall(data)
        except OSError:  # the parent is gone, or the task closed what is not its own
            os._exit(1)


def _memory() -> int:
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used // 1024 if sys.platform == "darwin" else used


def _ignore(signum: int, frame: object) -> None:
    """A handler, and not SIG_IGN: programs that a task starts would inherit that."""


def run_child(
    app: TaskApp,
    options: dict[str, Any],
    serial: int,
    line: socket.socket,
    results: socket.socket,
    turns: int,
) -> NoReturn:
    """The life of a child process."""
    code = 1
    try:
        # A group of its own, which can be ended with all that a task has started. What a
        # terminal or a supervisor sends to everybody is the parent's to act upon.
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _ignore)
        threading.current_thread().name = f"child-{serial}"
        results.setblocking(True)
        signals.worker_process_init.notify(None)
        Child(app, options, Line(line, turns, serial), results).serve()
        code = 0
    except BaseException:
        log.exception("a child process of the pool fails")
    finally:
        with contextlib.suppress(Exception):
            signals.worker_process_shutdown.notify(None, pid=os.getpid(), exitcode=code)
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
