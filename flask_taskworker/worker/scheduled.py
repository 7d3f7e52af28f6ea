"""Deliveries that may not start yet: for their ETA, or for the rate limit of their task.

They wait in the broker where that can delay what it has handed out, and here elsewhere.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from .. import clock
from .delivery import Delivery
from .rates import AHEAD, RateLimits

if TYPE_CHECKING:
    from ..broker import Capabilities
    from .settling import Settler

#: A message that may not start for longer than this goes back to the broker, if that can
#: delay it. Seconds.
HELD_HERE = 2.0
#: Where no broker can, so many messages wait here at most; then no more are taken.
MOST_HELD = 10_000


class Scheduled:
    """Starts each delivery when its time has come; belongs to the consumer's thread.

    :param rates: how many runs of a task may start in a time.
    :param start: runs a delivery.
    :param burst: whether the worker ends when the queues are empty. They would seem to be, if
        what waits for its rate limit waited in the broker.
    """

    def __init__(
        self, rates: RateLimits, start: Callable[[Delivery], None], *, burst: bool = False
    ) -> None:
        self._rates = rates
        self._rates_version = rates.version
        self._start = start
        self._burst = burst
        self._heap: list[tuple[float, int, Delivery]] = []  # by when they are due
        self._order = itertools.count()

    def connect(self, settler: Settler, capabilities: Capabilities) -> None:
        """Begin anew with a connection: its broker hands out again what waited here."""
        self._heap.clear()
        self._settler = settler
        self._delays_etas = capabilities.delayed or capabilities.delayed_requeue
        # A message may find no token many times, and a copy each time would cost too much.
        self._delays_excess = capabilities.delayed_requeue and not self._burst

    def add(self, delivery: Delivery) -> None:
        """Start a delivery as soon as its ETA and its rate limit allow."""
        message = delivery.message
        wait = 0.0 if message.eta is None else message.seconds_until_due()
        if wait <= 0 or message.has_expired():
            self._start_at_rate(delivery)
        elif wait > HELD_HERE and self._delays_etas:
            self._settler.delay(delivery, wait)
        else:
            self._hold(delivery, wait)

    def start_due(self, has_room: Callable[[], bool]) -> None:
        """Start what has come due, while there is room for it."""
        if self._rates_version != self._rates.version:
            self._reserve_tokens_again()
        while self.is_due() and has_room():
            self._start_at_rate(heapq.heappop(self._heap)[2])

    def is_due(self) -> bool:
        """Whether anything could start, had it room."""
        return bool(self._heap) and self._heap[0][0] <= clock.monotonic()

    def next_due(self) -> float:
        """When the next one is due, on the monotonic clock."""
        return self._heap[0][0] if self._heap else math.inf

    def is_full(self) -> bool:
        """Whether no more may be taken from the broker."""
        return len(self._heap) >= MOST_HELD

    def pop_due(self) -> list[Delivery]:
        """Take out what has come due, without starting it."""
        due = []
        while self.is_due():
            due.append(heapq.heappop(self._heap)[2])
        return due

    def pop_all(self) -> list[Delivery]:
        """Take out everything."""
        deliveries = self.snapshot()
        self._heap.clear()
        return deliveries

    def keep_if(self, wanted: Callable[[Delivery], bool]) -> None:
        """Drop what is not wanted any more."""
        self._heap = [entry for entry in self._heap if wanted(entry[2])]
        heapq.heapify(self._heap)

    def snapshot(self) -> list[Delivery]:
        """What waits here, the next one first. Any thread may ask."""
        while True:
            try:
                return [delivery for _, _, delivery in sorted(self._heap)]
            except RuntimeError:  # it changed meanwhile
                continue

    def _start_at_rate(self, delivery: Delivery) -> None:
        name = delivery.message.task
        wait: float | None = 0.0
        if not delivery.has_token:
            wait = self._rates.reserve(name, AHEAD if self._delays_excess else math.inf)
        if wait is None:
            self._settler.delay(delivery, self._rates.send_away(name))
        elif wait > 0:
            delivery.has_token = True
            self._hold(delivery, wait)
        else:
            self._start(delivery)

    def _hold(self, delivery: Delivery, seconds: float) -> None:
        entry = (clock.monotonic() + seconds, next(self._order), delivery)
        heapq.heappush(self._heap, entry)

    def _reserve_tokens_again(self) -> None:
        """A limit has changed: what waits for a token may wait too long now."""
        self._rates_version = self._rates.version
        waiting = [delivery for delivery in self.snapshot() if delivery.has_token]
        self.keep_if(lambda delivery: not delivery.has_token)
        for delivery in waiting:
            delivery.has_token = False
            self._start_at_rate(delivery)
