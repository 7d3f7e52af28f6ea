"""Where runs happen: what the consumer needs of a pool.

A pool takes deliveries, runs them and hands back what became of them. It never talks to
the broker: settling belongs to the thread that owns the connection. The kinds of pools
are in :mod:`.pools`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .delivery import Delivery, Outcome

Run = Callable[[Delivery], Outcome]


class Pool(Protocol):
    """What the consumer needs of a pool. All of it is called in the consumer's thread."""

    #: How many deliveries can run at once.
    size: int
    #: Whether runs happen in other processes, which read the bodies of messages themselves.
    reads_bodies: bool
    #: Whether it can end a task that runs: by :meth:`terminate`, or at its hard time limit.
    can_terminate: bool

    def start(self) -> None:
        """Get ready to run; called once, before anything else."""

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

        :return: False if it does not run here, or this kind of pool cannot.
        """

    def info(self) -> dict[str, Any]:
        """What remote control shows of it, in Celery's words."""

    def stop(self) -> None:
        """End its threads once they are idle. Does not wait for running tasks."""


def withdraw(pool: Pool) -> list[Delivery]:
    """Take back what has not started, save what is acknowledged: that has to run here."""
    withdrawn = []
    for delivery in pool.withdraw():
        if delivery.acknowledged:
            pool.submit(delivery)
        else:
            withdrawn.append(delivery)
    return withdrawn
