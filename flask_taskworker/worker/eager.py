"""Runs calls at once in the caller's thread, through the same steps as a worker would.

For tests with ``TASKER_ALWAYS_EAGER``: each message is encoded and parsed, so that an
argument which a broker could not carry fails here too. What a task leads to is run after it.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kombu.message import Message

from ..app import TaskApp
from ..backends.memory import MemoryBackend
from ..canvas.plan import Plan, Planned, Planner
from ..message import TaskMessage, Unreadable, encode, parse
from ..result import AsyncResult, result_from_tuple
from .delivery import Delivery
from .executor import Executor

if TYPE_CHECKING:
    from ..canvas.signature import Signature


def run_eagerly(app: TaskApp, message: TaskMessage, serializer: str) -> AsyncResult[Any]:
    """Run a message now, and at once again for each retry that it asks for.

    :return: a handle that is ready.
    :raises Exception: the task's own, where ``TASKER_EAGER_PROPAGATES`` is set.
    """
    eager = _EagerApp(app)
    eager.run(Plan([Planned(message, app.config.default_queue, serializer)]))
    return eager.checked(eager.result(message.id))  # type: ignore[no-any-return]


def launch_eagerly(
    app: TaskApp,
    signature: Signature[Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Any:
    """Run what a signature stands for now; returns and raises as :func:`run_eagerly`."""
    eager = _EagerApp(app)
    planner = Planner(eager, check=True)
    handle = signature.plan(planner, args, kwargs, options)
    eager.run(planner.plan)
    if handle is None:
        return None
    return eager.checked(result_from_tuple(handle.as_tuple(), eager.backend))


class _EagerApp(TaskApp):
    """An app that keeps its results in memory, and takes what it publishes for its own."""

    def __init__(self, app: TaskApp) -> None:
        super().__init__(app.config, app.registry, app.execution_context)
        self._waiting = _Waiting()
        self.__dict__["backend"] = MemoryBackend(app.config)
        self.__dict__["publisher"] = self._waiting
        self._executor = Executor(self, f"eager@{socket.gethostname()}", eager=True)

    def run(self, plan: Plan) -> None:
        """Do what a plan says, and all that comes of it."""
        self.carry_out(plan)
        waiting = self._waiting.messages
        while waiting:
            self._run_one(waiting.popleft())

    def _run_one(self, planned: Planned) -> None:
        serializer = planned.serializer or self.config.serializer
        wire = encode(planned.message.copy(eta=None), serializer)
        received = Message(
            body=wire.body,
            content_type=wire.content_type,
            content_encoding=wire.content_encoding,
            headers=wire.headers,
            properties=wire.properties,
            delivery_info={"exchange": "", "routing_key": planned.queue},
        )
        parsed = parse(received, self.config.accept_content | {serializer})
        assert not isinstance(parsed, Unreadable), parsed.reason
        self._executor.run(Delivery(received, parsed, planned.queue, epoch=0))

    def checked(self, handle: Any) -> Any:
        """The handle, unless its error is to be raised."""
        if self.config.eager_propagates and handle.failed():
            handle.get(timeout=0)
        return handle


class _Waiting:
    """Takes messages as a publisher does, for :class:`_EagerApp` to run."""

    def __init__(self) -> None:
        self.messages: deque[Planned] = deque()

    def publish(
        self, message: TaskMessage, queue: str, *, serializer: str | None = None, **more: Any
    ) -> None:
        self.messages.append(Planned(message, queue, serializer))

    def publish_many(self, messages: Sequence[Planned], **more: Any) -> None:
        self.messages.extend(messages)
