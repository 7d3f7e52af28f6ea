"""How runs end: what becomes of the message, and which record says so."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import states
from ..backends.base import TaskRecord
from ..backends.encoding import encode_exception, format_traceback
from ..texts import safe_repr, text_of
from .delivery import Delivery, Outcome, Settlement

if TYPE_CHECKING:
    from ..app import TaskApp
    from ..backends.base import ResultBackend
    from ..exceptions import Reject
    from ..message import TaskMessage
    from ..retries import RetryNow

log = logging.getLogger("flask_taskworker.worker")


class End(NamedTuple):
    """How a run ended: the outcome, and what was returned or raised."""

    outcome: Outcome
    value: Any = None
    retry: RetryNow | None = None


class Outcomes:
    """Makes outcomes as the options of the tasks say. Stores nothing.

    :param app: whose tasks.
    :param backend: where their records will go.
    """

    def __init__(self, app: TaskApp, backend: ResultBackend) -> None:
        self._app = app
        self._backend = backend

    def done(self, delivery: Delivery, status: str, value: Any) -> Outcome:
        """The outcome of a run that ends with an acknowledgement.

        :param status: the state that it leaves.
        :param value: what was returned or raised.
        """
        record = None
        if self._backend.enabled and self._stores(delivery.message, status):
            record = record_of(delivery.message, status, value)
            if delivery.children:
                record = replace(record, children=list(delivery.children))
        outcome = Outcome(Settlement.ACKNOWLEDGE, record, state=status)
        return _in_words(outcome, value) if delivery.watched else outcome

    def failed(self, delivery: Delivery, exc: BaseException) -> Outcome:
        """The outcome of a run that raised."""
        outcome = self.done(delivery, states.FAILURE, exc)
        if self._app.option_of(delivery.message.task, "acks_on_failure_or_timeout"):
            return outcome
        return outcome._replace(
            settlement=Settlement.DEAD_LETTER, reason=f"{type(exc).__name__}: {text_of(exc)}"
        )

    def failed_after_run(self, delivery: Delivery, exc: BaseException) -> End:
        """The end of a run that has failed after the task itself."""
        log.error("task %s[%s]: %s", delivery.message.task, delivery.message.id, exc)
        return End(self.failed(delivery, exc), exc)

    def rejected(self, delivery: Delivery, exc: Reject) -> Outcome:
        """The outcome of a run that raised :class:`~flask_taskworker.exceptions.Reject`."""
        message = delivery.message
        reason = f"rejected by the task: {_shown(exc.reason)}"
        log.warning("task %s[%s] %s", message.task, message.id, reason)
        if exc.requeue:
            return Outcome(Settlement.REQUEUE, reason=reason, state=states.REJECTED)
        return self.parked(delivery, exc, reason)._replace(state=states.REJECTED)

    def parked(self, delivery: Delivery, exc: BaseException, reason: str) -> Outcome:
        """The outcome of a delivery that is kept aside."""
        return self.done(delivery, states.FAILURE, exc)._replace(
            settlement=Settlement.DEAD_LETTER, reason=reason
        )

    def ignores_result(self, message: TaskMessage) -> bool:
        """Whether the result of a run is not stored."""
        if message.ignore_result is not None:
            return message.ignore_result
        return bool(self._app.option_of(message.task, "ignore_result"))

    def _stores(self, message: TaskMessage, status: str) -> bool:
        if not self.ignores_result(message):
            return True
        keeps_errors = self._app.option_of(message.task, "store_errors_even_if_ignored")
        return bool(keeps_errors) and status in states.EXCEPTION_STATES


def record_of(message: TaskMessage, status: str, value: Any) -> TaskRecord:
    """The record of a state.

    :param value: what belongs to it; of an exception, the traceback as well.
    """
    traceback = None
    if isinstance(value, BaseException):
        if status in (states.FAILURE, states.RETRY):
            traceback = format_traceback(value)
        value = encode_exception(value)
    return TaskRecord(
        task_id=message.id,
        status=status,
        result=value,
        traceback=traceback,
        group_id=message.group,
        parent_id=message.parent_id,
        reply_to=message.reply_to,
        correlation_id=message.correlation_id,
    ).done_now()


def _in_words(outcome: Outcome, value: Any) -> Outcome:
    traceback = format_traceback(value) if isinstance(value, BaseException) else ""
    return outcome._replace(shown=safe_repr(value), traceback=traceback)


def _shown(reason: object) -> str:
    try:
        return str(reason)
    except Exception:  # its __str__ raises
        return safe_repr(reason)
