"""Runs ``async def`` tasks, many at a time, on one event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from ..delivery import Delivery, Outcome
from . import mark_started


class EventLoop:
    """Awaits runs on one loop. Each has a context of its own.

    :param run: awaits one delivery; must not raise.
    :param on_start: called in the loop's thread when a run begins.
    :param on_end: called in the loop's thread after each run.
    """

    def __init__(
        self,
        run: Callable[[Delivery], Coroutine[Any, Any, Outcome]],
        on_start: Callable[[Delivery], None],
        on_end: Callable[[Delivery, Outcome], None],
    ) -> None:
        self._run = run
        self._on_start, self._on_end = on_start, on_end
        self._tasks: dict[asyncio.Task[None], Delivery] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="taskworker-loop", daemon=True)
        self._thread.start()

    def submit(self, delivery: Delivery) -> None:
        """Begin to await a delivery."""
        self._loop.call_soon_threadsafe(self._begin, delivery)

    def running(self) -> list[Delivery]:
        """What is being awaited."""
        return list(self._tasks.values())

    def stop(self) -> None:
        """Cancel what still runs, and end the loop. Does not wait for either."""
        self._loop.call_soon_threadsafe(self._end)

    def _begin(self, delivery: Delivery) -> None:
        task = self._loop.create_task(self._follow(delivery))
        self._tasks[task] = delivery
        task.add_done_callback(lambda task: self._tasks.pop(task, None))

    async def _follow(self, delivery: Delivery) -> None:
        mark_started(delivery)
        self._on_start(delivery)
        self._on_end(delivery, await self._run(delivery))

    def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._loop.call_later(0.1, self._loop.stop)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
