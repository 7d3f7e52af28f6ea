"""Settles messages: the last step of each, after all that must not be lost is stored."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from .. import failpoints, states
from ..backends.base import TaskRecord
from ..backends.encoding import encode_exception
from ..exceptions import InvalidMessageError
from ..message import Unreadable, WireMessage
from ..queues import DEAD_SUFFIX
from .delivery import Delivery, Outcome, Settlement

if TYPE_CHECKING:
    from ..app import TaskApp
    from ..broker import Capabilities

log = logging.getLogger("flask_taskworker.worker")


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
        if self._capabilities.leased:
            self._channel.flush()

    def _acknowledge(self, delivery: Delivery, outcome: Outcome) -> None:
        if outcome.statement is not None:
            from ..transports.sql.doorbell import RESULTS

            self._channel.settle_with(delivery.raw.delivery_tag, [outcome.statement], ring=RESULTS)
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
        headers = dict(raw.headers) if isinstance(raw.headers, dict) else {}
        headers["x-dead-letter-reason"] = reason
        # kombu unpacked the body; a header that says it is packed would be wrong now
        headers.pop("compression", None)
        properties = {"delivery_mode": 2}
        body = raw.body if isinstance(raw.body, (bytes, str)) else repr(raw.body)
        content_type = raw.content_type if isinstance(raw.content_type, str) else "application/data"
        encoding = raw.content_encoding if isinstance(raw.content_encoding, str) else "binary"
        self._app.publisher.send(
            queue, WireMessage(body, content_type, encoding, headers, properties)
        )


def store_alone(app: TaskApp, outcome: Outcome) -> None:
    """Store what an outcome carries where no acknowledgement goes with it."""
    if outcome.record is not None:
        app.backend.store(outcome.record)
