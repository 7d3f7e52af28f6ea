"""Who follows what happens to deliveries: events, remote control. It never changes an outcome."""

from __future__ import annotations

from typing import Protocol

from .delivery import Delivery, Outcome


class Observer(Protocol):
    """Called in the consumer's thread. An error in one is logged and changes nothing."""

    def received(self, delivery: Delivery) -> None:
        """A delivery came in; setting ``watched`` asks for starts and words."""

    def started(self, delivery: Delivery) -> None:
        """The run of a watched delivery began."""

    def ended(self, delivery: Delivery, outcome: Outcome) -> None:
        """A run ended, and its message is settled."""
