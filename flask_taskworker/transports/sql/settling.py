"""Acknowledging, returning and parking delivered messages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from .channel_base import ChannelBase
from .codec import encode
from .dialects.base import Encoded
from .doorbell import MESSAGES
from .errors import DatabaseUnusableError
from .settlements import Settlement, Statement, settle, settle_one_by_one

log = logging.getLogger(__name__)

#: Settlements that are written at once rather than kept for the next claim.
_FLUSH_AT = 64


class Settling(ChannelBase):
    """What becomes of delivered messages. Any thread may say it; one thread writes it."""

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        """Delete a message: it is done. Any thread; written with the next claim or flush."""
        for tag in self._tags(delivery_tag, multiple):
            self._settle(tag, "ack")

    def basic_reject(self, delivery_tag: int, requeue: bool = False) -> None:
        """Put a message back at its old place, or discard it. Any thread."""
        self._settle(delivery_tag, "requeue" if requeue else "ack")

    def basic_recover(self, requeue: bool = False) -> None:
        """Put all unsettled messages of this channel back, to be delivered again."""
        for tag in self.qos.tags():
            self._settle(tag, "requeue")
        self.flush()

    def requeue(
        self, delivery_tag: int, *, delay: float | None = None, count_delivery: bool = True
    ) -> None:
        """Put a message back, at its old place in the queue. Any thread.

        :param delay: seconds until it may be delivered again.
        :param count_delivery: False if nobody began to work on it: this delivery then does
            not count towards ``max_deliveries``.
        """
        due = self.database.now() + delay if delay is not None and delay > 0 else None
        self._settle(delivery_tag, "requeue", due=due, counted=count_delivery)

    def dead_letter(self, delivery_tag: int, reason: str) -> None:
        """Keep a message aside, with its reason, until somebody replays or deletes it."""
        self._settle(delivery_tag, "dead_letter", reason=reason)

    def settle_with(
        self,
        delivery_tag: int,
        statements: Sequence[Statement] = (),
        ring: int | None = None,
        messages: Sequence[tuple[str, dict[str, Any]]] = (),
    ) -> None:
        """Acknowledge a message and run statements in the same transaction. Any thread.

        If the message is not ours any more, the statements are not run.

        :param statements: (sql, parameters) in the driver's style (``database.dialect.sql``
            turns ``?`` into it), for tables of :attr:`database`.
        :param ring: the kind of sleepers to wake after the commit.
        :param messages: to be published with it: (queue, message), made by ``prepare_message``.
        """
        encoded = tuple((queue, self.encoded(message, queue)) for queue, message in messages)
        self._settle(delivery_tag, "ack", statements=tuple(statements), ring=ring, messages=encoded)

    def encoded(self, message: dict[str, Any], queue: str) -> Encoded:
        """A message for a queue as it is stored.

        :raises MessageTooLargeError: above ``max_message_bytes``.
        """
        database = self.database
        row = encode(message, "", queue, database.now(), self.options.max_message_bytes)
        database.dialect.check_size(row)
        return row

    def _tags(self, tag: int, multiple: bool) -> list[int]:
        if not multiple:
            return [tag]
        return [known for known in self.qos.tags() if known <= tag or tag == 0]

    def _settle(self, tag: int, kind: Any, **details: Any) -> None:
        delivered = self.qos.pop(tag)
        if delivered is None:
            log.debug("delivery %r is settled already, or of an earlier connection", tag)
            return
        self.settlements.add(Settlement(kind, delivered.id, delivered.owner, **details))
        transport = self.connection
        if transport is not None:
            transport.settlement_added(self)

    def flush_if_due(self) -> None:
        """Write settlements that should not wait for a claim any longer."""
        if self.settlements and (
            len(self.settlements) >= _FLUSH_AT or self.settlements.age() >= self.options.ack_delay
        ):
            self.flush()

    def flush(self) -> None:
        """Write all buffered settlements now. Only for the thread that owns the channel.

        :raises DatabaseUnavailableError: they stay buffered.
        """
        batch = self.settlements.take()
        if not batch:
            return
        held = None
        try:
            held = self.held()
            if held.durable:
                held.set_durable(False)
            lost = settle(held, self.database.dialect, batch)
        except DatabaseUnusableError:
            if held is None:
                self.settlements.put_back(batch)
                raise
            lost, faulty = settle_one_by_one(held, self.database.dialect, batch)
            for item, exc in faulty:
                log.error("message %d cannot be settled, it is delivered again: %s", item.id, exc)
                lost += settle(
                    held, self.database.dialect, [Settlement("requeue", item.id, item.owner)]
                )
        except BaseException:
            self.settlements.put_back(batch)
            raise
        self.settled(batch, lost)

    def settled(self, batch: Sequence[Settlement], lost: Sequence[Settlement] = ()) -> None:
        """After the commit: wake who waits for it, report what was refused."""
        bell = self.database.doorbell
        refused = {id(item) for item in lost}
        kinds = {item.ring for item in batch if item.ring is not None and id(item) not in refused}
        if MESSAGES in kinds or any(item.kind == "requeue" or item.messages for item in batch):
            self.database.wake(self.held())
        for kind in kinds - {MESSAGES}:
            bell.ring(kind)
        if lost:
            self.report_lost([item.id for item in lost])

    def report_lost(self, ids: Sequence[int]) -> None:
        """Say that messages had been taken away from this consumer."""
        self.lost_leases += len(ids)
        log.warning(
            "%d message(s) had been taken away from this consumer and were not settled: %s",
            len(ids),
            ", ".join(str(id) for id in ids[:20]),
        )
        if self.on_lost_lease is not None:
            self.on_lost_lease(len(ids))

    def give_back(self) -> None:
        """Return what is unsettled; these deliveries do not count."""
        self._consumption.drop_undelivered()
        for tag in self.qos.tags():
            self._settle(tag, "requeue", counted=False)
        self.flush()
