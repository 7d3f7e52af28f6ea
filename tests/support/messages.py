"""Messages as a broker hands them out, without a broker."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from kombu.message import Message

from flask_taskworker import Task
from flask_taskworker.canvas.plan import Planned
from flask_taskworker.message import Payload, TaskMessage, WireMessage, encode, parse
from flask_taskworker.worker.delivery import Delivery


def received(wire: WireMessage, **more: Any) -> Message:
    """The kombu message that a consumer gets for what was sent."""
    return Message(
        body=wire.body,
        content_type=wire.content_type,
        content_encoding=wire.content_encoding,
        headers=wire.headers,
        properties=wire.properties,
        **more,
    )


def deliver(task: Task[..., Any] | str, *args: Any, **fields: Any) -> Delivery:
    """A reserved message of a task, once through the wire.

    :param fields: of the :class:`TaskMessage`; ``kwargs`` are the keyword arguments,
        ``properties`` are added to those of the message.
    """
    kwargs: Mapping[str, Any] = fields.pop("kwargs", {})
    properties: Mapping[str, Any] = fields.pop("properties", {})
    name = task if isinstance(task, str) else task.name
    sent = TaskMessage(
        task=name, id=fields.pop("id", None) or str(uuid.uuid4()), payload=Payload(args, kwargs)
    )
    wire = encode(sent.copy(**fields))
    wire.properties.update(properties)
    raw = received(wire, delivery_info={"exchange": "", "routing_key": "celery"})
    message = parse(raw, {"json"})
    assert isinstance(message, TaskMessage), message
    return Delivery(raw, message, "celery", epoch=1)


class RecordingPublisher:
    """Takes messages as a publisher would, and keeps them. Raises ``error`` if there is one."""

    def __init__(self) -> None:
        self.published: list[tuple[TaskMessage, str]] = []
        self.sent: list[tuple[str, WireMessage]] = []
        self.options: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def publish(self, message: TaskMessage, queue: str, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        encode(message, options.get("serializer") or "json")
        self.published.append((message, queue))
        self.options.append(options)

    def publish_many(self, messages: Sequence[Planned], **options: Any) -> None:
        for planned in messages:
            self.publish(planned.message, planned.queue, serializer=planned.serializer, **options)

    def send(self, queue: str, wire: WireMessage) -> None:
        if self.error is not None:
            raise self.error
        self.sent.append((queue, wire))

    def close(self) -> None:
        pass
