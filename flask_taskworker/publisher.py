"""Sends messages to the broker: a few connections per process, and never longer than allowed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import kombu
from kombu.clocks import LamportClock

from . import clock, failpoints, signals
from .broker import (
    PUBLISHER_ANSWER_TIMEOUT,
    Capabilities,
    broker_connection,
    capabilities_of,
    drop,
    interrupt,
    is_hopeless,
    recoverable_errors,
)
from .config import mask_url
from .exceptions import BrokerUnavailableError, MessageTooLargeError
from .message import TaskMessage, WireMessage, encode, origin
from .overdue import Overdue
from .stock import Stock

if TYPE_CHECKING:
    from .canvas.plan import Planned
    from .config import Config
    from .transports.fleet import Fleet

log = logging.getLogger("flask_taskworker")

#: How often and how fast a publish is tried again; the numbers are Celery's.
RETRY_POLICY: dict[str, float] = {
    "max_retries": 3,
    "interval_start": 0.0,
    "interval_step": 0.2,
    "interval_max": 1.0,
}
_UNLIMITED = nullcontext()
#: How much later than half of the time another attempt may start. Seconds.
_SLACK = 0.25


class Publisher:
    """Publishes task messages. Safe to use from several threads, and after a fork.

    Each thread that publishes borrows a connection from a small stock and gives it back.

    :param logical_clock: what stamps the events about what is sent.
    """

    def __init__(self, config: Config, logical_clock: LamportClock | None = None) -> None:
        self.config = config
        self._clock = logical_clock or LamportClock()
        self._stock = Stock(
            lambda: _Sender(config),
            _Sender.close,
            config.pool_limit,
            config.publish_timeout / 2,
            _Sender.drop,
        )
        # libpq waits for an answer without end, where all other drivers have a limit.
        endless = config.broker_url.startswith("taskworker+postgresql")
        self._overdue = Overdue(_Sender.cut) if endless else None

    def publish(
        self,
        message: TaskMessage,
        queue: str,
        *,
        serializer: str | None = None,
        compression: str | None = None,
        retry: bool = True,
        retry_policy: Mapping[str, float] | None = None,
        reply_queue: kombu.Queue | None = None,
    ) -> None:
        """Send one message, durably. When this returns, the broker has it.

        :param queue: the queue's name; it is declared if need be.
        :param reply_queue: where the result will be sent to, to be declared as well.
        :param retry: whether to try again when the broker cannot be reached.
        :param retry_policy: overrides parts of :data:`RETRY_POLICY`; seconds.
        :raises EncodeError: if an argument cannot be serialized.
        :raises MessageTooLargeError: if it is larger than ``TASKER_MAX_MESSAGE_BYTES``.
        :raises BrokerUnavailableError: if that did not succeed within
            ``TASKER_PUBLISH_TIMEOUT`` seconds.
        """
        wire = self._encode(message, serializer, compression)
        policy = _policy(retry, retry_policy)
        if signals.before_task_publish.receivers:
            _tell_before(message, wire, queue, policy)
        failpoints.hit("before_publish")
        self._bounded(lambda sender: sender.send(queue, wire, reply_queue), policy)
        failpoints.hit("after_publish")
        self._tell_after(message, wire, queue)

    def publish_many(
        self,
        messages: Sequence[Planned],
        *,
        reply_queue: kombu.Queue | None = None,
        transaction: Any = None,
    ) -> None:
        """Send several messages: all or none where the broker is a database.

        Elsewhere they go one by one, and those in front of an error are sent.

        :param transaction: a connection to the broker's database with an open transaction:
            the messages appear when that commits.

        Raises what :meth:`publish` raises.
        """
        if not messages:
            return
        # All are encoded before the first is sent: none goes if one cannot.
        wires = [self._encode(m.message, m.serializer, m.compression) for m in messages]
        policy = _policy(messages[0].retry and transaction is None, messages[0].retry_policy)
        if signals.before_task_publish.receivers:
            for planned, wire in zip(messages, wires, strict=True):
                _tell_before(planned.message, wire, planned.queue, policy)
        items = [(planned.queue, wire) for planned, wire in zip(messages, wires, strict=True)]
        failpoints.hit("before_publish")
        self._bounded(_Shipment(items, reply_queue, transaction).send, policy)
        failpoints.hit("after_publish")
        for planned, wire in zip(messages, wires, strict=True):
            self._tell_after(planned.message, wire, planned.queue)

    def pack(self, messages: Sequence[Planned]) -> list[tuple[str, WireMessage]] | None:
        """Messages to be published by somebody else, each with its queue.

        :return: None if each publish is to be told of, which only this object does.
        :raises EncodeError: if one cannot be serialized.
        :raises MessageTooLargeError: if one is larger than ``TASKER_MAX_MESSAGE_BYTES``.
        """
        watched = signals.before_task_publish.receivers or signals.after_task_publish.receivers
        if watched or self.config.send_sent_event:
            return None
        return [(m.queue, self._encode(m.message, m.serializer, m.compression)) for m in messages]

    def _encode(
        self, message: TaskMessage, serializer: str | None, compression: str | None
    ) -> WireMessage:
        config = self.config
        wire = encode(
            message,
            serializer or config.serializer,
            compression if compression is not None else config.compression,
        )
        if len(wire.body) > config.max_message_bytes:
            raise MessageTooLargeError(
                f"task {message.task!r} was not sent: its message has {len(wire.body)} bytes, "
                f"TASKER_MAX_MESSAGE_BYTES allows {config.max_message_bytes}. "
                "Store the data and pass its key."
            )
        if message.eta is not None:
            wire.properties["eta_at"] = message.eta.timestamp()
        return wire

    def _tell_after(self, message: TaskMessage, wire: WireMessage, queue: str) -> None:
        if self.config.send_sent_event:
            self._announce(message, wire, queue)
        if signals.after_task_publish.receivers:
            signals.after_task_publish.notify(
                message.task, body=_body(message), exchange="", routing_key=queue,
                headers=wire.headers,
            )  # fmt: skip

    def _announce(self, message: TaskMessage, wire: WireMessage, queue: str) -> None:
        """Send the event ``task-sent``. The task is on its way, whatever comes of this."""
        from . import events

        fields = {
            "uuid": message.id,
            "root_id": wire.headers["root_id"],
            "parent_id": message.parent_id,
            "name": message.task,
            "args": wire.headers["argsrepr"],
            "kwargs": wire.headers["kwargsrepr"],
            "retries": message.retries,
            "eta": wire.headers["eta"],
            "expires": wire.headers["expires"],
            "queue": queue,
            "exchange": "",
            "routing_key": queue,
        }
        body = events.event("task-sent", origin(), self._clock.forward(), fields)
        try:
            self._bounded(
                lambda sender: events.publish(sender.channel(), body, "task.sent", origin()),
                {**RETRY_POLICY, "max_retries": 0},
            )
        except Exception as exc:
            log.warning("no event about the sending of task %s: %s", message.id, exc)

    def send(self, queue: str, wire: WireMessage) -> None:
        """Send an encoded message to a task queue; raises as :meth:`publish`."""
        self._bounded(lambda sender: sender.send(queue, wire), RETRY_POLICY)

    def reply(self, queue: str, wire: WireMessage) -> None:
        """Send to a queue that its reader declares; raises as :meth:`publish`."""
        self._bounded(lambda sender: sender.put(queue, wire), RETRY_POLICY)

    def queue_size(self, queue: str) -> int:
        """How many messages wait in a queue (an estimate on large SQL queues)."""
        size: int = self._bounded(lambda sender: sender.queue_size(queue), RETRY_POLICY)
        return size

    def with_fleet(self, action: Callable[[Fleet], Any]) -> Any:
        """Do something with what the broker keeps for all workers; None if it keeps nothing.

        :raises BrokerUnavailableError: as :meth:`publish`.
        """
        from .transports.fleet import fleet_of

        def act(sender: _Sender) -> Any:
            fleet = fleet_of(sender.channel())
            return None if fleet is None else action(fleet)

        return self._bounded(act, RETRY_POLICY)

    def unavailable(self, exc: BaseException) -> BrokerUnavailableError:
        """What to tell who wanted to use the broker."""
        return _unavailable(self.config, exc)

    def _bounded(self, action: Callable[[_Sender], Any], policy: Mapping[str, float]) -> Any:
        # One attempt may take half of the time, as connecting does. The last one has to start
        # early enough, or a broker that does not answer costs more time than is allowed.
        began = clock.monotonic()
        last_start = began + self.config.publish_timeout / 2 + _SLACK
        due = began + self.config.publish_timeout + PUBLISHER_ANSWER_TIMEOUT
        attempt = 0
        while True:
            sender = self._stock.take(max(0.0, last_start - clock.monotonic()))
            try:
                with self._limited(sender, due):
                    outcome = action(sender)
            except sender.errors as exc:
                self._stock.discard(sender)
                self._stock.discard_idle()  # they went through the same broker
                pause = min(
                    policy["interval_start"] + attempt * policy["interval_step"],
                    policy["interval_max"],
                )
                attempt += 1
                ends = is_hopeless(exc) or attempt > policy["max_retries"]
                if ends or clock.monotonic() + pause > last_start:
                    raise _unavailable(self.config, exc) from exc
                time.sleep(pause)
            except BaseException:
                self._stock.discard(sender)
                raise
            else:
                self._stock.give_back(sender)
                return outcome

    def _limited(self, sender: _Sender, due: float) -> AbstractContextManager[None]:
        return _UNLIMITED if self._overdue is None else self._overdue.watched(sender, due)

    def close(self) -> None:
        """Close the connections of this process."""
        self._stock.close()


def _tell_before(
    message: TaskMessage, wire: WireMessage, queue: str, policy: Mapping[str, float]
) -> None:
    """What receivers change in headers and properties is sent."""
    signals.before_task_publish.notify(
        message.task, body=_body(message), exchange="", routing_key=queue, headers=wire.headers,
        properties=wire.properties, declare=[task_queue(queue)], retry_policy=dict(policy),
    )  # fmt: skip


def _body(message: TaskMessage) -> tuple[Any, Any, dict[str, Any]]:
    """The body as it is before it is serialized."""
    payload = message.payload
    after = {name: getattr(payload, name) for name in ("callbacks", "errbacks", "chain", "chord")}
    return payload.args, payload.kwargs, after


def _policy(retry: bool, overrides: Mapping[str, float] | None) -> Mapping[str, float]:
    if not retry:
        return {**RETRY_POLICY, "max_retries": 0}
    if not overrides:
        return RETRY_POLICY
    policy = {**RETRY_POLICY, **overrides}
    if policy["max_retries"] is None:  # Celery's spelling of "for ever": the deadline ends it
        policy["max_retries"] = float("inf")
    return policy


def _unavailable(config: Config, exc: BaseException) -> BrokerUnavailableError:
    cause = str(exc).rstrip(".") or type(exc).__name__
    hint = "Is it running? Without TASKER_BROKER_URL the built-in SQLite broker needs no server."
    if config.broker_url.startswith("taskworker+"):
        hint = "The task was not queued."
    elif _was_refused(exc):
        hint = "The server answers, but not to this address: check TASKER_BROKER_URL."
    return BrokerUnavailableError(
        f"broker {mask_url(config.broker_url)} cannot be used: {cause}. {hint}"
    )


def _was_refused(exc: BaseException) -> bool:
    """Whether a server said no: to the login, say, or to a virtual host that it does not have."""
    told: BaseException | None = exc
    while told is not None:
        if getattr(told, "reply_code", None) in (403, 530) or "AUTH" in type(told).__name__.upper():
            return True
        told = told.__cause__
    return False


class _Shipment:
    """Several messages on their way; another attempt goes on where the last one ended."""

    def __init__(
        self,
        items: Sequence[tuple[str, WireMessage]],
        reply_queue: kombu.Queue | None,
        transaction: Any,
    ) -> None:
        self._items = items
        self._sent = 0
        self._reply_queue = reply_queue
        self._transaction = transaction

    def send(self, sender: _Sender) -> None:
        """Send what is not sent yet."""
        if sender.is_atomic():
            sender.send_together(self._items, self._reply_queue, self._transaction)
            return
        for queue, wire in self._items[self._sent :]:
            sender.send(queue, wire, self._reply_queue)
            self._sent += 1


class _Sender:
    """One connection to the broker with one channel, used by one thread at a time."""

    def __init__(self, config: Config) -> None:
        self.connection: kombu.Connection = broker_connection(config, role="publish")
        self.errors = recoverable_errors(self.connection)
        self._channel: Any = None
        self._declared: set[str] = set()
        self._capabilities: Capabilities | None = None

    def channel(self) -> Any:
        if self._channel is None:
            self._channel = self.connection.default_channel
            self._capabilities = capabilities_of(self.connection)
        return self._channel

    def send(self, queue: str, wire: WireMessage, reply_queue: kombu.Queue | None = None) -> None:
        if queue not in self._declared:
            self._declare(task_queue(queue))
        if reply_queue is not None and reply_queue.name not in self._declared:
            self._declare(reply_queue)
        self.put(queue, wire, mandatory=True)

    def _declare(self, queue: kombu.Queue) -> None:
        queue(self.channel()).declare()
        self._declared.add(queue.name)

    def is_atomic(self) -> bool:
        """Whether several messages can be sent in one transaction."""
        self.channel()
        return self._capabilities is not None and self._capabilities.atomic_settle

    def send_together(
        self,
        items: Sequence[tuple[str, WireMessage]],
        reply_queue: kombu.Queue | None,
        transaction: Any,
    ) -> None:
        """Send all in one transaction, or in the one that is given."""
        if reply_queue is not None and reply_queue.name not in self._declared:
            self._declare(reply_queue)
        channel = self.channel()
        if transaction is not None:
            for queue, wire in items:
                channel.publish_through(transaction, self._prepare(wire), queue)
            return
        batch = channel.create_publish_batch(len(items) + 1)
        for queue, wire in items:
            if queue not in self._declared:
                self._declare(task_queue(queue))
            batch.publish(self._prepare(wire), "", queue)
        batch.flush()

    def put(self, queue: str, wire: WireMessage, *, mandatory: bool = False) -> None:
        channel, message = self.channel(), self._prepare(wire)
        assert self._capabilities is not None
        more = {"mandatory": True} if mandatory and self._capabilities.returns else {}
        channel.basic_publish(message, exchange="", routing_key=queue, **more)

    def _prepare(self, wire: WireMessage) -> Any:
        channel = self.channel()
        assert self._capabilities is not None
        return prepared(channel, wire, delayed=self._capabilities.delayed)

    def queue_size(self, queue: str) -> int:
        task_queue(queue)(self.channel()).declare()
        # Not passively: in Redis a queue that is empty does not exist.
        declared = self.channel().queue_declare(queue=queue, durable=True, auto_delete=False)
        return int(declared.message_count)

    def close(self) -> None:
        self.connection.release()

    def drop(self) -> None:
        drop(self.connection)

    def cut(self) -> None:
        interrupt(self.connection)


def prepared(channel: Any, wire: WireMessage, *, delayed: bool) -> Any:
    """A message as a channel publishes it.

    :param delayed: whether the broker keeps messages until they are due.
    """
    properties = dict(wire.properties)  # kombu writes into it; a retry needs it as it was
    priority = properties.pop("priority", 0)
    eta_at = properties.pop("eta_at", None)
    # A broker drops what has expired without a word. A worker reads the header, and tells
    # the sender that the task is revoked.
    properties.pop("expiration", None)
    if eta_at is not None and delayed:
        properties["eta_at"] = eta_at
    body = wire.body
    return channel.prepare_message(
        body.encode("utf-8") if isinstance(body, str) else body,
        priority=priority,
        content_type=wire.content_type,
        content_encoding=wire.content_encoding,
        headers=wire.headers,
        properties=properties,
    )


def task_queue(name: str) -> kombu.Queue:
    """A task queue with the flags that Celery gives it, so that both may share it."""
    exchange = kombu.Exchange(name, type="direct", durable=True)
    return kombu.Queue(name, exchange, routing_key=name, durable=True)
