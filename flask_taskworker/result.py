"""The handle to a task that was sent."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from . import states
from .exceptions import NotInitialisedError

if TYPE_CHECKING:
    from .app import TaskApp
    from .backends.base import ResultBackend, TaskRecord

R = TypeVar("R", covariant=True)


class AsyncResult(Generic[R]):
    """State and result of one call. Reading asks the result backend until the task is done.

    :param task_id: the id of the call.
    :param backend: where the results are kept.
    :param app: who reaches the workers, for :meth:`revoke`.
    """

    def __init__(self, task_id: str, backend: ResultBackend, app: TaskApp | None = None) -> None:
        if not task_id:
            raise ValueError("a result needs the id of a task, got " + repr(task_id))
        self.id = task_id
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

    def get(self, timeout: float | None = None, propagate: bool = True) -> R:
        """Wait for the task and return what it returned.

        :param timeout: seconds to wait; None waits without end.
        :param propagate: False returns the exception of a failed task instead of raising it.
        :raises ResultTimeoutError: if the task is not done in time.
        :raises NoResultBackendError: if results are switched off.

        A failed task's own exception is raised again, with the traceback of the worker
        in its notes (its ``__cause__`` on Python 3.10).
        """
        record = self._final or self._backend.wait(self.id, timeout)
        self._final = record
        if record.status in states.PROPAGATE_STATES and propagate:
            raise self._exception(record)
        return cast(R, self._value(record))

    wait = get

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
