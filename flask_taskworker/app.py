"""One app's side of everything: its configuration, its connections, its results.

A :class:`TaskApp` knows nothing of Flask. What surrounds a run is a context manager
that the extension hands in.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from .result import AsyncResult, GroupResult
from .task import current_request

if TYPE_CHECKING:
    from kombu.clocks import LamportClock

    from .backends.base import ResultBackend, Transaction
    from .canvas.plan import Plan
    from .canvas.signature import Signature
    from .config import Config
    from .control import Control
    from .message import TaskMessage
    from .options import CallOptions
    from .publisher import Publisher
    from .registry import Registry
    from .task import Task

R = TypeVar("R")

#: Gives the context a run happens in; the argument says whether it wants a request context.
ExecutionContext = Callable[[bool], AbstractContextManager[object]]


class TaskApp:
    """Sends the tasks of one app and reads their results.

    :param config: the app's settings.
    :param registry: the tasks there are.
    :param execution_context: makes the context manager that surrounds a run.
    """

    def __init__(
        self, config: Config, registry: Registry, execution_context: ExecutionContext
    ) -> None:
        self.config = config
        self.registry = registry
        self.execution_context = execution_context
        self._oid = str(uuid.uuid4())

    # Made at first use: importing kombu and a database driver costs more than an app
    # that sends nothing should pay.

    @cached_property
    def publisher(self) -> Publisher:
        from .publisher import Publisher

        return Publisher(self.config, self.clock)

    @cached_property
    def backend(self) -> ResultBackend:
        from .backends import create_backend

        return create_backend(self.config, lambda queue, wire: self.publisher.reply(queue, wire))

    @cached_property
    def control(self) -> Control:
        """Remote control of the workers."""
        from .control import Control

        return Control(self)

    @cached_property
    def clock(self) -> LamportClock:
        """The logical clock that orders what the processes of a broker say."""
        from kombu.clocks import LamportClock

        return LamportClock()

    @cached_property
    def _compose(self) -> Callable[..., TaskMessage]:
        from .calls import compose

        return compose

    @cached_property
    def new_id(self) -> Callable[[], str]:
        """Makes an id for a call."""
        from .calls import new_id

        return new_id

    def option_of(self, task_name: str, option: str) -> Any:
        """What a task sets for an option; or else the setting of the same name."""
        default = getattr(self.config, option)
        task = self.registry.get(task_name)
        return default if task is None else task.options_.get(option, default)

    def result(self, task_id: str) -> AsyncResult[Any]:
        """The handle to the call with this id."""
        return AsyncResult(task_id, self.backend, self)

    def group_result(self, group_id: str, results: Iterable[Any]) -> GroupResult:
        """The handle to a group, from those to its members."""
        return GroupResult(group_id, results, self.backend)

    def send(
        self,
        task: Task[..., R],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: CallOptions,
    ) -> AsyncResult[R]:
        """Queue one call; the arguments and options are checked already."""
        message = self._compose(task, args, kwargs, options, self.config, self.reply_to())
        defaults = task.options_
        serializer = options.get("serializer") or defaults.get("serializer")
        if self.config.always_eager:
            from .worker.eager import run_eagerly

            return run_eagerly(self, message, serializer or self.config.serializer)
        self.publisher.publish(
            message,
            options.get("queue") or defaults.get("queue") or self.config.default_queue,
            serializer=serializer,
            compression=options.get("compression", defaults.get("compression")),
            retry=options.get("retry", True),
            retry_policy=options.get("retry_policy"),
            reply_queue=self.backend.reply_queue(),
        )
        handle: AsyncResult[R] = AsyncResult(message.id, self.backend, self)
        _note_child(handle)
        return handle

    def launch(
        self,
        signature: Signature[Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> Any:
        """Send a signature, with whatever that takes; its options are checked already.

        :return: the handle to its result; None for an empty chain.
        """
        from .canvas.plan import Planner

        if self.config.always_eager:
            from .worker.eager import launch_eagerly

            return launch_eagerly(self, signature, args, kwargs, options)
        planner = Planner(self, check=True)
        handle = signature.plan(planner, args, kwargs, options)
        self.carry_out(planner.plan, awaited=True)
        if options.get("add_to_parent", True):
            _note_child(handle)
        return handle

    def carry_out(
        self, plan: Plan, *, awaited: bool = False, transaction: Transaction | None = None
    ) -> None:
        """Do what a plan says.

        :param awaited: whether this process may read the results.
        :param transaction: of a result backend, which the messages are sent with.
        :raises BrokerUnavailableError: if the broker cannot be reached in time.
        """
        for chord in plan.chords:
            self.backend.open_chord(*chord, transaction=transaction)
        connection = None
        if transaction is not None and transaction.carries_messages:
            connection = transaction.connection
        self.publisher.publish_many(
            plan.messages,
            reply_queue=self.backend.reply_queue() if awaited else None,
            transaction=connection,
        )

    def reply_to(self) -> str:
        """The address for results that are sent as messages."""
        queue = self.backend.reply_queue()
        # Celery always sends an address; without one it would take ours for a broken message.
        return queue.name if queue is not None else self._oid

    def send_by_name(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: CallOptions,
    ) -> AsyncResult[Any]:
        """Queue a call of a task by its name; another program may be the one that defines it.

        Raises what :meth:`Task.apply_async <flask_taskworker.task.Task.apply_async>` raises.
        The arguments of a task that is not registered here cannot be checked.
        """
        from .task import Task

        task = self.registry.get(name)
        if task is None:
            task = Task(_defined_elsewhere, lambda: self, options={"name": name})
        result: AsyncResult[Any] = task.apply_async(args, kwargs, **options)
        return result

    def reconfigure(self, config: Config) -> None:
        """Use other settings from now on; connections that are open are closed."""
        self.close()
        for part in ("publisher", "backend"):
            self.__dict__.pop(part, None)
        self.config = config

    def close(self) -> None:
        """Close the connections of this process."""
        for part in ("publisher", "backend"):
            if part in self.__dict__:
                self.__dict__[part].close()


def _defined_elsewhere(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("this task is defined in another program")


def _note_child(handle: AsyncResult[Any] | GroupResult | None) -> None:
    """Let the run that is going on know what it has sent."""
    request = current_request()
    if handle is not None and not request.called_directly:
        request.children.append(handle.as_tuple())
