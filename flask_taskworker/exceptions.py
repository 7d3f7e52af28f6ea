"""Every error this package raises, in one tree.

All of them derive from :class:`TaskWorkerError`. Those that a caller of plain
Python would expect under a built-in class derive from that as well (a wrong
argument is a ``TypeError``, a result that did not come in time is a
``TimeoutError``).

``wire_module`` and ``wire_name`` are what other Celery processes see in a stored
result: a Celery client can only catch classes it knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar


class TaskWorkerError(Exception):
    """Root of all errors of this package."""

    wire_module: ClassVar[str] = "celery.exceptions"
    wire_name: ClassVar[str | None] = None


# -- configuration and definition ---------------------------------------------------------


class ConfigurationError(TaskWorkerError):
    """The settings cannot be used.

    :param problems: one text per fault; each names the key, the value and what to
        write instead.
    """

    wire_name = "ImproperlyConfigured"

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            text = self.problems[0]
        else:
            text = f"{len(self.problems)} faults in the configuration:"
            text += "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(text)


class NotInitialisedError(TaskWorkerError, RuntimeError):
    """The extension was used before ``init_app``, or without a way to find the app."""


class TaskDefinitionError(TaskWorkerError, TypeError):
    """``define_task`` got something it cannot make a task of."""


class DuplicateTaskError(TaskDefinitionError):
    """Two different functions claim one task name."""

    wire_name = "AlreadyRegistered"


# -- calls --------------------------------------------------------------------------------


class TaskArgumentError(TaskWorkerError, TypeError):
    """The arguments of a call do not fit the task's signature."""


class UnknownOptionError(TaskWorkerError, TypeError):
    """An option of ``define_task`` or ``apply_async`` does not exist."""


class InvalidOptionError(TaskWorkerError, ValueError):
    """An option exists, but not with this value."""


class InvalidSignatureError(TaskWorkerError, ValueError):
    """A signature, or what was made of several, cannot be sent; the text says why."""

    wire_name = "InvalidTaskError"


class EncodeError(TaskWorkerError, TypeError):
    """An argument or a return value cannot be serialized."""

    wire_module = "kombu.exceptions"
    wire_name = "EncodeError"


class MessageTooLargeError(TaskWorkerError, ValueError):
    """The serialized message is larger than ``TASKER_MAX_MESSAGE_BYTES``."""


# -- broker -------------------------------------------------------------------------------


class BrokerError(TaskWorkerError):
    """The broker refused or failed an operation."""


class BrokerUnavailableError(BrokerError, ConnectionError):
    """The broker could not be reached, or did not answer, within the allowed time.

    Nothing was queued as far as this process can know.
    """

    wire_module = "kombu.exceptions"
    wire_name = "OperationalError"


class UnsupportedByBrokerError(BrokerError):
    """The broker has no way to do what was asked for."""


class LeaseLostError(BrokerError):
    """A message was settled by a consumer that no longer owns it.

    Its lease had run out, and another worker may be running it: the settlement
    was refused.
    """


class InvalidMessageError(BrokerError, ValueError):
    """A message from outside is no task message; the text is the reason it is parked."""

    wire_name = "InvalidTaskError"


# -- control flow inside a task -----------------------------------------------------------


class TaskControl(TaskWorkerError):
    """Raised inside a task to say what should become of it. Not a failure."""


class Retry(TaskControl):
    """The task was queued again.

    :param message: a text for the log.
    :param exc: the exception that made the retry necessary.
    :param when: seconds from now, or the aware UTC datetime, of the next run.
    """

    wire_name = "Retry"

    def __init__(
        self,
        message: str | None = None,
        exc: BaseException | None = None,
        when: datetime | float | None = None,
    ) -> None:
        self.message, self.exc, self.when = message, exc, when
        super().__init__(message, exc, when)

    def __str__(self) -> str:
        if self.message:
            return self.message
        due = f" in {self.when}s" if isinstance(self.when, (int, float)) else ""
        return f"Retry{due}: {self.exc!r}" if self.exc else f"Retry{due}"


class Ignore(TaskControl):
    """End the task without storing any state; the message is acknowledged."""

    wire_name = "Ignore"


class Reject(TaskControl):
    """Refuse the message.

    :param reason: a text for the log and the dead letter.
    :param requeue: True puts the message back on its queue; False parks it.
    """

    wire_name = "Reject"

    def __init__(self, reason: object = None, requeue: bool = False) -> None:
        self.reason, self.requeue = reason, requeue
        super().__init__(reason, requeue)


# -- results ------------------------------------------------------------------------------


class ResultError(TaskWorkerError):
    """Root of the errors around results."""


class NoResultBackendError(ResultError, NotImplementedError):
    """A result was asked for, but no result backend is configured."""


class ResultTimeoutError(ResultError, TimeoutError):
    """The result did not come in time. The task goes on."""

    wire_name = "TimeoutError"


class TaskFailedError(ResultError):
    """A task failed with an exception that cannot be rebuilt in this process.

    :param exc_type: the class name of the original.
    :param exc_message: the arguments of the original, as far as they were stored.
    :param exc_module: the module of the original.
    """

    def __init__(self, exc_type: str, exc_message: object = (), exc_module: str = "") -> None:
        self.exc_type, self.exc_message, self.exc_module = exc_type, exc_message, exc_module
        super().__init__(exc_type, exc_message, exc_module)

    def __str__(self) -> str:
        message = self.exc_message
        if isinstance(message, (list, tuple)):
            message = ", ".join(map(str, message))
        return f"{self.exc_type}({message})"


class TaskRevokedError(ResultError):
    """The task was revoked, or expired, before it ran."""

    wire_name = "TaskRevokedError"


class ChordError(ResultError):
    """The body of a chord was not run, because a task of the header failed."""

    wire_name = "ChordError"


class ChordNotSupportedError(ResultError, NotImplementedError):
    """The result backend cannot tell when all tasks of a chord's header are done."""


class MaxRetriesExceededError(ResultError):
    """The task asked for one retry more than it may have."""

    wire_name = "MaxRetriesExceededError"

    def __init__(
        self,
        *args: object,
        task_args: Sequence[Any] = (),
        task_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.task_args, self.task_kwargs = tuple(task_args), dict(task_kwargs or {})
        super().__init__(*args)


class UnknownTaskError(TaskWorkerError, KeyError):
    """No task is registered under this name."""

    wire_name = "NotRegistered"

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


# -- worker -------------------------------------------------------------------------------


class WorkerError(TaskWorkerError):
    """Root of the errors of a worker itself."""


class WorkerLostError(WorkerError):
    """The process that ran the task died."""

    wire_module = "billiard.exceptions"
    wire_name = "WorkerLostError"


class TimeLimitExceeded(WorkerError):
    """The task ran longer than its hard time limit."""

    wire_module = "billiard.exceptions"
    wire_name = "TimeLimitExceeded"


class SoftTimeLimitExceeded(WorkerError):
    """Raised inside a task when its soft time limit is over."""

    wire_module = "billiard.exceptions"
    wire_name = "SoftTimeLimitExceeded"
