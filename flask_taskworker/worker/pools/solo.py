"""Runs each delivery in the consumer's own thread."""

from __future__ import annotations

import os
from typing import Any

from ...exceptions import WorkerError
from ..delivery import Delivery, Outcome
from ..pool import Run
from . import info, mark_started


class SoloPool:
    """Runs each delivery in the consumer's thread, one at a time."""

    size = 1
    reads_bodies = can_terminate = False

    def __init__(self, run: Run) -> None:
        self._run = run
        self._finished: list[tuple[Delivery, Outcome]] = []

    def start(self) -> None:
        pass

    def submit(self, delivery: Delivery) -> None:
        mark_started(delivery)
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
        return info("solo:SoloPool", 1, [os.getpid()])

    def stop(self) -> None:
        pass
