"""Settles messages: the last step of each, after all that must not be lost is stored."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from kombu.exceptions import OperationalError

from .. import failpoints, states
from ..backends.base import TaskRecord
from ..backends.encoding import encode_exception
from ..exceptions import BrokerUnavailableError, InvalidMessageError
from ..message import Unreadable, copy_of
from ..publisher import prepared
from ..queues import DEAD_SUFFIX
from .delivery import DELIVERIES_HEADER, Delivery, Outcome, Settlement

if TYPE_CHECKING:
    from ..app import TaskApp
    from ..broker import Capabilities

log = logging.getLogger("flask_taskworker.worker")

#: A message that is due later than this is sent to wait in the broker, if it can. Seconds.
LONGEST_HOLD = 5.0


class Settler:
    """Settles the messages of one channel; belongs to the thread that owns it.

    :param app: for its result backend, and to publish dead letters.
    :param channel: the kombu channel that delivered the messages.
    :param capabilities: what its transport can do.
    """

    def __init__(self, app: TaskApp, channel: Any, capabilities: Capabilities) -> None:
        self._app = app
        self._channel = channel
        self._capabilities = capabilities
        self._has_messages = False

    def keeps(self, delivery: Delivery) -> bool:
        """Whether a message that was received is to be run by this worker.

        If not, it is settled: sent to wait in the broker, sent again with the number of its
        deliveries, or set aside because there were too many. A kill between sending the copy
        and settling the message makes it run twice.

        :raises OperationalError: if the broker does not take the copy.
        """
        try:
            return not self._delayed(delivery) and not self._counted(delivery)
        except BrokerUnavailableError as exc:
            raise OperationalError(str(exc)) from exc

    def _delayed(self, delivery: Delivery) -> bool:
        message = delivery.message
        if not self._capabilities.delayed or self._capabilities.delayed_requeue:
            return False  # the latter needs no copy, see ``send_away``
        if message.eta is None or message.has_expired():
            return False
        if message.seconds_until_due() <= LONGEST_HOLD:
            return False
        self._send_copy(delivery, {}, eta_at=message.eta.timestamp())
        delivery.raw.ack()
        return True

    def _counted(self, delivery: Delivery) -> bool:
        if self._capabilities.leased or not delivery.redelivered:
            return False
        count = delivery.delivery_count - 1
        if count >= self._app.config.max_deliveries:
            reason = f"delivered {count} times without being settled; perhaps it ends its worker"
            log.error(
                "task %s[%s] is parked: %s", delivery.message.task, delivery.message.id, reason
            )
            self._dead_letter(delivery.raw, delivery.queue, reason)
            return True
        if "x-delivery-count" in (delivery.raw.headers or {}):
            return False
        self._send_copy(delivery, {DELIVERIES_HEADER: count})
        delivery.raw.ack()
        return True

    def _send_copy(self, delivery: Delivery, headers: dict[str, Any], **properties: Any) -> None:
        wire = copy_of(delivery.raw, headers)
        wire.properties.update(properties)
        self._app.publisher.send(delivery.queue, wire)

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

    def acknowledge_before_run(self, delivery: Delivery) -> None:
        """Acknowledge now and for certain: this task rather runs not at all than twice."""
        delivery.raw.ack()
        self.flush()
        delivery.acknowledged = True

    def send_away(self, delivery: Delivery, seconds: float) -> None:
        """Let a message that was not started wait in the store, as if it had not been delivered."""
        self._channel.requeue(delivery.raw.delivery_tag, delay=seconds, count_delivery=False)

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
            self._send_copy(delivery, {DELIVERIES_HEADER: count})
            delivery.raw.ack()
        else:
            delivery.raw.requeue()

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
