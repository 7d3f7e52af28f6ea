"""Runs deliveries in threads of this process, and ``async def`` tasks on an event loop in it."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from ..delivery import Delivery, Outcome
from ..pool import Run
from . import info, mark_started
from .event_loop import EventLoop

#: How many ``async def`` tasks run at once for each thread that there may be.
ASYNC_PER_THREAD = 25


#: More than any consumer reserves.
_FULL = 1 << 16
T = TypeVar("T")


class ThreadPool:
    """Runs deliveries in threads of this process.

    What is ``async def`` is awaited on one event loop, :data:`ASYNC_PER_THREAD` times as many
    at once as there are threads, and takes no thread.

    :param size: how many at once.
    :param run: runs one delivery; must not raise.
    :param on_finished: called in a pool thread after each run.
    :param is_async: says which deliveries are for the event loop.
    :param run_async: awaits one of those; must not raise.
    """

    reads_bodies = can_terminate = False

    def __init__(
        self,
        size: int,
        run: Run,
        on_finished: Callable[[], None],
        is_async: Callable[[Delivery], bool] = lambda delivery: False,
        run_async: Callable[[Delivery], Coroutine[Any, Any, Outcome]] | None = None,
    ) -> None:
        self.size = size
        self._run, self._run_async = run, run_async
        self._is_async = is_async
        self._on_finished = on_finished
        self._loop: EventLoop | None = None
        self._awaited = 0  # on the loop; touched by the consumer's thread alone
        self._awaited_done: deque[tuple[Delivery, Outcome]] = deque()
        self._todo: SimpleQueue[Delivery | None] = SimpleQueue()
        self._done: deque[tuple[Delivery, Outcome]] = deque()
        self._active: dict[int, Delivery] = {}
        self._starts: deque[Delivery] = deque()
        self._threads: list[threading.Thread] = []
        self._held = 0  # touched by the consumer's thread alone

    def start(self) -> None:
        pass

    def submit(self, delivery: Delivery) -> None:
        if self._run_async is not None and self._is_async(delivery):
            self._submit_async(delivery)
            return
        self._held += 1
        if len(self._threads) < min(self._held, self.size):
            self._start_thread()
        self._todo.put(delivery)

    def finished(self) -> list[tuple[Delivery, Outcome]]:
        ended = _emptied(self._done)
        self._held -= len(ended)
        awaited = _emptied(self._awaited_done)
        self._awaited -= len(awaited)
        return ended + awaited

    def starts(self) -> list[Delivery]:
        return _emptied(self._starts)

    def withdraw(self) -> list[Delivery]:
        taken: list[Delivery] = []
        while not self._todo.empty():
            try:
                delivery = self._todo.get_nowait()
            except Empty:  # a thread was faster
                break
            if delivery is not None:
                taken.append(delivery)
        self._held -= len(taken)
        return taken

    def running(self) -> list[Delivery]:
        awaited = self._loop.running() if self._loop is not None else []
        return list(self._active.values()) + awaited

    def load(self) -> int:
        load = self._held - len(self._done)
        # What is awaited takes no slot, until it is too much.
        full = self._awaited - len(self._awaited_done) >= self.size * ASYNC_PER_THREAD
        return load + _FULL if full else load

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
        return info("threads:ThreadPool", self.size, [os.getpid()])

    def stop(self) -> None:
        for _ in self._threads:
            self._todo.put(None)
        if self._loop is not None:
            self._loop.stop()

    def _submit_async(self, delivery: Delivery) -> None:
        if self._loop is None:
            assert self._run_async is not None
            self._loop = EventLoop(self._run_async, self._begun, self._async_ended)
        self._awaited += 1
        self._loop.submit(delivery)

    def _begun(self, delivery: Delivery) -> None:
        if delivery.watched:
            self._starts.append(delivery)
            self._on_finished()

    def _async_ended(self, delivery: Delivery, outcome: Outcome) -> None:
        self._awaited_done.append((delivery, outcome))
        self._on_finished()

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
            mark_started(delivery)
            self._begun(delivery)
            outcome = self._run(delivery)
            self._done.append((delivery, outcome))
            del self._active[ident]
            self._on_finished()
        self._threads.remove(threading.current_thread())


def _emptied(queue: deque[T]) -> list[T]:
    items = []
    while queue:
        items.append(queue.popleft())
    return items
