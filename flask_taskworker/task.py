"""A task: a function that can be called now, or sent to a worker."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from types import MethodType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, TypeVar, cast

from .arguments import Signature
from .exceptions import (
    Ignore,
    NotInitialisedError,
    Retry,
    TaskArgumentError,
    TaskDefinitionError,
)
from .options import (
    CallOptions,
    RetryOptions,
    TaskOptions,
    check_call_options,
    check_task_options,
)
from .registry import task_name

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from . import result
    from .app import TaskApp
    from .backends.base import ResultBackend
    from .canvas.signature import Signature as CallSignature
    from .retries import RetryNow

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class ExceptionInfo(NamedTuple):
    """What hooks and signals are told of an exception; as a text it is the traceback."""

    type: type[BaseException]
    exception: BaseException
    traceback: str

    def __str__(self) -> str:
        return self.traceback


@dataclass
class Run:
    """What a run leaves to the steps after it, and where its states are stored."""

    backend: ResultBackend
    retries: list[RetryNow] = field(default_factory=list)


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
    callbacks: Sequence[Any] | None = None
    errbacks: Sequence[Any] | None = None
    chain: Sequence[Any] | None = None
    chord: Mapping[str, Any] | None = None
    replaced_task_nesting: int = 0
    stamped_headers: Sequence[str] | None = None
    stamps: Mapping[str, Any] = field(default_factory=dict)
    #: What the run has sent so far, as tuples of results.
    children: list[Any] = field(default_factory=list)
    _run: Run | None = field(default=None, repr=False, compare=False)


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

    Subclass it to watch the runs of tasks, or to surround them, and define tasks with
    ``define_task(base=MyTask)``. There is one instance for each task. The hooks are called
    inside an app context, with :attr:`request` set; what one raises is logged and changes
    nothing. A subclass with its own ``__call__`` is called by workers too, and runs the
    function by ``super().__call__(...)`` or ``self.run(...)``. A subclass with its own
    ``run`` is a task without a function: ``define_task(MyTask)``.

    :param function: the task's function; None if the class has a ``run``.
    :param locate: finds the :class:`~flask_taskworker.app.TaskApp` to send with.
    :param bind: whether the function's first parameter is this task.
    :param options: see :class:`~flask_taskworker.options.TaskOptions`.
    """

    #: Runs the task's function, without anything around it.
    run: Callable[..., Any]

    def __init__(
        self,
        function: Callable[..., Any] | None,
        locate: Callable[[], TaskApp],
        *,
        bind: bool = False,
        options: TaskOptions | None = None,
    ) -> None:
        named: Any = function
        if function is None:
            function, named = getattr(self, "run", None), type(self)
            functools.update_wrapper(self, named, updated=())
        elif callable(function):
            functools.update_wrapper(self, function)
            self.run = MethodType(function, self) if bind else function
        if not callable(function):
            raise TaskDefinitionError(
                f"define_task needs a function, not {function!r}. Options go by name: "
                "@task_worker.define_task(queue='mail')"
            )
        options = options or {}
        check_task_options(options)
        self.is_async = inspect.iscoroutinefunction(inspect.unwrap(function))
        self.bind = bind
        self.options_: TaskOptions = _with_one_name(options)
        self.name: str = options.get("name") or task_name(named)
        self._signature = Signature(function, bound=bind)
        self._locate = locate

    def __repr__(self) -> str:
        return f"<Task {self.name}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the task inline, in this thread, and return what it returns."""
        return cast(R, self.run(*args, **kwargs))

    # -- hooks ----------------------------------------------------------------------------

    def before_start(self, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A run is about to call the function."""

    def on_success(
        self, retval: Any, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """A run has returned ``retval``, and that is stored."""

    def on_failure(
        self,
        exc: BaseException,
        task_id: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        einfo: ExceptionInfo,
    ) -> None:
        """A run has failed for good, and that is stored."""

    def on_retry(
        self,
        exc: BaseException | None,
        task_id: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        einfo: ExceptionInfo,
    ) -> None:
        """A run is queued once more, because of ``exc`` if that was given."""

    def after_return(
        self,
        status: str,
        retval: Any,
        task_id: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        einfo: ExceptionInfo | None,
    ) -> None:
        """A run has succeeded or failed; ``retval`` is what it returned or raised."""

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
        self.check_arguments(args, kwargs)
        return self._locate().send(self, args, kwargs, options)

    def check_arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise :class:`~flask_taskworker.exceptions.TaskArgumentError` if they do not fit."""
        self._signature.check(self.name, args, kwargs)

    # -- as part of others ----------------------------------------------------------------

    def s(self, *args: Any, **kwargs: Any) -> CallSignature[R]:
        """This call as data, to be sent later; more arguments may come in front of these."""
        return self.signature(args, kwargs)

    def si(self, *args: Any, **kwargs: Any) -> CallSignature[R]:
        """As :meth:`s`, but with exactly these arguments: no result of another task is added."""
        return self.signature(args, kwargs, immutable=True)

    def signature(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        immutable: bool = False,
        **more: Any,
    ) -> CallSignature[R]:
        """This call as data, with options as :meth:`apply_async` takes them."""
        from .canvas.signature import Signature

        return Signature(self, args, kwargs, immutable=immutable).set(**(options or {}), **more)

    def map(self, it: Iterable[Any]) -> CallSignature[list[Any]]:
        """One call that runs this task with each item, one after the other."""
        from .canvas.maps import xmap

        return xmap(self, it)

    def starmap(self, it: Iterable[Sequence[Any]]) -> CallSignature[list[Any]]:
        """As :meth:`map`, with a list of arguments in each item."""
        from .canvas.maps import xstarmap

        return xstarmap(self, it)

    def chunks(self, it: Iterable[Sequence[Any]], n: int) -> CallSignature[list[Any]]:
        """A group of calls of :meth:`starmap`, each over ``n`` items."""
        from .canvas.maps import chunks

        return chunks(self, it, n)

    # -- inside a run ---------------------------------------------------------------------

    @property
    def request(self) -> Request:
        """The run of this task that is going on in this thread.

        One with ``called_directly`` if it is not run by a worker, but called as a function.
        """
        request = _current.get()
        return request if request.task in (self.name, None) else _DIRECT_CALL

    @property
    def max_retries(self) -> int | None:
        """How often a run may be queued again; None is without limit."""
        return self.options_.get("max_retries", self._locate().config.max_retries)

    def retry(
        self,
        exc: BaseException | None = None,
        *,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        throw: bool = True,
        **options: Unpack[RetryOptions],
    ) -> Retry:
        """Queue this run once more under the same id; use it as ``raise task.retry()``.

        What follows the task (callbacks, a chain) and its root are kept, and so is
        everything about the message that ``options`` do not change.

        :param exc: what went wrong; it is the failure once the retries are used up.
        :param args: other positional arguments than this run's.
        :param kwargs: other keyword arguments than this run's.
        :param throw: False returns the :class:`~flask_taskworker.Retry` instead of raising
            it. The run goes on, and its own end counts; the next message is sent when it ends.
        :param options: ``max_retries`` for this run, instead of the task's own; ``countdown``
            in seconds or ``eta``, an aware datetime, instead of the task's ``retry_delay``;
            and the other options of a call, see :class:`~flask_taskworker.options.CallOptions`.
        :raises Retry: if one more run is allowed; the worker queues it.
        :raises MaxRetriesExceededError: when it is not, and ``exc`` was not given.
        :raises TaskArgumentError: if the new arguments do not fit the function.
        :raises NotInitialisedError: outside a run, with no exception to raise instead.
        """
        from . import retries

        request = self.request
        retry = retries.ask(
            self, request, exc, lambda: self._locate().config, options, args=args, kwargs=kwargs
        )
        if throw or request._run is None:
            raise retry
        request._run.retries.append(retry)
        return retry

    def update_state(
        self, task_id: str | None = None, state: str | None = None, meta: Any = None
    ) -> None:
        """Store a state of your own, such as ``PROGRESS``; ``AsyncResult.info`` reads ``meta``.

        A final state that is stored is not replaced. If the store cannot be reached, that is
        logged and the run goes on: progress is worth less than the work.

        :param task_id: the task; the default is this run.
        :param state: the state; the default is the one that is stored now.
        :param meta: plain data about it; an exception for the states that carry one.
        :raises NotInitialisedError: with no ``task_id``, outside a run.
        :raises InvalidOptionError: if the state is no text, or ``meta`` does not go with it.
        :raises EncodeError: if ``meta`` cannot be serialized.
        """
        from .progress import store_state

        request = self.request
        run = request._run
        task_id = task_id or request.id
        if task_id is None:
            raise NotInitialisedError(
                f"{self.name}.update_state() needs a task_id where no worker runs the task"
            )
        backend = self._locate().backend if run is None else run.backend
        store_state(backend, request if task_id == request.id else None, task_id, state, meta)

    def replace(self, signature: CallSignature[Any]) -> Any:
        """End this run, and have ``signature`` take its place; use it as ``return``.

        What it returns becomes the result of this task, and goes on in its chain, chord and
        callbacks. A group becomes the list of its results.

        :raises Ignore: always; the worker sends the signature.
        :raises InvalidSignatureError: if it cannot take the place.
        :raises NotInitialisedError: outside a run.
        """
        from .canvas.replacing import replacement

        raise ReplaceNow(replacement(self._inside("replace"), signature, self._locate()))

    def add_to_chord(self, signature: CallSignature[Any], lazy: bool = False) -> Any:
        """Add a call to the header of the chord that this run belongs to, and send it.

        :param lazy: True leaves the sending to the caller.
        :return: the handle to its result, or the signature if it is ``lazy``.
        :raises InvalidSignatureError: if this run belongs to no chord.
        :raises NotInitialisedError: outside a run.
        """
        from .canvas.replacing import joined_to_chord

        added = joined_to_chord(self._inside("add_to_chord"), signature, self._locate())
        return added if lazy else added.delay()

    def _inside(self, name: str) -> Request:
        request = self.request
        if request.called_directly:
            raise NotInitialisedError(
                f"{self.name}.{name}() only works while a worker runs the task"
            )
        return request


def _with_one_name(options: TaskOptions) -> TaskOptions:
    """The options with ``retry_delay`` under that name."""
    if "default_retry_delay" not in options:
        return options
    named = options.copy()
    named["retry_delay"] = named.pop("default_retry_delay")
    return named


class ReplaceNow(Ignore):
    """Ends a run in favour of a signature, which the worker sends under the same id."""

    def __init__(self, signature: CallSignature[Any]) -> None:
        super().__init__(f"replaced by {signature.task}")
        self.signature = signature


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
