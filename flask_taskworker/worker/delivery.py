"""A reserved message, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..backends.base import TaskRecord
    from ..message import TaskMessage, WireMessage


#: How often a message was delivered before this copy of it was sent. Where a broker only says
#: that a message comes again, the worker sends a copy that says how often.
DELIVERIES_HEADER = "x-taskworker-deliveries"


class Settlement(Enum):
    """How a message leaves this worker."""

    #: It is done: remove it.
    ACKNOWLEDGE = "acknowledge"
    #: Put it back for any worker.
    REQUEUE = "requeue"
    #: Keep it aside with a reason, until somebody replays or deletes it.
    DEAD_LETTER = "dead_letter"


class Outcome(NamedTuple):
    """The end of a run.

    ``record`` is the state that has to be stored; None once it is. ``statement`` is the
    same as SQL, to be run in the transaction that acknowledges the message. ``runtime`` is
    in seconds. ``state`` is what became of the task, where anything did. ``shown`` and
    ``traceback`` say it in words, if the delivery is watched. ``messages`` are to be published in
    the transaction that acknowledges, each with its queue.
    """

    settlement: Settlement
    record: TaskRecord | None = None
    statement: tuple[str, Sequence[Any]] | None = None
    reason: str = ""
    runtime: float = 0.0
    state: str = ""
    shown: str = ""
    traceback: str = ""
    messages: Sequence[tuple[str, WireMessage]] = ()


@dataclass
class Delivery:
    """A message in this worker's hands.

    ``epoch`` counts the connections of the consumer: what was reserved on an older one
    can no longer be settled, its broker hands it out again. ``watched`` says that somebody
    follows its events. ``started`` is when its run began, in epoch seconds, and ``pid`` the
    process it runs in; None before. ``has_token`` says that its task's rate limit lets it
    start, ``announced`` that its start was told. ``limits`` are the hard and the soft time limit
    of its run, in seconds; ``terminated`` is the signal with which somebody has ended it.
    """

    raw: Any
    message: TaskMessage
    queue: str
    epoch: int
    acknowledged: bool = False
    watched: bool = False
    has_token: bool = False
    started: float | None = None
    pid: int | None = None
    announced: bool = False
    limits: tuple[float | None, float | None] = (None, None)
    terminated: int | None = None
    #: What the run has sent, as tuples of results.
    children: list[Any] = field(default_factory=list)

    @property
    def delivery_count(self) -> int:
        """How often it was delivered, as far as the broker counts."""
        count = (self.raw.properties or {}).get("delivery_count")
        if isinstance(count, int):
            return count
        headers = self.raw.headers if isinstance(self.raw.headers, dict) else {}
        before = headers.get("x-delivery-count")  # RabbitMQ's own, on quorum queues
        if isinstance(before, int):
            return before + 1
        before = headers.get(DELIVERIES_HEADER)
        return 1 + (before if isinstance(before, int) else 0) + self.redelivered

    @property
    def redelivered(self) -> bool:
        """Whether this very copy was delivered before, perhaps without having been looked at."""
        return bool((self.raw.delivery_info or {}).get("redelivered"))


class Unsettled:
    """The deliveries in a worker's hands: waiting for their time or a slot, running, ended.

    The consumer's thread changes it; any thread may ask for a snapshot.
    """

    def __init__(self) -> None:
        self._deliveries: dict[int, Delivery] = {}  # by identity: a copy may have the same id

    def __len__(self) -> int:
        return len(self._deliveries)

    def add(self, delivery: Delivery) -> None:
        self._deliveries[id(delivery)] = delivery

    def discard(self, delivery: Delivery) -> None:
        self._deliveries.pop(id(delivery), None)

    def clear(self) -> None:
        self._deliveries.clear()

    def snapshot(self) -> list[Delivery]:
        """What is in it now, in the order it came."""
        while True:
            try:
                return list(self._deliveries.values())
            except RuntimeError:  # it changed meanwhile
                continue
