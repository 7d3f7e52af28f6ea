"""Time limits: which hold for a run, and how they end it where no process can be killed.

A soft limit raises SoftTimeLimitExceeded inside the task, which may catch it and clean up.
A hard limit ends the run whatever it does. In child processes a signal does the first and
SIGKILL the second (:mod:`.pools.processes`); here is what threads and event loops can do.
"""

from __future__ import annotations

import asyncio
import ctypes
import heapq
import itertools
import logging
import threading
from collections.abc import Coroutine, Generator
from typing import TYPE_CHECKING, Any

from .. import clock
from ..exceptions import ConfigurationError, SoftTimeLimitExceeded, TimeLimitExceeded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..app import TaskApp
    from ..message import TaskMessage

log = logging.getLogger("flask_taskworker.worker")

#: A hard and a soft limit in seconds.
Limits = tuple[float | None, float | None]
NO_LIMITS: Limits = (None, None)
#: How long a coroutine may clean up after its hard limit. Seconds.
GRACE = 1.0


class TimeLimits:
    """Which limits hold for a run: those of the call, else those that were set at run time,
    else the task's, else the worker's.

    :param app: whose tasks and settings.
    :param hard: the worker's, in seconds; the default is ``TASKER_TASK_TIME_LIMIT``.
    :param soft: the same; the default is ``TASKER_TASK_SOFT_TIME_LIMIT``.
    """

    def __init__(self, app: TaskApp, hard: float | None = None, soft: float | None = None) -> None:
        self._app = app
        self.hard = hard or app.config.task_time_limit
        self.soft = soft or app.config.task_soft_time_limit
        self._set: dict[str, Limits] = {}

    def set(self, task_name: str, hard: float | None, soft: float | None) -> None:
        """Set the limits of a task for the runs to come in this worker; None is no limit."""
        self._set[task_name] = (hard or None, soft or None)

    def of(self, message: TaskMessage) -> Limits:
        """The limits of one run. A soft limit that could never be reached is left out."""
        hard, soft = message.timelimit
        own_hard, own_soft = self._of_task(message.task)
        hard, soft = hard or own_hard, soft or own_soft
        if hard is not None and soft is not None and soft >= hard:
            soft = None
        return hard, soft

    def _of_task(self, name: str) -> Limits:
        known = self._set.get(name)
        if known is None:
            task = self._app.registry.get(name)
            options = task.options_ if task is not None else {}
            known = (
                options.get("time_limit", self.hard),
                options.get("soft_time_limit", self.soft),
            )
        return known


def refuse_hard_limits(app: TaskApp, queues: Sequence[str], pool: str, limits: TimeLimits) -> None:
    """Refuse to start where a hard limit that was asked for could not be kept.

    :raises ConfigurationError: naming the task or the setting, and the pool to use.
    """
    advice = (
        f"the pool {pool} cannot end a task that does not return; use the pool processes "
        "(-P processes, or TASKER_POOL = 'processes'), or soft_time_limit instead"
    )
    if limits.hard is not None:
        raise ConfigurationError(
            f"a time limit of {limits.hard:g} s for all tasks (TASKER_TASK_TIME_LIMIT, "
            f"--time-limit): {advice}."
        )
    for name, task in sorted(app.registry.items()):
        hard = task.options_.get("time_limit")
        read = task.options_.get("queue", app.config.default_queue) in queues
        if hard is not None and read and not task.is_async:
            raise ConfigurationError(f"task {name!r} has time_limit={hard!r}: {advice}.")


# -- in threads -----------------------------------------------------------------------------


class ThreadAlarm:
    """Raises SoftTimeLimitExceeded in the thread that runs a task when its time is over.

    Python code sees it at its next step; a call into C that blocks sees it when it returns.
    The one thread that watches the time starts with the first limit.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._runs: list[tuple[float, int, _Run]] = []
        self._order = itertools.count()
        self._thread: threading.Thread | None = None

    def __call__(self, seconds: float | None) -> _Run:
        """A block in which the limit holds; None is no limit."""
        return _Run(self, seconds)

    def watch(self, run: _Run, seconds: float) -> None:
        """End this run after so many seconds."""
        with self._changed:
            heapq.heappush(self._runs, (clock.monotonic() + seconds, next(self._order), run))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._ring, name="taskworker-limits", daemon=True
                )
                self._thread.start()
            self._changed.notify()

    def _ring(self) -> None:
        with self._changed:
            while True:
                while self._runs and self._runs[0][2].over:
                    heapq.heappop(self._runs)
                if not self._runs:
                    self._changed.wait()
                    continue
                left = self._runs[0][0] - clock.monotonic()
                if left > 0:
                    self._changed.wait(left)
                else:
                    heapq.heappop(self._runs)[2].strike()


class _Run:
    """One run under a limit, in its own thread."""

    def __init__(self, alarm: ThreadAlarm, seconds: float | None) -> None:
        self._alarm, self._seconds = alarm, seconds
        self._lock = threading.Lock()
        self._was_hit = False
        self.over = False

    def __enter__(self) -> None:
        if self._seconds is not None:
            self._thread = ctypes.c_ulong(threading.get_ident())
            self._alarm.watch(self, self._seconds)

    def __exit__(self, *exc_info: object) -> None:
        # If it is hit in here, the exception comes out of the block: the time is over.
        if self._seconds is None:
            return
        with self._lock:
            self.over = True
        if self._was_hit:  # what is still on its way must not hit what follows
            ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, None)

    def strike(self) -> None:
        """Raise the exception in its thread, unless the run is over."""
        with self._lock:
            if not self.over:
                self._was_hit = self.over = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    self._thread, ctypes.py_object(SoftTimeLimitExceeded)
                )


# -- in an event loop -----------------------------------------------------------------------


async def limited(awaitable: Coroutine[Any, Any, Any], limits: Limits) -> Any:
    """Await a coroutine under limits; both cancel what it waits for.

    :raises SoftTimeLimitExceeded: inside the coroutine, and out of it if that lets it go.
    :raises TimeLimitExceeded: at the hard limit.
    """
    if limits == NO_LIMITS:
        return await awaitable
    return await _Limited(awaitable, limits)


class _Limited:
    """Awaits a coroutine, and throws something of its own into it when time is over."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], limits: Limits) -> None:
        self._coroutine = coroutine
        self._hard, self._soft = limits
        self._pending: BaseException | None = None
        self._ended = False

    def __await__(self) -> Generator[Any, Any, Any]:
        task = asyncio.current_task()
        assert task is not None
        loop = task.get_loop()
        timers = []
        if self._soft is not None:
            timers.append(loop.call_later(self._soft, self._at_soft, task))
        if self._hard is not None:
            timers.append(loop.call_later(self._hard, self._at_hard, task))
            timers.append(loop.call_later(self._hard + GRACE, self._at_end, task))
        try:
            return (yield from self._steps(task))
        except (asyncio.CancelledError, GeneratorExit):
            if self._ended:
                raise TimeLimitExceeded(self._hard) from None
            raise
        finally:
            for timer in timers:
                timer.cancel()

    def _steps(self, task: asyncio.Task[Any]) -> Generator[Any, Any, Any]:
        step: Any = self._coroutine.send
        given: Any = None
        while True:
            try:
                waited_for = step(given)
            except StopIteration as end:
                if self._ended:
                    raise TimeLimitExceeded(self._hard) from None
                return end.value
            if isinstance(given, GeneratorExit):  # it waits on all the same: it is left behind
                raise TimeLimitExceeded(self._hard)
            try:
                given, step = (yield waited_for), self._coroutine.send
            except BaseException as exc:
                given, step = self._replaced(exc, task), self._coroutine.throw

    def _replaced(self, exc: BaseException, task: asyncio.Task[Any]) -> BaseException:
        """The exception for the coroutine, given the one that came from the loop."""
        pending, self._pending = self._pending, None
        if pending is None or not isinstance(exc, asyncio.CancelledError):
            return exc
        if hasattr(task, "uncancel"):
            task.uncancel()
        return pending

    def _at_soft(self, task: asyncio.Task[Any]) -> None:
        self._pending = SoftTimeLimitExceeded()
        task.cancel()

    def _at_hard(self, task: asyncio.Task[Any]) -> None:
        self._ended = True
        self._pending = asyncio.CancelledError()
        task.cancel()

    def _at_end(self, task: asyncio.Task[Any]) -> None:
        self._pending = GeneratorExit()
        task.cancel()
