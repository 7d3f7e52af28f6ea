"""Which messages this channel has in its hands, and how many it may have."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .channel import Channel

#: How many messages one claim takes when the prefetch count sets no limit.
CLAIM_LIMIT = 64


class Delivered(NamedTuple):
    """A message in this consumer's hands."""

    id: int
    owner: int


class QoS:
    """Prefetch limit and unsettled messages of a channel.

    Delivery tags count up from 1 within a channel, as in AMQP. They are not the row's id:
    a message that was lost and claimed again is another delivery.
    """

    restore_at_shutdown = True

    def __init__(self, channel: Channel, prefetch_count: int = 0) -> None:
        self._channel = channel
        self.prefetch_count = prefetch_count
        self._delivered: dict[int, Delivered] = {}
        self._tag_of: dict[Delivered, int] = {}
        self._tags = count(1)

    def can_consume(self) -> bool:
        """Whether at least one more message may be delivered."""
        return not self.prefetch_count or len(self._delivered) < self.prefetch_count

    def can_consume_max_estimate(self) -> int | None:
        """How many more may be delivered; None: no limit."""
        if not self.prefetch_count:
            return None
        return max(0, self.prefetch_count - len(self._delivered))

    def claim_size(self) -> int:
        """How many to claim at once."""
        room = self.can_consume_max_estimate()
        return CLAIM_LIMIT if room is None else min(room, CLAIM_LIMIT)

    def next_tag(self) -> int:
        return next(self._tags)

    def track(self, tag: int, delivered: Delivered) -> bool:
        """Note a claimed message.

        :returns: False if the same row was in the books: it had been taken away unnoticed, and
            perhaps is another message now, for SQLite gives ids of deleted rows again. The
            earlier delivery is forgotten, so that settling it does not settle this one.
        """
        earlier = self._tag_of.pop(delivered, None)
        if earlier is not None:
            self._delivered.pop(earlier, None)
        self._delivered[tag] = delivered
        self._tag_of[delivered] = tag
        return earlier is None

    def append(self, message: Any, delivery_tag: int) -> None:
        """Part of kombu's interface; claims are noted by :meth:`track`."""

    def get(self, delivery_tag: int) -> Delivered:
        return self._delivered[delivery_tag]

    def pop(self, delivery_tag: int) -> Delivered | None:
        """Forget a message that is being settled; None if it was before."""
        delivered = self._delivered.pop(delivery_tag, None)
        if delivered is not None:
            self._tag_of.pop(delivered, None)
        return delivered

    def tags(self) -> list[int]:
        """The tags of all unsettled messages, oldest first."""
        return sorted(self._delivered)

    def message_ids(self) -> set[int]:
        """The ids of all unsettled messages."""
        return {delivered.id for delivered in list(self._delivered.values())}

    def clear(self) -> None:
        self._delivered.clear()
        self._tag_of.clear()

    def ack(self, delivery_tag: int) -> None:
        self._channel.basic_ack(delivery_tag)

    def reject(self, delivery_tag: int, requeue: bool = False) -> None:
        self._channel.basic_reject(delivery_tag, requeue=requeue)

    def restore_unacked(self) -> None:
        self._channel.give_back()

    def restore_unacked_once(self, stderr: Any = None) -> None:
        self._channel.give_back()

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Part of kombu's interface; the janitor does it."""
