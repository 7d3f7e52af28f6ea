"""Runs that have ended, and whose messages are not settled yet."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from .delivery import Delivery, Outcome, Unsettled
from .settling import store_alone
from .strays import Strays

if TYPE_CHECKING:
    from ..app import TaskApp
    from .pool import Pool
    from .settling import Settler

log = logging.getLogger("flask_taskworker.worker")


class EndedRuns:
    """Settled in the order they ended; belongs to the consumer's thread.

    :param pool: where the runs happen.
    :param unsettled: what is in the worker's hands.
    """

    def __init__(self, pool: Pool, unsettled: Unsettled) -> None:
        self._pool = pool
        self._unsettled = unsettled
        self._strays = Strays(pool)
        self._ended: deque[tuple[Delivery, Outcome]] = deque()
        self._ended_before: deque[tuple[Delivery, Outcome]] = deque()

    def add(self, delivery: Delivery, outcome: Outcome) -> None:
        """Take a delivery that is to be settled as its outcome says."""
        self._ended.append((delivery, outcome))

    def extend(self, ended: Iterable[tuple[Delivery, Outcome]]) -> None:
        """Take several of them."""
        self._ended.extend(ended)

    def connect(self) -> None:
        """A connection is new: its broker hands out again what is not settled."""
        self._unsettled.clear()
        self._strays.gather()

    def settles(self, delivery: Delivery) -> bool:
        """Whether a message that came in belongs to a run there is, which then settles it."""
        outcome = self._strays.take_up(delivery)
        if outcome is None:
            return False
        if isinstance(outcome, Outcome):
            self._ended_before.append((delivery, outcome))
        else:  # the run goes on
            self._unsettled.discard(delivery)
            for running in self._pool.running():
                if running.raw is delivery.raw:
                    self._unsettled.add(running)
        return True

    def settle(self, settler: Settler, epoch: int) -> Iterator[tuple[Delivery, Outcome]]:
        """Settle all; those that have just ended come back, once each is settled.

        :param epoch: the number of the connection that the settler is for.
        """
        while self._ended:
            delivery, outcome = self._ended[0]  # it stays first in line until it is settled
            self._settle_one(settler, epoch, delivery, outcome)
            self._ended.popleft()
            yield delivery, outcome
        while self._ended_before:
            self._settle_one(settler, epoch, *self._ended_before[0])
            self._ended_before.popleft()

    def store_without_broker(self, app: TaskApp) -> None:
        """Keep the results after the last connection is gone.

        Of what is not acknowledged, another run will say how it ended.
        """
        while self._ended:
            delivery, outcome = self._ended.popleft()
            if not delivery.acknowledged:
                continue
            try:
                store_alone(app, outcome)
            except Exception as exc:
                name, task_id = delivery.message.task, delivery.message.id
                log.error("the result of task %s[%s] is lost: %s", name, task_id, exc)

    def _settle_one(
        self, settler: Settler, epoch: int, delivery: Delivery, outcome: Outcome
    ) -> None:
        if delivery.acknowledged or delivery.epoch == epoch:
            settler.settle(delivery, outcome)
        else:
            self._strays.ended(delivery, outcome)
