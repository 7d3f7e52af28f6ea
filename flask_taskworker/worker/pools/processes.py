"""Runs deliveries in child processes, which can be ended and may die.

The parent consumes and settles, the children execute. A thread minds the children: it
reads their reports, keeps their time limits, and replaces those that die. Who does what::

    Worker  --submit-->  ProcessPool  --line-->  Child --> Executor
                              ^  \\--order-->  Template --fork--> Child
                              \\---- reports, ends ----/
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import selectors
import signal
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from ... import clock
from ...exceptions import WorkerError
from ..delivery import Delivery, Outcome
from ..waker import Waker
from . import info, shares, wire
from .endings import Endings, described
from .nursery import FAREWELL, Nursery
from .offspring import Given, Offspring

log = logging.getLogger("flask_taskworker.worker")

#: A child gets so many jobs ahead at most, while runs are short.
AHEAD = 64
#: A child that dies younger than this, with nothing done, makes the next one wait. Seconds.
TOO_YOUNG = 1.0
#: The first of those pauses; each is twice the last. The longest. Seconds.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0


class ProcessPool:
    """Runs deliveries in child processes.

    :param size: how many children.
    :param setup: what the template gets; see :func:`.template.main`.
    :param endings: makes the outcome of a run whose child died or was killed.
    :param on_news: called, in another thread, when :meth:`finished` or :meth:`starts` has
        something new.
    :param on_fault: called with an error when no child can be made at all.
    :param max_tasks: after so many runs a child is replaced.
    :param max_memory: a child that has used more than this is replaced, in KiB.
    """

    reads_bodies = can_terminate = True

    def __init__(
        self,
        size: int,
        setup: dict[str, Any],
        endings: Endings,
        on_news: Callable[[], None],
        on_fault: Callable[[WorkerError], None],
        *,
        max_tasks: int | None = None,
        max_memory: int | None = None,
    ) -> None:
        self.size = size
        self._setup = setup
        self._endings = endings
        self._on_news, self._on_fault = on_news, on_fault
        self._max_tasks, self._max_memory = max_tasks, max_memory
        self._lock = threading.RLock()
        self._todo: deque[Delivery] = deque()
        self._done: deque[tuple[Delivery, Outcome | Callable[[], Outcome]]] = deque()
        self._starts: deque[Delivery] = deque()
        self._held = 0  # touched by the consumer's thread alone
        self._numbers = itertools.count(1)
        self._serials = itertools.count(1)
        self._children: dict[int, Offspring] = {}
        self._nursery: Nursery | None = None
        self._old_nurseries: list[Nursery] = []  # each goes with its last child
        self._news = False
        self._closed = False
        self._early_deaths = 0
        self._next_birth = 0.0
        self._waker = Waker()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._waker.fileno(), selectors.EVENT_READ, None)
        self._turns = tempfile.TemporaryFile(prefix="taskworker-turns-")  # noqa: SIM115
        self._thread = threading.Thread(target=self._mind, name="taskworker-children", daemon=True)

    # -- for the consumer -----------------------------------------------------------------

    def start(self) -> None:
        with self._lock:
            self._open_nursery()
            self._thread.start()

    def submit(self, delivery: Delivery) -> None:
        with self._lock:
            self._held += 1
            self._todo.append(delivery)
            self._give_out()

    def finished(self) -> list[tuple[Delivery, Outcome]]:
        done, ended = self._done, []
        while done:
            delivery, outcome = done.popleft()
            # That of a process which died is made here: what follows may have to be sent.
            ended.append((delivery, outcome if isinstance(outcome, Outcome) else outcome()))
        self._held -= len(ended)
        return ended

    def starts(self) -> list[Delivery]:
        begun = []
        while self._starts:
            begun.append(self._starts.popleft())
        return begun

    def withdraw(self) -> list[Delivery]:
        with self._lock:
            self._recall(list(self._children.values()))
            taken = list(self._todo)
            self._todo.clear()
            self._held -= len(taken)
            return taken

    def running(self) -> list[Delivery]:
        with self._lock:
            running = []
            for child in self._children.values():
                for delivery in (job.delivery for job in child.taken()):
                    if delivery.started is None:  # its child tells only who asked to know
                        delivery.started, delivery.pid = clock.wall(), child.pid
                    running.append(delivery)
            return running

    def load(self) -> int:
        return self._held - len(self._done)

    def waiting(self) -> int:
        with self._lock:
            behind = sum(max(0, len(child.jobs) - 1) for child in self._children.values())
            return len(self._todo) + behind

    def grow(self, by: int) -> None:
        self.size += by
        self._waker.wake()

    def shrink(self, by: int) -> None:
        self.size = max(1, self.size - by)
        self._waker.wake()

    def restart(self) -> None:
        """Replace all children, with the app loaded anew; what runs ends as usual."""
        with self._lock:
            for child in self._children.values():
                self._dismiss(child)
            if self._nursery is not None:
                self._old_nurseries.append(self._nursery)
            self._next_birth, self._early_deaths = 0.0, 0
            self._open_nursery()
        self._waker.wake()

    def terminate(self, task_id: str, signal: int) -> bool:
        with self._lock:
            for child in self._children.values():
                for job in child.taken():
                    if job.delivery.message.id == task_id:
                        self._end_run(child, job, signal)
                        return True
        return False

    def info(self) -> dict[str, Any]:
        with self._lock:
            born = [child for child in self._children.values() if child.pid is not None]
            processes = [child.pid for child in born if child.pid is not None]
            given = [child.done + len(child.jobs) for child in born]
        return info(
            "processes:ProcessPool",
            self.size,
            processes,
            **{
                "max-tasks-per-child": self._max_tasks or "N/A",
                "writes": shares(given),
            },
        )

    def stop(self) -> None:
        with self._lock:
            self._closed = True
            for child in self._children.values():
                if child.jobs:
                    child.kill()  # its message went back, or was acknowledged before
                else:
                    child.dismiss()
        self._waker.wake()
        if self._thread.is_alive():
            self._thread.join(FAREWELL)
        with self._lock:
            for child in self._children.values():
                child.close()
            self._children.clear()
            for nursery in (self._nursery, *self._old_nurseries):
                if nursery is not None:
                    nursery.close()  # kills what is left
            self._nursery = None
            self._selector.close()
            self._waker.close()
            self._turns.close()

    # -- giving out -----------------------------------------------------------------------

    def _give_out(self) -> None:
        while self._todo:
            child = self._freest()
            if child is None:
                return
            delivery = self._todo.popleft()
            child.give(next(self._numbers), delivery)
            if child.clogged:
                self._waker.wake()

    def _freest(self) -> Offspring | None:
        best: Offspring | None = None
        for child in self._children.values():
            if child.leaving or child.runs_left <= 0 or child.clogged:
                continue
            if best is None or len(child.jobs) < len(best.jobs):
                best = child
        return best if best is not None and len(best.jobs) < AHEAD else None

    def _balance(self) -> None:
        """No job waits behind another while a child is idle."""
        while not self._todo:
            idle = self._freest()
            if idle is None or idle.jobs:
                return
            busiest = max(self._children.values(), key=lambda child: len(child.jobs))
            if len(busiest.jobs) < 2:
                return
            self._recall([busiest])
            if not self._todo:
                return
            self._give_out()

    def _recall(self, children: list[Offspring]) -> None:
        for child in children:
            for job in reversed(child.recall()):
                self._todo.appendleft(job.delivery)

    def _dismiss(self, child: Offspring) -> None:
        for job in reversed(child.dismiss()):
            self._todo.appendleft(job.delivery)

    # -- minding --------------------------------------------------------------------------

    def _mind(self) -> None:
        while True:
            events = self._selector.select(self._patience())
            with self._lock:
                self._waker.clear()
                for key, _ in events:
                    if key.data is not None:
                        key.data()
                if self._closed and not self._children:
                    return
                self._keep_limits()
                if not self._closed:
                    self._keep_size()
                    self._give_out()
                    self._balance()
                self._watch_lines()
                news, self._news = self._news, False
            if news:
                self._on_news()

    def _patience(self) -> float | None:
        """How long nothing has to be done, unless something happens."""
        with self._lock:
            jobs = (job for child in self._children.values() for job in child.jobs)
            times = [due for job in jobs if (due := job.next_limit()) is not None]
            if self._next_birth and not self._closed:
                times.append(self._next_birth)
        if not times or min(times) == float("inf"):
            return None
        return max(0.0, min(times) - clock.monotonic())

    def _keep_limits(self) -> None:
        now = clock.monotonic()
        for child in self._children.values():
            over = [job for job in child.jobs if (job.next_limit() or float("inf")) <= now]
            if over:
                self._read_reports(child)  # it may have ended just in time
            for job in over:
                if child.job(job.number) is not None:
                    self._enforce(child, job, now)

    def _enforce(self, child: Offspring, job: Given, now: float) -> None:
        message = job.delivery.message
        hard, soft = job.delivery.limits
        if job.at_soft_limit(now):
            log.warning(
                "task %s[%s]: its soft time limit of %g s is over", message.task, message.id, soft
            )
            child.signal_task(signal.SIGUSR1)
        else:
            log.error(
                "task %s[%s]: its time limit of %g s is over; child %s is killed",
                message.task, message.id, hard, child.pid,
            )  # fmt: skip
            job.out_of_time = True
            child.kill()

    def _end_run(self, child: Offspring, job: Given, number: int) -> None:
        """End a run from outside. SIGUSR1 only raises SoftTimeLimitExceeded in the task."""
        if number == signal.SIGUSR1:
            child.signal_task(number)
            return
        job.delivery.terminated = number
        child.signal_all(number)
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            child.kill()  # those it leaves to its parent

    def _keep_size(self) -> None:
        for child in self._children.values():
            if child.runs_left <= 0 and not child.jobs and not child.leaving:
                self._dismiss(child)
        staying = [child for child in self._children.values() if not child.leaving]
        staying.sort(key=lambda child: len(child.jobs))
        for child in staying[: max(0, len(staying) - self.size)]:
            self._dismiss(child)
        if self._next_birth > clock.monotonic():
            return
        self._next_birth = 0.0
        while len(self._children) < self.size and self._order_child():
            pass

    def _order_child(self) -> bool:
        if self._nursery is None:
            return False
        runs = self._max_tasks or float("inf")
        child = Offspring(next(self._serials), self._turns.fileno(), runs, self._nursery)
        if not self._nursery.order(child):
            child.close()
            return False
        self._children[child.serial] = child
        self._selector.register(
            child.results, selectors.EVENT_READ, lambda: self._read_reports(child)
        )
        return True

    def _watch_lines(self) -> None:
        for child in self._children.values():
            if child.clogged:
                child.push()
            self._watch(child.line_fileno(), child.clogged, child.push)

    def _watch(self, fd: int, wanted: bool, then: Callable[[], None]) -> None:
        watched = fd in self._selector.get_map()
        if wanted and not watched:
            self._selector.register(fd, selectors.EVENT_WRITE, then)
        elif watched and not wanted:
            self._selector.unregister(fd)

    # -- reports --------------------------------------------------------------------------

    def _read_reports(self, child: Offspring) -> None:
        try:
            while data := child.results.recv(1 << 18):
                for content in child.frames.feed(data):
                    self._note(child, content)
            # It closed its end: it ends, or a task closed what is not its own.
            self._unwatch(child.results)
            child.kill()
        except BlockingIOError:
            pass
        except wire.BrokenFrame as exc:
            log.error("child %s is ended, it writes nonsense: %s", child.pid, exc)
            self._unwatch(child.results)
            child.kill()
        except OSError:
            self._unwatch(child.results)

    def _unwatch(self, what: socket.socket | int) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(what)

    def _note(self, child: Offspring, content: list[Any]) -> None:
        if content[0] == "failed":
            self._fail(str(content[1]))
            return
        try:
            job = child.job(content[1])
            if job is None:
                raise wire.BrokenFrame(f"no job {content[1]!r} is in its line")
            if content[0] == "start":
                _, _, started, job.since = content
                self._note_start(child, job, started)
                return
            _, started, outcome, memory = wire.read_end(content)
        except (IndexError, TypeError, ValueError) as exc:
            raise wire.BrokenFrame(f"no report: {exc}") from None
        self._note_start(child, job, started, tell=False)
        child.jobs.remove(job)
        child.done += 1
        self._early_deaths = 0
        self._end(job.delivery, outcome)
        if self._max_memory and memory > self._max_memory and not child.leaving:
            log.info(
                "child %s has used %d KiB, more than %d; it is replaced",
                child.pid, memory, self._max_memory,
            )  # fmt: skip
            self._dismiss(child)

    def _note_start(
        self, child: Offspring, job: Given, started: float, *, tell: bool = True
    ) -> None:
        job.delivery.started, job.delivery.pid = started, child.pid
        if tell and job.delivery.watched:
            self._starts.append(job.delivery)
            self._news = True

    def _end(self, delivery: Delivery, outcome: Outcome | Callable[[], Outcome]) -> None:
        self._done.append((delivery, outcome))
        self._news = True

    # -- births and deaths ----------------------------------------------------------------

    def _open_nursery(self) -> None:
        nursery = self._nursery = Nursery(self._setup, self._turns.fileno())
        self._selector.register(
            nursery.fileno(), selectors.EVENT_READ, lambda: self._read_news(nursery)
        )

    def _read_news(self, nursery: Nursery) -> None:
        try:
            for content in nursery.news():
                self._hear(content)
        except EOFError:
            self._lose_nursery(nursery)

    def _hear(self, content: list[Any]) -> None:
        if content[0] == "failed":
            self._fail(str(content[1]))
        elif content[0] == "forked" and content[1] in self._children:
            self._children[content[1]].pid = content[2]
        elif content[0] == "ended":
            for child in list(self._children.values()):
                if child.pid == content[1]:
                    self._bury(child, content[2])

    def _fail(self, reason: str) -> None:
        self._next_birth = float("inf")
        self._on_fault(WorkerError(reason))

    def _lose_nursery(self, nursery: Nursery) -> None:
        """Its children die with it."""
        if nursery is not self._nursery and nursery not in self._old_nurseries:
            return  # it went with its last child
        self._unwatch(nursery.fileno())
        nursery.close()
        for child in list(self._children.values()):
            if child.nursery is nursery:
                child.kill()
                self._bury(child, -signal.SIGKILL)
        if nursery in self._old_nurseries:
            self._old_nurseries.remove(nursery)
            return
        self._nursery = None
        if not self._closed and self._next_birth != float("inf"):
            log.error("the process that makes children is gone; starting another")
            self._pause_births()
            self._open_nursery()

    def _bury(self, child: Offspring, code: int) -> None:
        child.dead = True
        del self._children[child.serial]
        self._read_reports(child)
        self._unwatch(child.results)
        self._unwatch(child.line_fileno())
        self._recall([child])
        for job in child.jobs:
            self._note_start(child, job, job.delivery.started or clock.wall(), tell=False)
            self._end(job.delivery, partial(self._endings.of, job, code))
        if not (child.leaving or self._closed):
            log.warning("child %s ended by %s; it is replaced", child.pid, described(code))
            if not child.done and clock.monotonic() - child.born < TOO_YOUNG:
                self._pause_births()
        child.close()
        nursery = child.nursery
        if nursery in self._old_nurseries and all(
            other.nursery is not nursery for other in self._children.values()
        ):
            self._old_nurseries.remove(nursery)
            self._unwatch(nursery.fileno())
            nursery.close()

    def _pause_births(self) -> None:
        """Children that die at once are not replaced in a rush."""
        if self._early_deaths:
            pause = min(FIRST_PAUSE * 2 ** (self._early_deaths - 1), LONGEST_PAUSE)
            self._next_birth = clock.monotonic() + pause
        self._early_deaths += 1
