"""How a consumer ends: what has not started goes back, what runs gets its time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from .. import clock
from .delivery import Delivery

log = logging.getLogger("flask_taskworker.worker")


class StopRequest:
    """Whether the consumer is to end, and until when its runs may take.

    Plain values and no locks: it is made in signal handlers.

    :param on_stopping: called once, by :meth:`announce`, with the seconds that are left.
    """

    def __init__(self, on_stopping: Callable[[float], None]) -> None:
        self._on_stopping = on_stopping
        self._deadline: float | None = None
        self._announced = False
        self.made = False

    def make(self, drain_timeout: float) -> None:
        """Ask for the end, within ``drain_timeout`` seconds; the shortest time counts."""
        deadline = clock.monotonic() + drain_timeout
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
        self.made = True

    def seconds_left(self) -> float:
        """How long runs may still take."""
        return max(0.0, (self._deadline or 0.0) - clock.monotonic())

    def announce(self) -> None:
        """Tell of it, in a thread that may log."""
        if self.made and not self._announced:
            self._announced = True
            self._on_stopping(self.seconds_left())


def log_unstarted(deliveries: Iterable[Delivery]) -> None:
    """Say of what has not started that its message goes back."""
    for delivery in deliveries:
        name, task_id = delivery.message.task, delivery.message.id
        log.info("task %s[%s] has not started; its message goes back", name, task_id)


def log_running(deliveries: Iterable[Delivery]) -> None:
    """Say of what is still running what becomes of it."""
    for delivery in deliveries:
        log.warning(
            "task %s[%s] is still running; %s",
            delivery.message.task,
            delivery.message.id,
            "it ends with this process"
            if delivery.acknowledged
            else "its message goes back to the queue",
        )
