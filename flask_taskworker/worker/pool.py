"""Where runs happen: in the consumer's own thread, or in several.

A pool takes deliveries, runs them and hands back what became of them. It never talks to
the broker: settling belongs to the thread that owns the connection.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Protocol

from .. import clock
from ..exceptions import WorkerError
from .delivery import Delivery, Outcome

Run = Callable[[Delivery], Outcome]


class Pool(Protocol):
    """What the consumer needs of a pool."""

    #: How many deliveries can run at once.
    size: int

    def submit(self, delivery: Delivery) -> None:
        """Take a delivery; it runs as soon as a slot is free."""

    def finished(self) -> list[tuple[Delivery, Outcome]]:
        """What has ended since the last call."""

    def starts(self) -> list[Delivery]:
        """The watched deliveries that have started since the last call."""

    def withdraw(self) -> list[Delivery]:
        """Give back the deliveries that have not started."""

    def running(self) -> list[Delivery]:
        """The deliveries that have started and not ended."""

    def load(self) -> int:
        """How many deliveries it holds: waiting and running."""

    def waiting(self) -> int:
        """How many of them have not started."""

    def grow(self, by: int) -> None:
        """Run so many more at once.

        :raises WorkerError: if this kind of pool cannot.
        """

    def shrink(self, by: int) -> None:
        """Run so many fewer at once, at least one; what runs ends as usual. Raises as ``grow``."""

    def terminate(self, task_id: str, signal: int) -> bool:
        """End the run of a task by a signal to its process.

        :return: False if it does not run here, or cannot be ended in this kind of pool.
        """

    def info(self) -> dict[str, Any]:
        """What remote control shows of it, in Celery's words."""

    def stop(self) -> None:
        """End its threads once they are idle. Does not wait for running tasks."""


class SoloPool:
    """Runs each delivery in the consumer's thread, one at a time."""

    size = 1

    def __init__(self, run: Run) -> None:
        self._run = run
        self._finished: list[tuple[Delivery, Outcome]] = []

    def submit(self, delivery: Delivery) -> None:
        _mark_started(delivery)
        self._finished.append((delivery, self._run(delivery)))

    def starts(self) -> list[Delivery]:
        return [delivery for delivery, _ in self._finished if delivery.watched]

    def finished(self) -> list[tuple[Delivery, Outcome]]:
        ended, self._finished = self._finished, []
        return ended

    def withdraw(self) -> list[Delivery]:
        return []

    def running(self) -> list[Delivery]:
        return []

    def load(self) -> int:
        return 0

    def waiting(self) -> int:
        return 0

    def grow(self, by: int) -> None:
        raise WorkerError("the solo pool runs one task at a time; use -P threads or -P processes")

    shrink = grow

    def terminate(self, task_id: str, signal: int) -> bool:
        return False

    def info(self) -> dict[str, Any]:
        return _info("solo", 1, [os.getpid()])

    def stop(self) -> None:
        pass


class ThreadPool:
    """Runs deliveries in threads of this process.

    :param size: how many at once.
    :param run: runs one delivery; must not raise.
    :param on_finished: called in a pool thread after each run.
    """

    def __init__(self, size: int, run: Run, on_finished: Callable[[], None]) -> None:
        self.size = size
        self._run = run
        self._on_finished = on_finished
        self._todo: SimpleQueue[Delivery | None] = SimpleQueue()
        self._done: deque[tuple[Delivery, Outcome]] = deque()
        self._active: dict[int, Delivery] = {}
        self._starts: deque[Delivery] = deque()
        self._threads: list[threading.Thread] = []
        self._held = 0  # touched by the consumer's thread alone

    def submit(self, delivery: Delivery) -> None:
        self._held += 1
        if len(self._threads) < min(self._held, self.size):
            self._start_thread()
        self._todo.put(delivery)

    def finished(self) -> list[tuple[Delivery, Outcome]]:
        done, ended = self._done, []
        while done:
            ended.append(done.popleft())
        self._held -= len(ended)
        return ended

    def starts(self) -> list[Delivery]:
        begun = []
        while self._starts:
            begun.append(self._starts.popleft())
        return begun

    def withdraw(self) -> list[Delivery]:
        taken: list[Delivery] = []
        while not self._todo.empty():
            try:
                delivery = self._todo.get_nowait()
            except Exception:  # queue.Empty: a thread was faster
                break
            if delivery is not None:
                taken.append(delivery)
        self._held -= len(taken)
        return taken

    def running(self) -> list[Delivery]:
        return list(self._active.values())

    def load(self) -> int:
        return self._held - len(self._done)

    def waiting(self) -> int:
        return self._todo.qsize()

    def grow(self, by: int) -> None:
        self.size += by

    def shrink(self, by: int) -> None:
        self.size = max(1, self.size - by)
        for _ in range(len(self._threads) - self.size):
            self._todo.put(None)

    def terminate(self, task_id: str, signal: int) -> bool:
        return False

    def info(self) -> dict[str, Any]:
        return _info("threads", self.size, [os.getpid()])

    def stop(self) -> None:
        for _ in self._threads:
            self._todo.put(None)

    def _start_thread(self) -> None:
        thread = threading.Thread(
            target=self._work, name=f"taskworker-pool-{len(self._threads) + 1}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        ident = threading.get_ident()
        while (delivery := self._todo.get()) is not None:
            self._active[ident] = delivery
            _mark_started(delivery)
            if delivery.watched:
                self._starts.append(delivery)
                self._on_finished()
            outcome = self._run(delivery)
            self._done.append((delivery, outcome))
            del self._active[ident]
            self._on_finished()
        self._threads.remove(threading.current_thread())


def _mark_started(delivery: Delivery) -> None:
    delivery.started, delivery.pid = clock.wall(), os.getpid()


def _info(implementation: str, size: int, processes: list[int]) -> dict[str, Any]:
    return {
        "implementation": f"flask_taskworker.worker.pool:{implementation}",
        "max-concurrency": size,
        "processes": processes,
    }
