"""A task: a function that can be called now, or sent to a worker."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast

from .arguments import Signature
from .exceptions import NotInitialisedError, TaskArgumentError, TaskDefinitionError
from .options import CallOptions, TaskOptions, check_call_options, check_task_options
from .registry import task_name

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from . import result
    from .app import TaskApp

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


@dataclass(frozen=True)
class Request:
    """The run that is going on, as the task sees it (``task.request``).

    ``eta`` and ``expires`` are aware datetimes; ``delivery_info`` has ``exchange``,
    ``routing_key``, ``priority`` and ``redelivered``; ``delivery_count`` says how
    often the message was delivered, this time included.
    """

    id: str | None = None
    task: str | None = None
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    retries: int = 0
    eta: datetime | None = None
    expires: datetime | None = None
    root_id: str | None = None
    parent_id: str | None = None
    group: str | None = None
    group_index: int | None = None
    reply_to: str | None = None
    correlation_id: str | None = None
    origin: str | None = None
    shadow: str | None = None
    headers: Mapping[str, Any] = field(default_factory=dict)
    delivery_info: Mapping[str, Any] = field(default_factory=dict)
    delivery_count: int = 1
    hostname: str | None = None
    ignore_result: bool = False
    is_eager: bool = False
    called_directly: bool = True


_DIRECT_CALL = Request()
_current: ContextVar[Request] = ContextVar("flask_taskworker_request", default=_DIRECT_CALL)


def current_request() -> Request:
    """The run that is going on in this thread; one with ``called_directly`` outside a worker."""
    return _current.get()


class running:
    """Make ``request`` the current one while a task runs."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def __enter__(self) -> None:
        self._token = _current.set(self._request)

    def __exit__(self, *exc_info: object) -> None:
        _current.reset(self._token)


class Task(Generic[P, R]):
    """What ``define_task`` makes of a function. Calling it runs the function here and now.

    :param function: the task's function.
    :param locate: finds the :class:`~flask_taskworker.app.TaskApp` to send with.
    :param bind: whether the function's first parameter is this task.
    :param options: see :class:`~flask_taskworker.options.TaskOptions`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        locate: Callable[[], TaskApp],
        *,
        bind: bool = False,
        options: TaskOptions | None = None,
    ) -> None:
        if not callable(function):
            raise TaskDefinitionError(
                f"define_task needs a function, not {function!r}. Options go by name: "
                "@task_worker.define_task(queue='mail')"
            )
        options = options or {}
        check_task_options(options)
        functools.update_wrapper(self, function)
        self.run = function
        self.bind = bind
        self.options_: TaskOptions = options
        self.name: str = options.get("name") or task_name(function)
        self._signature = Signature(function, bound=bind)
        self._locate = locate

    def __repr__(self) -> str:
        return f"<Task {self.name}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the task inline, in this thread, and return what it returns."""
        return cast(R, self.run(self, *args, **kwargs) if self.bind else self.run(*args, **kwargs))

    # -- sending --------------------------------------------------------------------------

    def apply(self, *args: P.args, **kwargs: P.kwargs) -> result.AsyncResult[R]:
        """Queue the task with this payload, to run as soon as possible.

        A single mapping and nothing else is taken as the payload when the function
        cannot take a positional argument.

        :return: a handle to the result.
        :raises TaskArgumentError: if the arguments do not fit the function.
        :raises EncodeError: if one of them cannot be serialized.
        :raises BrokerUnavailableError: if the broker cannot be reached in time.
        """
        return self._apply(args, kwargs, {})

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> result.AsyncResult[R]:
        """Queue the task with these arguments. Returns and raises as :meth:`apply`."""
        return self._send(args, kwargs, {})

    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> result.AsyncResult[R]:
        """Queue the task with options for this call.

        :param args: the positional arguments, a list or tuple.
        :param kwargs: the keyword arguments, a mapping.
        :param options: see :class:`~flask_taskworker.options.CallOptions`.
        :return: a handle to the result.
        :raises UnknownOptionError: for an option that does not exist.
        :raises InvalidOptionError: for a value that an option cannot have.

        Raises further what :meth:`apply` raises.
        """
        if args is not None and not isinstance(args, (list, tuple)):
            raise TaskArgumentError(
                f"{self.name}.apply_async: args is {args!r}, not a list or tuple. "
                f"For a single argument write apply_async(args=[{args!r}])"
            )
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise TaskArgumentError(f"{self.name}.apply_async: kwargs is {kwargs!r}, not a mapping")
        check_call_options(options)
        return self._send(args or (), kwargs or {}, options)

    def options(self, **options: Unpack[CallOptions]) -> BoundCall[P, R]:
        """The task with options for one call: ``task.options(countdown=5).delay(1, 2)``.

        Unlike :meth:`apply_async` it keeps the types of the arguments.
        """
        check_call_options(options)
        return BoundCall(self, options)

    def AsyncResult(self, task_id: str) -> result.AsyncResult[R]:
        """The handle to the result of an earlier call, by its id."""
        return self._locate().result(task_id)

    def _apply(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: CallOptions
    ) -> result.AsyncResult[R]:
        payload = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(payload, Mapping) and not self._signature.takes_one_positional():
            args, kwargs = (), payload
        return self._send(args, kwargs, options)

    def _send(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: CallOptions
    ) -> result.AsyncResult[R]:
        self._signature.check(self.name, args, kwargs)
        return self._locate().send(self, args, kwargs, options)

    # -- inside a run ---------------------------------------------------------------------

    @property
    def request(self) -> Request:
        """The run that is going on in this thread."""
        return _current.get()

    def retry(
        self,
        exc: BaseException | None = None,
        *,
        countdown: float | None = None,
        eta: datetime | None = None,
        max_retries: int | None = None,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Queue this run once more under the same id; use it as ``raise task.retry()``.

        :param exc: what went wrong; it is the failure once the retries are used up.
        :param countdown: seconds until the next run; the default is the task's ``retry_delay``.
        :param eta: the aware datetime of the next run, instead of ``countdown``.
        :param max_retries: for this run, instead of the task's own.
        :param args: other positional arguments than this run's.
        :param kwargs: other keyword arguments than this run's.
        :raises Retry: always, if one more run is allowed; the worker queues it.
        :raises MaxRetriesExceededError: when it is not, and ``exc`` was not given.
        :raises NotInitialisedError: outside a run.
        """
        request = self.request
        if request.called_directly:
            if exc is not None:
                raise exc
            raise NotInitialisedError(
                f"{self.name}.retry() only works while a worker runs the task"
            )
        return self._locate().retry(
            self, request, exc, countdown=countdown, eta=eta, max_retries=max_retries,
            args=args, kwargs=kwargs,
        )  # fmt: skip


class BoundCall(Generic[P, R]):
    """A task with the options of one call; see :meth:`Task.options`."""

    def __init__(self, task: Task[P, R], options: CallOptions) -> None:
        self._task, self._options = task, options

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> result.AsyncResult[R]:
        """Queue the task. Returns and raises as :meth:`Task.delay`."""
        return self._task._send(args, kwargs, self._options)

    def apply(self, *args: P.args, **kwargs: P.kwargs) -> result.AsyncResult[R]:
        """Queue the task with this payload. Returns and raises as :meth:`Task.apply`."""
        return self._task._apply(args, kwargs, self._options)
