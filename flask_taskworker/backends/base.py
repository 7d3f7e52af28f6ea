"""What every result backend does, and the record they all keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from .. import clock, states
from ..exceptions import NoResultBackendError, ResultTimeoutError

if TYPE_CHECKING:
    import kombu

    from ..config import Config


@dataclass(frozen=True)
class TaskRecord:
    """What is stored about one task.

    ``result`` is plain data: the return value, or for RETRY, FAILURE and REVOKED an
    exception as :mod:`flask_taskworker.backends.encoding` writes it. ``date_done`` is
    aware UTC, and only there for the final states.
    """

    task_id: str
    status: str
    result: Any = None
    traceback: str | None = None
    children: Sequence[Any] | None = None
    date_done: datetime | None = None
    group_id: str | None = None
    parent_id: str | None = None
    #: Where a backend that answers the sender directly sends the record to.
    reply_to: str | None = None
    correlation_id: str | None = None

    def done_now(self) -> TaskRecord:
        """The same record with the time it was done, if its state is final."""
        if self.date_done is None and self.status in states.READY_STATES:
            return replace(self, date_done=clock.utcnow())
        return self


class ResultBackend(ABC):
    """Keeps the records of one app. Safe to use from several threads, and after a fork."""

    #: Errors of the store that may be gone at the next try.
    transient_errors: tuple[type[BaseException], ...] = (OSError,)
    #: False when the app stores no results at all.
    enabled = True

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def store(self, record: TaskRecord) -> None:
        """Store a record.

        A stored SUCCESS is never replaced, so that a message which is delivered twice
        cannot turn a task that succeeded into a failed one.

        :raises EncodeError: if the result cannot be serialized.
        """

    def shares_database_with(self, broker_url: str) -> bool:
        """Whether a record can be stored in the transaction that settles a message."""
        return False

    def statement(self, record: TaskRecord) -> tuple[str, Sequence[Any]]:
        """The SQL that stores a record, where :meth:`shares_database_with` is true.

        :raises EncodeError: if the result cannot be serialized.
        """
        raise NotImplementedError("this backend is no database")

    @abstractmethod
    def fetch(self, task_id: str) -> TaskRecord | None:
        """The record of a task, or None if there is none."""

    @abstractmethod
    def wait(self, task_id: str, timeout: float | None = None) -> TaskRecord:
        """Block until the record's state is final.

        :param timeout: seconds; None is without end.
        :raises ResultTimeoutError: if it does not come in time.
        """

    @abstractmethod
    def forget(self, task_id: str) -> None:
        """Delete the record of a task."""

    def reply_queue(self) -> kombu.Queue | None:
        """The queue to which results are sent, if this backend answers the sender directly."""
        return None

    def cleanup(self) -> int:
        """Delete a portion of the records that are past ``TASKER_RESULT_EXPIRES``.

        :return: how many were deleted; 0 where the store does this by itself.
        """
        return 0

    def prepare(self) -> None:  # noqa: B027 - most stores need no preparation
        """Create what the store needs before it can be used."""

    def close(self) -> None:  # noqa: B027 - what holds no connection has nothing to do
        """Release the connections of this process."""


def timed_out(task_id: str, timeout: float | None) -> ResultTimeoutError:
    """The error for a result that did not come in time."""
    return ResultTimeoutError(f"task {task_id} was not done within {timeout} s; it goes on")


class DisabledBackend(ResultBackend):
    """Stores nothing, and says so to whoever asks."""

    enabled = False

    def store(self, record: TaskRecord) -> None:
        pass

    def fetch(self, task_id: str) -> TaskRecord | None:
        raise self._error()

    def wait(self, task_id: str, timeout: float | None = None) -> TaskRecord:
        raise self._error()

    def forget(self, task_id: str) -> None:
        pass

    def _error(self) -> NoResultBackendError:
        return NoResultBackendError(
            "results are switched off. Set TASKER_RESULT_BACKEND, for example to "
            "'redis://localhost/1' or 'sqlite:////var/lib/app/results.db'"
        )
