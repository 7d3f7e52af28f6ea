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
    """Run a message now.

    :return: a handle that is ready.
    :raises Exception: the task's own, where ``TASKER_EAGER_PROPAGATES`` is set.
    """
    wire = encode(message, serializer)
    received = Message(
        body=wire.body,
        content_type=wire.content_type,
        content_encoding=wire.content_encoding,
        headers=wire.headers,
        properties=wire.properties,
        delivery_info={"exchange": "", "routing_key": app.config.default_queue},
    )
    parsed = parse(received, app.config.accept_content | {serializer})
    assert not isinstance(parsed, Unreadable), parsed.reason
    results = MemoryBackend(app.config)
    executor = Executor(app, f"eager@{socket.gethostname()}", backend=results)
    executor.run(Delivery(received, parsed, app.config.default_queue, epoch=0))
    handle: AsyncResult[Any] = AsyncResult(message.id, results)
    if app.config.eager_propagates and handle.state == states.FAILURE:
        handle.get(timeout=0)
    return handle
