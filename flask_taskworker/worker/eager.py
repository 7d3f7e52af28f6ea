"""Runs a call at once in the caller's thread, through the same steps as a worker would.

For tests with ``TASKER_ALWAYS_EAGER``: the message is encoded and parsed, so that an
argument which a broker could not carry fails here too.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from kombu.message import Message

from .. import states
from ..backends.memory import MemoryBackend
from ..message import TaskMessage, Unreadable, encode, parse
from ..result import AsyncResult
from .delivery import Delivery
from .executor import Executor

if TYPE_CHECKING:
    from ..app import TaskApp


def run_eagerly(app: TaskApp, message: TaskMessage, serializer: str) -> AsyncResult[Any]:
    """Run a message now, and at once again for each retry that it asks for.

    :return: a handle that is ready.
    :raises Exception: the task's own, where ``TASKER_EAGER_PROPAGATES`` is set.
    """
    results = MemoryBackend(app.config)
    todo: list[tuple[TaskMessage, str | None]] = [(message, serializer)]

    def publish(again: TaskMessage, queue: str, **options: Any) -> None:
        todo.append((again, options.get("serializer")))

    executor = Executor(
        app, f"eager@{socket.gethostname()}", backend=results, publish=publish, eager=True
    )
    while todo:
        next_message, name = todo.pop()
        executor.run(_deliver(app, next_message, name or serializer))
    handle: AsyncResult[Any] = AsyncResult(message.id, results)
    if app.config.eager_propagates and handle.state == states.FAILURE:
        handle.get(timeout=0)
    return handle


def _deliver(app: TaskApp, message: TaskMessage, serializer: str) -> Delivery:
    """The message as a worker would receive it."""
    wire = encode(message.copy(eta=None), serializer)
    queue = app.config.default_queue
    received = Message(
        body=wire.body,
        content_type=wire.content_type,
        content_encoding=wire.content_encoding,
        headers=wire.headers,
        properties=wire.properties,
        delivery_info={"exchange": "", "routing_key": queue},
    )
    parsed = parse(received, app.config.accept_content | {serializer})
    assert not isinstance(parsed, Unreadable), parsed.reason
    return Delivery(received, parsed, queue, epoch=0)
