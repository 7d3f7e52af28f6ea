"""How many messages to reserve: what can run now, and a little more while runs are short."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import kombu

    from ..broker import Capabilities

#: The reserve beyond the free slots never holds more than this much work. Seconds.
AHEAD_SECONDS = 0.02
#: ... nor more messages than this.
AHEAD_MESSAGES = 128
#: Weight of the newest run in the mean runtime.
_NEWEST = 0.1


class Prefetch:
    """Follows the free slots of a pool and the mean runtime of its tasks.

    With nothing known about the tasks it reserves one message a free slot, so that a
    long task never hoards work that another worker could do. While runs are short it
    reserves up to 20 ms of work ahead: a broker is asked once for many messages.

    :param slots: how many tasks the pool runs at once.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.received = 0
        #: Whether the last request brought all that it asked for.
        self.was_filled = False
        self.limit = slots
        self._mean: float | None = None

    def reset(self) -> None:
        """Forget what is known about runtimes."""
        self._mean = None
        self.limit = self.slots

    def observe(self, runtime: float) -> None:
        """Take the runtime of a task, in seconds, into account."""
        mean = self._mean
        self._mean = runtime if mean is None else mean + _NEWEST * (runtime - mean)

    def ahead(self) -> int:
        """How many messages to hold beyond the slots."""
        if self._mean is None:
            return 0
        work = self.slots * AHEAD_SECONDS
        if self._mean * AHEAD_MESSAGES <= work:  # it may be 0, or nearly
            return AHEAD_MESSAGES
        return int(work / self._mean)

    def room(self, load: int) -> int:
        """How many messages to reserve when the pool holds ``load``.

        Waits until half of the extra reserve is used up, so that each request brings
        a portion and not a single message.
        """
        ahead = self.ahead()
        room = self.slots + ahead - load
        return room if load < self.slots or room * 2 >= ahead else 0

    def apply(self, channel: Any, capabilities: Capabilities, room: int, unsettled: int) -> None:
        """Tell the channel how many unsettled messages it may deliver."""
        wanted = unsettled + room
        if capabilities.cheap_prefetch:
            channel.basic_qos(0, wanted, False)
        elif wanted > self.limit or wanted * 4 < self.limit:  # a round trip: only if it matters
            channel.basic_qos(0, wanted, True)
            self.limit = wanted

    def fill(self, connection: kombu.Connection, room: int) -> int:
        """Receive as many messages as there is room for; return how many there were.

        Whoever gets a message counts it in :attr:`received`.
        """
        if room <= 0:
            return 0
        before = self.received
        while self.received - before < room:
            try:
                connection.drain_events(timeout=0)
            except (TimeoutError, BlockingIOError):
                break
        received = self.received - before
        self.was_filled = received >= room
        return received
