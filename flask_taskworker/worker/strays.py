"""Runs that outlived the connection their message came over.

When a connection is lost, the broker hands out again what was not settled on it. A message that
comes back to the worker in which its run goes on, or has ended, is not run once more: the run
it had settles it.
"""

from __future__ import annotations

import logging
from typing import Literal

from .delivery import Delivery, Outcome
from .pool import Pool, withdraw

log = logging.getLogger("flask_taskworker.worker")

#: So many ended runs are remembered; their messages may have gone to another worker.
_MOST = 1000
_Key = tuple[str, int]


class Strays:
    """Belongs to the consumer's thread.

    :param pool: where the runs happen.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._running: dict[_Key, Delivery] = {}
        self._outcomes: dict[_Key, tuple[Delivery, Outcome]] = {}

    def gather(self) -> None:
        """A connection is new: forget what has not started, and remember what runs."""
        withdraw(self._pool)  # the broker hands it out again
        for delivery in self._pool.running():
            if not delivery.acknowledged:
                self._running[_key(delivery)] = delivery

    def ended(self, delivery: Delivery, outcome: Outcome) -> None:
        """Keep how a run ended until its message comes back."""
        log.warning(
            "task %s[%s] ended after its connection was lost; it runs again only if its message "
            "goes to another worker",
            delivery.message.task,
            delivery.message.id,
        )
        self._running.pop(_key(delivery), None)
        self._outcomes[_key(delivery)] = (delivery, outcome)
        if len(self._outcomes) > _MOST:
            del self._outcomes[next(iter(self._outcomes))]

    def take_up(self, again: Delivery) -> Outcome | Literal["running"] | None:
        """Whether a message that came in belongs to a run there is.

        :return: the outcome if the run has ended; "running" if it goes on, and will settle
            this message; None if it is no stray.
        """
        if not self._running and not self._outcomes:
            return None
        key = _key(again)
        known = self._running.get(key)
        if known is not None and known.raw.body == again.raw.body:
            del self._running[key]
            known.raw, known.queue, known.epoch = again.raw, again.queue, again.epoch
            return "running"
        ended = self._outcomes.get(key)
        if ended is not None and ended[0].raw.body == again.raw.body:
            del self._outcomes[key]
            return ended[1]
        return None


def _key(delivery: Delivery) -> _Key:
    return delivery.message.id, delivery.message.retries
