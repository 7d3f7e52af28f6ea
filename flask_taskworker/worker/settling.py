"""Settles messages: the last step of each, after all that must not be lost is stored."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from .. import clock, failpoints, states
from ..backends.base import TaskRecord
from ..backends.encoding import encode_exception
from ..exceptions import InvalidMessageError
from ..message import Unreadable, copy_of
from ..publisher import prepared
from ..queues import DEAD_SUFFIX
from .delivery import DELIVERIES_HEADER, Delivery, Outcome, Settlement, Unsettled

if TYPE_CHECKING:
    from ..app import TaskApp
    from ..broker import Capabilities

log = logging.getLogger("flask_taskworker.worker")


class Settler:
    """Settles the messages of one channel; belongs to the thread that owns it.

    Where it has to publish, it raises what
    :meth:`Publisher.send <flask_taskworker.publisher.Publisher.send>` raises; the message is
    not settled then.

    :param app: for its result backend, and to publish copies and dead letters.
    :param channel: the kombu channel that delivered the messages.
    :param capabilities: what its transport can do.
    :param unsettled: what is settled is taken out of it.
    """

    def __init__(
        self, app: TaskApp, channel: Any, capabilities: Capabilities, unsettled: Unsettled
    ) -> None:
        self._app = app
        self._channel = channel
        self._capabilities = capabilities
        self._unsettled = unsettled
        self._has_messages = False

    def settle(self, delivery: Delivery, outcome: Outcome) -> None:
        """Do what the outcome says."""
        if delivery.acknowledged:
            store_alone(self._app, outcome)
            if outcome.settlement is not Settlement.ACKNOWLEDGE:
                log.error(
                    "task %s[%s] cannot go back, it was acknowledged before it ran "
                    "(acks_late=False): %s",
                    delivery.message.task,
                    delivery.message.id,
                    outcome.reason,
                )
        elif outcome.settlement is Settlement.ACKNOWLEDGE:
            self._acknowledge(delivery, outcome)
        elif outcome.settlement is Settlement.REQUEUE:
            self._requeue(delivery.raw)
        else:
            store_alone(self._app, outcome)
            self._dead_letter(delivery.raw, delivery.queue, outcome.reason)
        self._unsettled.discard(delivery)

    def acknowledge_before_run(self, delivery: Delivery) -> None:
        """Acknowledge now and for certain: this task rather runs not at all than twice."""
        delivery.raw.ack()
        self.flush()
        delivery.acknowledged = True

    def recount(self, delivery: Delivery) -> bool:
        """Count a message that comes again, where the broker does not.

        It is sent again with the number of its deliveries, or set aside because there were too
        many. A kill between sending the copy and settling the message makes it run twice.

        :return: whether it is settled by that, and not to be run.
        """
        if self._capabilities.leased or not delivery.redelivered:
            return False
        count = delivery.delivery_count - 1
        if count >= self._app.config.max_deliveries:
            reason = f"delivered {count} times without being settled; perhaps it ends its worker"
            log.error(
                "task %s[%s] is parked: %s", delivery.message.task, delivery.message.id, reason
            )
            self._dead_letter(delivery.raw, delivery.queue, reason)
        elif "x-delivery-count" in (delivery.raw.headers or {}):
            return False
        else:
            self._replace(delivery, {DELIVERIES_HEADER: count})
        self._unsettled.discard(delivery)
        return True

    def delay(self, delivery: Delivery, seconds: float) -> None:
        """Let a message that was not started wait in the broker, as if it had not been delivered.

        Where the broker delays only what is published, a copy waits: a kill between sending it
        and settling the message makes the task run twice.
        """
        if self._capabilities.delayed_requeue:
            self._channel.requeue(delivery.raw.delivery_tag, delay=seconds, count_delivery=False)
        else:
            self._replace(delivery, {}, eta_at=clock.wall() + seconds)
        self._unsettled.discard(delivery)

    def give_back(self, delivery: Delivery) -> None:
        """Return a message that was not started, as if it had not been delivered."""
        if delivery.acknowledged:
            log.error(
                "task %s[%s] is lost: it is acknowledged before it runs (acks_late=False), and "
                "this worker stops before it could",
                delivery.message.task,
                delivery.message.id,
            )
        elif self._capabilities.leased:
            self._channel.requeue(delivery.raw.delivery_tag, count_delivery=False)
        elif count := (delivery.raw.headers or {}).get(DELIVERIES_HEADER):
            # Returned, it would come back as one that was delivered once more.
            self._replace(delivery, {DELIVERIES_HEADER: count})
        else:
            delivery.raw.requeue()
        self._unsettled.discard(delivery)

    def park(self, raw: Any, queue: str, unreadable: Unreadable) -> None:
        """Keep a message that is no task message aside, with the reason."""
        log.error("message in queue %s is parked: %s", queue, unreadable.reason)
        if unreadable.task_id is not None:
            error = InvalidMessageError(unreadable.reason)
            record = TaskRecord(
                unreadable.task_id, states.FAILURE, encode_exception(error)
            ).done_now()
            try:
                self._app.backend.store(record)
            except Exception as exc:  # its sender waits longer; the message is what counts
                log.warning("result of %s is not stored: %s", unreadable.task_id, exc)
        self._dead_letter(raw, queue, unreadable.reason)

    def flush(self) -> None:
        """Send what the channel has buffered."""
        if self._capabilities.buffers:
            self._channel.flush()

    def flush_messages(self) -> None:
        """Send what is buffered if there are messages in it: somebody may wait for them."""
        if self._has_messages:
            self.flush()
            self._has_messages = False

    def _acknowledge(self, delivery: Delivery, outcome: Outcome) -> None:
        if outcome.statement is not None or outcome.messages:
            from ..transports.sql.doorbell import RESULTS

            statements = [] if outcome.statement is None else [outcome.statement]
            messages = [
                (queue, prepared(self._channel, wire, delayed=self._capabilities.delayed))
                for queue, wire in outcome.messages
            ]
            tag = delivery.raw.delivery_tag
            self._channel.settle_with(
                tag, statements, ring=RESULTS if statements else None, messages=messages
            )
            self._has_messages = bool(messages) or self._has_messages
        else:
            failpoints.hit("before_ack")
            delivery.raw.ack()
            failpoints.hit("after_ack")

    def _replace(self, delivery: Delivery, headers: dict[str, Any], **properties: Any) -> None:
        """Settle a message by a copy of it."""
        wire = copy_of(delivery.raw, headers)
        wire.properties.update(properties)
        self._app.publisher.send(delivery.queue, wire)
        delivery.raw.ack()

    def _requeue(self, raw: Any) -> None:
        failpoints.hit("before_requeue")
        raw.requeue()
        failpoints.hit("after_requeue")

    def _dead_letter(self, raw: Any, queue: str, reason: str) -> None:
        failpoints.hit("before_dead_letter")
        if self._capabilities.dead_letter:
            self._channel.dead_letter(raw.delivery_tag, reason)
        else:
            self._publish_dead_letter(raw, queue + DEAD_SUFFIX, reason)
            raw.ack()
        failpoints.hit("after_dead_letter")

    def _publish_dead_letter(self, raw: Any, queue: str, reason: str) -> None:
        self._app.publisher.send(queue, copy_of(raw, {"x-dead-letter-reason": reason}))


def store_alone(app: TaskApp, outcome: Outcome) -> None:
    """Store what an outcome carries where no acknowledgement goes with it."""
    if outcome.record is not None:
        app.backend.store(outcome.record)
