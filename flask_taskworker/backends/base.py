"""What every result backend does, and the record they all keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .. import clock, states
from ..exceptions import ChordNotSupportedError, NoResultBackendError, ResultTimeoutError

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


@dataclass(frozen=True)
class ChordPart:
    """How one task of a chord's header ended; ``result`` is as in a :class:`TaskRecord`."""

    task_id: str
    index: int | None
    status: str
    result: Any


def in_order(parts: Iterable[ChordPart]) -> list[ChordPart]:
    """Parts in the order of the header; those without a place last."""
    return sorted(parts, key=lambda part: float("inf") if part.index is None else part.index)


@dataclass(frozen=True)
class Header:
    """The header of a chord, once all of its tasks have ended.

    ``shape`` is the header's result as a tuple where it is nested; None stands for a list in
    the order of ``parts``.
    """

    group_id: str
    parts: Sequence[ChordPart]
    shape: Any = None


class Transaction(NamedTuple):
    """An open transaction of a result database.

    ``carries_messages`` says whether the broker's messages are in the same database, and can be
    sent with it.
    """

    connection: Any
    carries_messages: bool


class Finish(Protocol):
    """Sends the body of a chord.

    Called once, inside the transaction that counts the last task where there is one.

    :param transaction: for what else it stores, and if possible for the messages it sends.
    :return: False if the chord failed, and is left to the caller of ``arrive``.
    """

    def __call__(self, header: Header, transaction: Transaction | None) -> bool: ...


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

    # -- groups and chords ----------------------------------------------------------------

    def save_group(self, group_id: str, shape: Any) -> None:
        """Keep the tuple of a group's result."""
        raise self._keeps_no_groups()

    def restore_group(self, group_id: str) -> Any:
        """The tuple that was kept for a group, or None."""
        raise self._keeps_no_groups()

    def forget_group(self, group_id: str) -> None:  # noqa: B027 - as below
        """Delete what is kept for a group."""

    def _keeps_no_groups(self) -> ChordNotSupportedError:
        return ChordNotSupportedError(
            f"the result backend {self.name} keeps no groups and cannot tell when all tasks of "
            "one are done. Set TASKER_RESULT_BACKEND to a database or to Redis, for example "
            "'redis://localhost/1' or 'sqlite:////var/lib/app/results.db'"
        )

    @property
    def name(self) -> str:
        """The kind of backend, for texts."""
        return (self.config.result_backend or "disabled").split(":", 1)[0]

    def ensure_chords(self) -> None:
        """Raise if this backend cannot count the tasks of a chord's header.

        :raises ChordNotSupportedError: saying what can.
        """
        raise self._keeps_no_groups()

    def open_chord(
        self,
        group_id: str,
        size: int,
        shape: Any = None,
        transaction: Transaction | None = None,
    ) -> None:
        """Prepare to count the tasks of a chord's header, before any of them is sent.

        :param size: how many tasks have to end.
        :param shape: the header's result as a tuple, where it is nested.
        """
        raise self._keeps_no_groups()

    def grow_chord(self, group_id: str) -> None:
        """Let a chord wait for one task more."""
        raise self._keeps_no_groups()

    def arrive(
        self, group_id: str, part: ChordPart, finish: Finish, record: TaskRecord | None = None
    ) -> Header | None:
        """Count the end of a task of a header, once however often it ends.

        :param finish: sends the body, when this was the last task.
        :param record: stored first, where possible in the same transaction.
        :return: the header, if ``finish`` left the end to the caller, who then calls
            :meth:`close_chord`.
        """
        raise self._keeps_no_groups()

    def close_chord(self, group_id: str) -> None:  # noqa: B027 - what opens none closes none
        """Forget a chord."""

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

    def ensure_chords(self) -> None:
        raise self._error()

    def _error(self) -> NoResultBackendError:
        return NoResultBackendError(
            "results are switched off. Set TASKER_RESULT_BACKEND, for example to "
            "'redis://localhost/1' or 'sqlite:////var/lib/app/results.db'"
        )
