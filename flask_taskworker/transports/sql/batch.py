"""Many publishes in one transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import routing
from .codec import encode
from .dialects.base import Encoded
from .doorbell import BROADCASTS, MESSAGES

if TYPE_CHECKING:
    from .channel import Channel
    from .connection import HeldConnection


class PublishBatch:
    """Collects messages and stores them together, all or none of each flush.

    :ivar channel: the channel it belongs to; kombu compares it.
    """

    def __init__(self, channel: Channel, max_size: int) -> None:
        self.channel = channel
        self._max_size = max_size
        self._rows: list[tuple[str, str, Encoded]] = []

    def publish(
        self, message: dict[str, Any], exchange: str, routing_key: str, **kwargs: Any
    ) -> None:
        """Add a message; the batch is stored once it is full.

        :raises MessageTooLargeError: for this message; the others stay in the batch.
        """
        channel = self.channel
        row = encode(
            message,
            exchange,
            routing_key,
            channel.database.now(),
            channel.options.max_message_bytes,
        )
        channel.database.dialect.check_size(row)
        self._rows.append((exchange, routing_key, row))
        if len(self._rows) >= self._max_size:
            self.flush()

    def flush(self) -> None:
        """Store what was collected, in order, in one transaction."""
        rows, self._rows = self._rows, []
        if rows:
            held = self.channel.publishing()
            held.transaction(lambda: self._store(held, rows))
            if any(exchange for exchange, _, _ in rows):
                held.database.doorbell.ring(BROADCASTS)
            held.database.doorbell.ring(MESSAGES)

    def discard(self) -> None:
        """Forget what was collected."""
        self._rows = []

    def close(self) -> None:
        """Part of kombu's interface."""

    def _store(self, held: HeldConnection, rows: list[tuple[str, str, Encoded]]) -> None:
        plain: list[tuple[int, Encoded]] = []
        ids: dict[str, int] = {}
        for exchange, routing_key, row in rows:
            if exchange:
                held.database.dialect.insert_messages(held, plain)
                plain = []
                self.channel.route(held, exchange, routing_key, row)
                continue
            if routing_key not in ids:
                # Looked up in this transaction, so that no cached id can be stale.
                found = routing.queue_id(held, routing_key)
                assert found is not None
                ids[routing_key] = found
            plain.append((ids[routing_key], row))
        held.database.dialect.insert_messages(held, plain)
