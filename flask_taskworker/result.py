"""The handle to a task that was sent."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Union, cast

from . import clock, states
from .exceptions import NotInitialisedError, ResultError, ResultTimeoutError
from .result_set import GroupResult, ResultSet, dependencies

if TYPE_CHECKING:
    from .app import TaskApp
    from .backends.base import ResultBackend, TaskRecord

__all__ = ["AnyResult", "AsyncResult", "GroupResult", "ResultSet", "result_from_tuple"]

R = TypeVar("R", covariant=True)

#: A task whose predecessors have ended otherwise than in success is noticed after so long. Seconds.
PARENTS_INTERVAL = 1.0


class AsyncResult(Generic[R]):
    """State and result of one call. Reading asks the result backend until the task is done.

    :param task_id: the id of the call.
    :param backend: where the results are kept.
    :param app: who reaches the workers, for :meth:`revoke`.
    :param parent: the handle to what runs before it, in a chain or as a chord's header.
    """

    def __init__(
        self,
        task_id: str,
        backend: ResultBackend,
        app: TaskApp | None = None,
        parent: AnyResult | None = None,
    ) -> None:
        if not task_id:
            raise ValueError("a result needs the id of a task, got " + repr(task_id))
        self.id = task_id
        self.parent = parent
        self._backend = backend
        self._app = app
        self._final: TaskRecord | None = None

    def __repr__(self) -> str:
        return f"<AsyncResult: {self.id}>"

    def __str__(self) -> str:
        return self.id

    def __eq__(self, other: object) -> bool:
        if isinstance(other, AsyncResult):
            return self.id == other.id
        return self.id == other if isinstance(other, str) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def get(
        self, timeout: float | None = None, propagate: bool = True, follow_parents: bool = True
    ) -> R:
        """Wait for the task and return what it returned.

        :param timeout: seconds to wait; None waits without end.
        :param propagate: False returns the exception of a failed task instead of raising it.
        :param follow_parents: whether to raise the error of a failed task before it.
        :raises ResultTimeoutError: if the task is not done in time.
        :raises NoResultBackendError: if results are switched off.

        A failed task's own exception is raised again, with the traceback of the worker
        in its notes (its ``__cause__`` on Python 3.10).
        """
        if self.parent is not None and propagate and follow_parents:
            record = self._wait_with_parents(timeout)
        else:
            record = self._final or self._backend.wait(self.id, timeout)
        self._final = record
        if record.status in states.PROPAGATE_STATES and propagate:
            raise self._exception(record)
        return cast(R, self._value(record))

    wait = get

    def _wait_with_parents(self, timeout: float | None) -> TaskRecord:
        """Wait, and raise the error of a parent that failed."""
        deadline = None if timeout is None else clock.monotonic() + timeout
        pause = PARENTS_INTERVAL
        while True:
            left = None if deadline is None else max(0.0, deadline - clock.monotonic())
            try:
                wait = pause if left is None else min(left, pause)
                record = self._final or self._backend.wait(self.id, wait)
                if record.status not in states.PROPAGATE_STATES:
                    return record
            except ResultTimeoutError:
                record = None
            # What has failed before it tells more than its own failure does.
            for parent in reversed(list(_parents(self))):
                parent.maybe_throw()
            if record is not None:
                return record
            if left is not None and left <= pause:
                raise ResultTimeoutError(
                    f"task {self.id} was not done within {timeout} s; it goes on"
                )
            pause *= 2  # a long chain has many parents to look at

    def maybe_throw(self, propagate: bool = True) -> Any:
        """Raise the exception if it is known that the task failed; else its result so far."""
        record = self._read()
        if record is not None and propagate and record.status in states.PROPAGATE_STATES:
            raise self._exception(record)
        return self._value(record) if record else None

    @property
    def state(self) -> str:
        """PENDING, STARTED, SUCCESS, FAILURE, RETRY, REVOKED or a state of the task's own."""
        record = self._read()
        return record.status if record else states.PENDING

    status = state

    @property
    def result(self) -> Any:
        """What the task returned, or its exception; None while neither is known."""
        record = self._read()
        return self._value(record) if record else None

    info = result

    @property
    def traceback(self) -> str | None:
        """The worker's traceback of a failed task, as text."""
        record = self._read()
        return record.traceback if record else None

    @property
    def date_done(self) -> datetime | None:
        """When the task was done (aware, UTC)."""
        record = self._read()
        return record.date_done if record else None

    @property
    def children(self) -> list[AnyResult] | None:
        """What the task sent, and what was sent when it was done; None while it is not."""
        record = self._read()
        if record is None or record.status not in states.READY_STATES:
            return None
        return [
            result_from_tuple(child, self._backend, self._app) for child in record.children or ()
        ]

    def ready(self) -> bool:
        """Whether the task is done, in whatever way."""
        return self.state in states.READY_STATES

    def successful(self) -> bool:
        """Whether it is done and returned."""
        return self.state == states.SUCCESS

    def failed(self) -> bool:
        """Whether it is done and raised."""
        return self.state == states.FAILURE

    def forget(self) -> None:
        """Delete what is stored about this task."""
        self._final = None
        self._backend.forget(self.id)
        if self.parent is not None:
            self.parent.forget()

    def as_tuple(self) -> Any:
        """It as plain data; :func:`result_from_tuple` reads it."""
        return [[self.id, self.parent and self.parent.as_tuple()], None]

    def as_list(self) -> list[str]:
        """Its id and those of its parents, the nearest first."""
        return [self.id, *(self.parent.as_list() if self.parent is not None else ())]

    def iterdeps(self, intermediate: bool = False) -> Iterator[tuple[AnyResult | None, AnyResult]]:
        """Pairs of a handle and its parent: this one, and all that came of it.

        :param intermediate: go on where a task is not done, instead of raising.
        :raises ResultError: at a task that is not done.
        """
        return dependencies(self, intermediate)

    def collect(
        self, intermediate: bool = False, **options: Any
    ) -> Iterator[tuple[AnyResult, Any]]:
        """Pairs of a handle and its result: this one, and all that came of it.

        :param options: as for :meth:`get`.
        """
        for _, handle in self.iterdeps(intermediate):
            yield handle, handle.get(**options)

    def get_leaf(self) -> Any:
        """The result of the last that came of it."""
        value = None
        for _, handle in self.iterdeps():
            value = handle.get()
        return value

    def revoke(
        self, terminate: bool = False, signal: str | int = "SIGTERM", **options: Any
    ) -> list[dict[str, Any]] | None:
        """Have the task not run; see :meth:`~flask_taskworker.control.Control.revoke`.

        :param terminate: end it also if it is running; only processes can.
        :param signal: what to end it with.
        :raises BrokerError: if the workers cannot be reached.
        """
        if self._app is None:
            raise NotInitialisedError(
                f"the handle to task {self.id} was made without an app. Take it from "
                "task_worker.AsyncResult(task_id)."
            )
        return self._app.control.revoke(self.id, terminate, signal, **options)

    def _read(self) -> TaskRecord | None:
        if self._final is not None:
            return self._final
        record = self._backend.fetch(self.id)
        if record is not None and record.status in states.READY_STATES:
            self._final = record
        return record

    def _value(self, record: TaskRecord) -> Any:
        return (
            self._exception(record) if record.status in states.EXCEPTION_STATES else record.result
        )

    def _exception(self, record: TaskRecord) -> BaseException:
        from .backends.encoding import decode_exception

        return decode_exception(record.result, record.traceback)


#: A handle to one task or to a group.
AnyResult = Union["AsyncResult[Any]", GroupResult]


def result_from_tuple(shape: Any, backend: ResultBackend, app: TaskApp | None = None) -> AnyResult:
    """The handle that :meth:`AsyncResult.as_tuple` wrote; Celery writes the same.

    :param app: who reaches the workers, for revoking.
    :raises ResultError: if it is none.
    """
    try:
        named, members = shape
        own, parent = named if isinstance(named, (list, tuple)) else (named, None)
        before = None if parent is None else result_from_tuple(parent, backend, app)
        if members is None:
            return AsyncResult(own, backend, app, before)
        handles = [result_from_tuple(member, backend, app) for member in members]
        return GroupResult(own, handles, backend, before)
    except (TypeError, ValueError) as exc:
        raise ResultError(f"{str(shape)[:200]} is no result in Celery's form: {exc}") from exc


def _parents(handle: AnyResult) -> Iterator[AnyResult]:
    node = handle.parent
    while node is not None:
        yield node
        node = node.parent
