"""One run of one task, as a list of steps.

decode (done) → expired? → known? → STARTED → context → run → result → retry → outcome.

Settling the message is not among them: the consumer does it last, when everything
that must not be lost is safe. A crash between any two steps means "runs again".
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import threading
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .. import clock, failpoints, states
from ..app import RetryNow
from ..backends.base import TaskRecord
from ..backends.encoding import encode_exception, format_traceback
from ..exceptions import (
    EncodeError,
    Ignore,
    MessageTooLargeError,
    Reject,
    Retry,
    TaskRevokedError,
    UnknownTaskError,
)
from ..task import Request, Task, running
from ..texts import safe_repr, text_of
from .delivery import Delivery, Outcome, Settlement

if TYPE_CHECKING:
    from ..app import TaskApp
    from ..backends.base import ResultBackend
    from ..message import Payload, TaskMessage

log = logging.getLogger("flask_taskworker.worker")

#: How long a finished result is tried to be stored before its message is put back. Seconds.
STORE_PATIENCE = 60.0
#: An exception that says more than this is logged as text, cut to a bounded length.
LOGGED_TEXT = 10_000
_NOTHING = object()


class Executor:
    """Runs deliveries for one app. Used by all threads of a pool at once.

    :param app: the app whose tasks these are.
    :param hostname: the node name that tasks see.
    :param backend: where records go; the default is the app's result backend.
    :param stores_with_settlement: whether the consumer stores the record in the
        transaction that acknowledges the message. Then the outcome carries the record
        as a statement, encoded here, away from the consumer's thread.
    """

    def __init__(
        self,
        app: TaskApp,
        hostname: str,
        *,
        backend: ResultBackend | None = None,
        stores_with_settlement: bool = False,
    ) -> None:
        self.app = app
        self.hostname = hostname
        self.backend = backend or app.backend
        self.stores_with_settlement = stores_with_settlement
        self._closing = threading.Event()

    def close(self) -> None:
        """Stop waiting for a result store that does not answer."""
        self._closing.set()

    def run(self, delivery: Delivery) -> Outcome:
        """Run a delivery to its outcome. Never raises."""
        started = clock.monotonic()
        try:
            outcome = self._store(self._execute(delivery), delivery)
        except BaseException as exc:  # a fault of ours must not stop the loop, nor lose the message
            log.exception("worker fault in task %s[%s]", delivery.message.task, delivery.message.id)
            outcome = Outcome(
                Settlement.REQUEUE, reason=f"worker fault: {type(exc).__name__}: {exc}"
            )
        return outcome._replace(runtime=clock.monotonic() - started)

    def _execute(self, delivery: Delivery) -> Outcome:
        message = delivery.message
        if message.has_expired():
            log.info("task %s[%s] expired", message.task, message.id)
            return self._done(delivery, None, states.REVOKED, TaskRevokedError("expired"))
        task = self.app.registry.get(message.task)
        if task is None:
            return self._unknown(delivery)
        failpoints.hit("before_run")
        request = self._request(task, delivery)
        started = clock.monotonic()
        log.debug("task %s[%s] starts", message.task, message.id)
        if task.options_.get("track_started", self.app.config.track_started):
            self._store_started(request, message)
        try:
            value = self._call(task, request, message.payload)
        except BaseException as exc:  # SystemExit included: a task ends itself, not the worker
            outcome = self._raised(task, delivery, exc)
        else:
            outcome = self._returned(task, delivery, value, clock.monotonic() - started)
        failpoints.hit("after_run")
        return outcome

    def _call(self, task: Task[..., Any], request: Request, payload: Payload) -> Any:
        wants_request = bool(task.options_.get("request_context"))
        value: Any = _NOTHING
        try:
            with self.app.execution_context(wants_request), running(request):
                arguments = (task, *payload.args) if task.bind else payload.args
                returned = task.run(*arguments, **payload.kwargs)
                value = asyncio.run(returned) if inspect.iscoroutine(returned) else returned
        except Exception:
            if value is _NOTHING:
                raise
            # The task has done its work; what watches its end cannot undo that.
            log.exception("task %s[%s]: leaving its context failed", task.name, request.id)
        return value

    def _request(self, task: Task[..., Any], delivery: Delivery) -> Request:
        message = delivery.message
        return Request(
            id=message.id,
            task=message.task,
            args=message.payload.args,
            kwargs=message.payload.kwargs,
            retries=message.retries,
            eta=message.eta,
            expires=message.expires,
            root_id=message.root_id or message.id,
            parent_id=message.parent_id,
            group=message.group,
            group_index=message.group_index,
            reply_to=message.reply_to,
            correlation_id=message.correlation_id,
            origin=message.origin,
            shadow=message.shadow,
            headers=message.headers,
            delivery_info=delivery.raw.delivery_info or {},
            delivery_count=delivery.delivery_count,
            hostname=self.hostname,
            ignore_result=self._ignores_result(task, message),
            called_directly=False,
        )

    def _ignores_result(self, task: Task[..., Any] | None, message: TaskMessage) -> bool:
        if message.ignore_result is not None:
            return message.ignore_result
        default = self.app.config.ignore_result
        return task.options_.get("ignore_result", default) if task else default

    # -- outcomes -------------------------------------------------------------------------

    def _returned(
        self, task: Task[..., Any], delivery: Delivery, value: Any, runtime: float
    ) -> Outcome:
        message = delivery.message
        log.info("task %s[%s] succeeded in %.6fs", message.task, message.id, runtime)
        return self._done(delivery, task, states.SUCCESS, value)

    def _raised(self, task: Task[..., Any], delivery: Delivery, exc: BaseException) -> Outcome:
        message = delivery.message
        if isinstance(exc, RetryNow):
            try:
                return self._retry(task, delivery, exc)
            except (EncodeError, MessageTooLargeError) as refused:
                exc = refused  # it would be refused each time
        if isinstance(exc, Ignore):
            log.info("task %s[%s] ignored", message.task, message.id)
            return Outcome(Settlement.ACKNOWLEDGE, state=states.IGNORED)
        if isinstance(exc, Reject):
            return self._rejected(task, delivery, exc)
        exc.with_traceback(_without_our_frames(exc.__traceback__))  # some refuse an assignment
        _log_failure(message, exc)
        return self._done(delivery, task, states.FAILURE, exc)

    def _rejected(self, task: Task[..., Any], delivery: Delivery, exc: Reject) -> Outcome:
        message = delivery.message
        reason = f"rejected by the task: {_shown(exc.reason)}"
        log.warning("task %s[%s] %s", message.task, message.id, reason)
        if exc.requeue:
            return Outcome(Settlement.REQUEUE, reason=reason, state=states.REJECTED)
        return self._done(delivery, task, states.FAILURE, exc)._replace(
            settlement=Settlement.DEAD_LETTER, reason=reason, state=states.REJECTED
        )

    def _retry(self, task: Task[..., Any], delivery: Delivery, signal: RetryNow) -> Outcome:
        message = delivery.message
        failpoints.hit("before_retry")
        payload = message.payload._replace(
            args=message.payload.args if signal.new_args is None else signal.new_args,
            kwargs=message.payload.kwargs if signal.new_kwargs is None else signal.new_kwargs,
        )
        again = replace(
            message,
            payload=payload,
            retries=message.retries + 1,
            eta=signal.eta,
            parent_id=message.id,
            argsrepr=None,
            kwargsrepr=None,
            origin=None,
        )
        self.app.publisher.publish(
            again, delivery.queue, serializer=task.options_.get("serializer")
        )
        log.info("task %s[%s] will run again: %s", message.task, message.id, signal)
        failpoints.hit("after_retry")
        return self._done(delivery, task, states.RETRY, signal.exc or Retry())

    def _unknown(self, delivery: Delivery) -> Outcome:
        message = delivery.message
        error = UnknownTaskError(message.task)
        reason = (
            f"no task {message.task!r} is registered in this worker. Import its module in the "
            "app, then replay the message."
        )
        log.error("task %s[%s] is parked: %s", message.task, message.id, reason)
        return self._done(delivery, None, states.FAILURE, error)._replace(
            settlement=Settlement.DEAD_LETTER, reason=reason
        )

    def _done(
        self, delivery: Delivery, task: Task[..., Any] | None, status: str, value: Any
    ) -> Outcome:
        """The outcome of a run that ends with an acknowledgement."""
        message = delivery.message
        record = None
        if self.backend.enabled and not self._ignores_result(task, message):
            record = _record(message, status, value)
        outcome = Outcome(Settlement.ACKNOWLEDGE, record, state=status)
        return _in_words(outcome, value) if delivery.watched else outcome

    # -- storing --------------------------------------------------------------------------

    def _store_started(self, request: Request, message: TaskMessage) -> None:
        if request.ignore_result or not self.backend.enabled:
            return
        meta = {"pid": os.getpid(), "hostname": self.hostname}
        try:
            self.backend.store(replace(_record(message, states.STARTED, None), result=meta))
        except Exception as exc:  # worth a line, not worth the run
            log.warning("state STARTED of %s is not stored: %s", message.id, exc)

    def _store(self, outcome: Outcome, delivery: Delivery) -> Outcome:
        """Store the record now, or prepare it to be stored with the settlement."""
        record = outcome.record
        if record is None:
            return outcome
        try:
            return self._store_record(outcome, record)
        except EncodeError as exc:
            log.error("task %s[%s]: %s", delivery.message.task, delivery.message.id, exc)
            return self._store_record(outcome, _record(delivery.message, states.FAILURE, exc))
        except self.backend.transient_errors as exc:
            reason = f"its result could not be stored: {type(exc).__name__}: {exc}"
            log.error(
                "task %s[%s] is put back: %s", delivery.message.task, delivery.message.id, reason
            )
            return Outcome(Settlement.REQUEUE, reason=reason)

    def _store_record(self, outcome: Outcome, record: TaskRecord) -> Outcome:
        if self.stores_with_settlement:
            return outcome._replace(record=record, statement=self.backend.statement(record))
        failpoints.hit("before_result")
        self._persist(record)
        failpoints.hit("after_result")
        return outcome._replace(record=None)

    def _persist(self, record: TaskRecord) -> None:
        backend, pause = self.backend, 0.1
        deadline = clock.monotonic() + STORE_PATIENCE
        while True:
            try:
                return backend.store(record)
            except backend.transient_errors as exc:
                if clock.monotonic() + pause > deadline or self._closing.wait(pause):
                    raise
                log.warning("result of %s is not stored yet: %s", record.task_id, exc)
                pause = min(pause * 2, 5.0)


def _record(message: TaskMessage, status: str, value: Any) -> TaskRecord:
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


def _without_our_frames(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback from the task's own frame on: what is ours tells its author nothing."""
    first = traceback
    while first is not None and first.tb_frame.f_code.co_filename == __file__:
        first = first.tb_next
    return first or traceback


def _shown(reason: object) -> str:
    try:
        return str(reason)
    except Exception:  # its __str__ raises
        return safe_repr(reason)


def _log_failure(message: TaskMessage, exc: BaseException) -> None:
    text = text_of(exc)
    if len(text) <= LOGGED_TEXT:
        info = (type(exc), exc, exc.__traceback__)
        described = f"{type(exc).__name__}: {text}"
        log.error("task %s[%s] raised %s", message.task, message.id, described, exc_info=info)
    else:  # the log gets what the store gets: a traceback of bounded length
        traceback = format_traceback(exc)
        log.error("task %s[%s] raised\n%s", message.task, message.id, traceback)
