"""One run of one task, as a list of steps.

decode (done) → expired? → known? → context → STARTED → run → retry → what comes next →
result → hooks → outcome.

Settling the message is not among them: the consumer does it last, when everything
that must not be lost is safe. A crash between any two steps means "runs again".

The steps are generators, for the sake of ``async def`` tasks: a step that has to wait yields
what it waits for, and whoever drives the steps (:mod:`.driving`) decides how to.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .. import clock, failpoints, retries, signals, states
from ..backends.base import TaskRecord
from ..backends.encoding import encode_exception, format_traceback
from ..exceptions import (
    EncodeError,
    Ignore,
    MessageTooLargeError,
    Reject,
    TaskRevokedError,
    UnknownTaskError,
)
from ..message import UNREAD, Unreadable, parse
from ..retries import RetryNow
from ..task import ReplaceNow, Request, Run, Task, running
from ..texts import safe_repr, text_of
from . import hooks
from .continuation import Continuation
from .delivery import Delivery, Outcome, Settlement
from .driving import Aside, Steps, drive, drive_async

if TYPE_CHECKING:
    from ..app import TaskApp
    from ..backends.base import ResultBackend
    from ..config import Config
    from ..message import TaskMessage

log = logging.getLogger("flask_taskworker.worker")

#: How long a finished result is tried to be stored before its message is put back, in seconds.
#: The run is done and only its result is not, so this outlasts a restart of a database.
STORE_PATIENCE = 600.0
#: An exception that says more than this is logged as text, cut to a bounded length.
LOGGED_TEXT = 10_000
_NOTHING = object()
T = TypeVar("T")
#: Our own frames at the top of a traceback tell a task's author nothing.
_OURS = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep
    for file in (os.path.dirname(__file__), asyncio.__file__)
)


class _End(NamedTuple):
    """How a run ended: the outcome, and what was returned or raised."""

    outcome: Outcome
    value: Any = None
    retry: RetryNow | None = None


class _Stopped(Exception):
    """Carries a StopIteration out of a generator."""


class Executor:
    """Runs deliveries for one app. Used by all threads of a pool at once.

    :param app: the app whose tasks these are.
    :param hostname: the node name that tasks see.
    :param backend: where records go; the default is the app's result backend.
    :param stores_with_settlement: whether the consumer stores the record in the
        transaction that acknowledges the message. Then the outcome carries the record
        as a statement, encoded here, away from the consumer's thread.
    :param publish: sends the message of a retry, as
        :meth:`Publisher.publish <flask_taskworker.publisher.Publisher.publish>`, which is
        the default.
    :param eager: whether the runs happen in the caller instead of a worker.
    :param alarm: makes the block in which the soft time limit of a run holds, in seconds.
    :param settled_elsewhere: whether another process settles. Then a record that goes with
        no acknowledgement is stored here.
    """

    def __init__(
        self,
        app: TaskApp,
        hostname: str,
        *,
        backend: ResultBackend | None = None,
        stores_with_settlement: bool = False,
        publish: Callable[..., None] | None = None,
        eager: bool = False,
        alarm: Callable[[float | None], contextlib.AbstractContextManager[object]] | None = None,
        settled_elsewhere: bool = False,
    ) -> None:
        self.app = app
        self.hostname = hostname
        self.backend = backend or app.backend
        self.stores_with_settlement = stores_with_settlement
        self.eager = eager
        self._publish = publish
        self._alarm = alarm or (lambda seconds: contextlib.nullcontext())
        self._settled_elsewhere = settled_elsewhere
        self._closing = threading.Event()
        self._continuation = Continuation(self)

    def close(self) -> None:
        """Stop waiting for a result store that does not answer."""
        self._closing.set()

    def run(self, delivery: Delivery) -> Outcome:
        """Run a delivery to its outcome. Never raises."""
        started = clock.monotonic()
        try:
            outcome: Outcome = drive(self._take(delivery), delivery.limits)
        except BaseException as exc:  # a fault of ours must not stop the loop, nor lose the message
            outcome = self._at_fault(delivery.message, exc)
        return outcome._replace(runtime=clock.monotonic() - started)

    async def run_async(self, delivery: Delivery) -> Outcome:
        """The same for a task that is ``async def``, on the event loop that runs now.

        :raises CancelledError: if the loop ends, as the worker does; the message has gone back.
        """
        started = clock.monotonic()
        try:
            steps = self._take(delivery)
            outcome: Outcome = await drive_async(steps, delivery.limits, self._closing)
        except BaseException as exc:
            if self._closing.is_set():
                raise
            outcome = self._at_fault(delivery.message, exc)
        return outcome._replace(runtime=clock.monotonic() - started)

    def is_async(self, delivery: Delivery) -> bool:
        """Whether the task is ``async def``."""
        task = self.app.registry.get(delivery.message.task)
        return task is not None and task.is_async

    def ended(self, delivery: Delivery, status: str, exc: Exception) -> Outcome:
        """The outcome of a run that was ended from outside. Never raises, never waits long."""
        _read_body(delivery, self.app.config)
        task = self.app.registry.get(delivery.message.task)
        if status == states.FAILURE:
            outcome = self._failed(task, delivery, exc)
        else:
            outcome = self._done(delivery, task, status, exc)
        try:
            return self._conclude(delivery, _End(outcome, exc))
        except Exception as problem:
            return self._at_fault(delivery.message, problem)

    def revoked(self, delivery: Delivery) -> Outcome:
        """The outcome of a delivery that must not run. Never raises, and never waits long."""
        _read_body(delivery, self.app.config)
        message = delivery.message
        log.info("task %s[%s] is revoked", message.task, message.id)
        task = self.app.registry.get(message.task)
        error = TaskRevokedError("revoked")
        outcome = self._done(delivery, task, states.REVOKED, error)
        try:
            return self._conclude(delivery, _End(outcome, error))
        except Exception as exc:
            log.warning("REVOKED of task %s is not stored: %s", message.id, exc)
        return outcome._replace(record=None)

    def _conclude(self, delivery: Delivery, end: _End) -> Outcome:
        """Take the steps after an end that came without a run of ours, with no patience."""
        outcome, acknowledges = end.outcome, not delivery.acknowledged
        if self._continuation.concerns(delivery, outcome):
            return self._continuation.conclude(delivery, end, patient=False).outcome
        if outcome.record is None:
            return outcome
        if self.stores_with_settlement and acknowledges:
            return outcome._replace(statement=self.backend.statement(outcome.record))
        self.backend.store(outcome.record)
        return outcome._replace(record=None)

    def _take(self, delivery: Delivery) -> Steps[Outcome]:
        message = delivery.message
        task = self.app.registry.get(message.task)
        if message.has_expired():
            return self._store(self._expired(delivery, task), delivery).outcome
        if task is None:
            return self._store(_End(self._unknown(delivery)), delivery).outcome
        failpoints.hit("before_run")
        request = self.request_of(delivery)
        with running(request):
            end = yield from self._execute(task, request, delivery)
            failpoints.hit("after_run")
            finished: _End = yield Aside(lambda: self._finish(task, request, delivery, end))
        return finished.outcome

    def _finish(
        self, task: Task[..., Any], request: Request, delivery: Delivery, end: _End
    ) -> _End:
        # Who is told that it is done may look for the result at once.
        watched = hooks.watched_at_the_end(task)
        end = self._store(end, delivery, at_once=watched)
        if watched:
            self._tell(task, request, end)
        return end

    def _execute(self, task: Task[..., Any], request: Request, delivery: Delivery) -> Steps[_End]:
        """Run the function, and publish the retries that it asked for."""
        message = delivery.message
        started = clock.monotonic()
        log.debug("task %s[%s] starts", message.task, message.id)
        try:
            value = yield from self._call(task, request, delivery)
        except BaseException as exc:  # SystemExit included: a task ends itself, not the worker
            if isinstance(exc, GeneratorExit) and self._closing.is_set():
                raise  # abandoned: the worker ends, and the message went back
            raised = exc.args[0] if isinstance(exc, _Stopped) else exc
            end = self._raised(task, request, delivery, raised)
        else:
            end = self._returned(task, delivery, value, clock.monotonic() - started)
        assert request._run is not None
        for retry in request._run.retries:  # asked for with throw=False
            self._publish_retry(delivery, retry)
        return end

    def _call(self, task: Task[..., Any], request: Request, delivery: Delivery) -> Steps[Any]:
        wants_request = bool(task.options_.get("request_context"))
        message, process = delivery.message, os.getpid()
        payload, soft = message.payload, None if task.is_async else delivery.limits[1]
        call = task.run if type(task).__call__ is Task.__call__ else task
        value: Any = _NOTHING
        try:
            with self.app.execution_context(wants_request):
                hooks.begins(task, request)
                if task.options_.get("track_started", self.app.config.track_started):
                    self._store_started(request, message)
                hooks.starts(task, request)
                with self._alarm(soft):
                    returned = call(*payload.args, **payload.kwargs)
                value = (yield returned) if inspect.iscoroutine(returned) else returned
        except StopIteration as exc:  # a generator cannot let it out
            raise _Stopped(exc) from None
        except Exception:
            if value is _NOTHING:
                raise
            # The task has done its work; what watches its end cannot undo that.
            log.exception("task %s[%s]: leaving its context failed", task.name, request.id)
        finally:
            if os.getpid() != process:
                os._exit(0)  # a fork that the task made and that came back here
        return value

    def request_of(self, delivery: Delivery) -> Request:
        """A delivery as its task sees it."""
        message = delivery.message
        task = self.app.registry.get(message.task)
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
            is_eager=self.eager,
            called_directly=False,
            callbacks=message.payload.callbacks,
            errbacks=message.payload.errbacks,
            chain=message.payload.chain,
            chord=message.payload.chord,
            replaced_task_nesting=message.replaced_task_nesting,
            stamped_headers=message.stamped_headers,
            stamps=message.stamps,
            children=delivery.children,
            _run=Run(self.backend),
        )

    def _ignores_result(self, task: Task[..., Any] | None, message: TaskMessage) -> bool:
        if message.ignore_result is not None:
            return message.ignore_result
        default = self.app.config.ignore_result
        return task.options_.get("ignore_result", default) if task else default

    # -- outcomes -------------------------------------------------------------------------

    def _returned(
        self, task: Task[..., Any], delivery: Delivery, value: Any, runtime: float
    ) -> _End:
        message = delivery.message
        log.info("task %s[%s] succeeded in %.6fs", message.task, message.id, runtime)
        return _End(self._done(delivery, task, states.SUCCESS, value), value)

    def _raised(
        self, task: Task[..., Any], request: Request, delivery: Delivery, exc: BaseException
    ) -> _End:
        message = delivery.message
        exc = retries.automatic(task, request, exc, self.app.config)
        if isinstance(exc, RetryNow):
            try:
                return self._retry(task, delivery, exc)
            except (EncodeError, MessageTooLargeError) as refused:
                exc = refused  # it would be refused each time
        if isinstance(exc, ReplaceNow):
            return self._continuation.replaced(delivery, exc)
        if isinstance(exc, Ignore):
            log.info("task %s[%s] ignored", message.task, message.id)
            return _End(Outcome(Settlement.ACKNOWLEDGE, state=states.IGNORED), exc)
        if isinstance(exc, Reject):
            return _End(self._rejected(task, delivery, exc), exc)
        exc.with_traceback(_without_our_frames(exc.__traceback__))  # some refuse an assignment
        _log_failure(message, exc, expected=tuple(task.options_.get("throws", ())))
        return _End(self._failed(task, delivery, exc), exc)

    def end(self, outcome: Outcome, value: Any) -> _End:
        """The end of a run with this outcome."""
        return _End(outcome, value)

    def failed(self, delivery: Delivery, exc: BaseException) -> _End:
        """The end of a run that has failed after the task itself."""
        message = delivery.message
        log.error("task %s[%s]: %s", message.task, message.id, exc)
        return _End(self._failed(self.app.registry.get(message.task), delivery, exc), exc)

    def _failed(
        self, task: Task[..., Any] | None, delivery: Delivery, exc: BaseException
    ) -> Outcome:
        outcome = self._done(delivery, task, states.FAILURE, exc)
        if acks_failure(task, self.app.config):
            return outcome
        return outcome._replace(
            settlement=Settlement.DEAD_LETTER, reason=f"{type(exc).__name__}: {text_of(exc)}"
        )

    def _rejected(self, task: Task[..., Any], delivery: Delivery, exc: Reject) -> Outcome:
        message = delivery.message
        reason = f"rejected by the task: {_shown(exc.reason)}"
        log.warning("task %s[%s] %s", message.task, message.id, reason)
        if exc.requeue:
            return Outcome(Settlement.REQUEUE, reason=reason, state=states.REJECTED)
        return self._done(delivery, task, states.FAILURE, exc)._replace(
            settlement=Settlement.DEAD_LETTER, reason=reason, state=states.REJECTED
        )

    def _retry(self, task: Task[..., Any], delivery: Delivery, retry: RetryNow) -> _End:
        self._publish_retry(delivery, retry)
        return _End(self._done(delivery, task, states.RETRY, retry.exc or retry), retry, retry)

    def _publish_retry(self, delivery: Delivery, retry: RetryNow) -> None:
        message = delivery.message
        failpoints.hit("before_retry")
        serializer, compression = retries.packing(delivery.raw, retry)
        publish = self._publish or self.app.publisher.publish
        publish(
            retries.next_message(message, retry),
            retry.options.get("queue", delivery.queue),
            serializer=serializer,
            compression=compression,
            retry=retry.options.get("retry", True),
            retry_policy=retry.options.get("retry_policy"),
        )
        log.info("task %s[%s] will run again: %s", message.task, message.id, retry)
        failpoints.hit("after_retry")

    def _expired(self, delivery: Delivery, task: Task[..., Any] | None) -> _End:
        message = delivery.message
        log.info("task %s[%s] expired", message.task, message.id)
        if signals.task_revoked.receivers and task is not None:
            signals.task_revoked.notify(
                task, request=self.request_of(delivery), terminated=False, signum=None,
                expired=True,
            )  # fmt: skip
        error = TaskRevokedError("expired")
        return _End(self._done(delivery, task, states.REVOKED, error), error)

    def _unknown(self, delivery: Delivery) -> Outcome:
        message = delivery.message
        error = UnknownTaskError(message.task)
        reason = (
            f"no task {message.task!r} is registered in this worker. Import its module in the "
            "app, then replay the message."
        )
        log.error("task %s[%s] is parked: %s", message.task, message.id, reason)
        signals.task_unknown.notify(
            self, message=delivery.raw, exc=error, name=message.task, id=message.id
        )
        return self._done(delivery, None, states.FAILURE, error)._replace(
            settlement=Settlement.DEAD_LETTER, reason=reason
        )

    def _done(
        self, delivery: Delivery, task: Task[..., Any] | None, status: str, value: Any
    ) -> Outcome:
        """The outcome of a run that ends with an acknowledgement."""
        message = delivery.message
        record = None
        if self.backend.enabled and self._keeps(task, message, status):
            record = _record(message, status, value)
            if delivery.children:
                record = replace(record, children=list(delivery.children))
        outcome = Outcome(Settlement.ACKNOWLEDGE, record, state=status)
        return _in_words(outcome, value) if delivery.watched else outcome

    def _keeps(self, task: Task[..., Any] | None, message: TaskMessage, status: str) -> bool:
        """Whether a state is stored."""
        if not self._ignores_result(task, message):
            return True
        default = self.app.config.store_errors_even_if_ignored
        keeps = task.options_.get("store_errors_even_if_ignored", default) if task else default
        return keeps and status in states.EXCEPTION_STATES

    # -- telling --------------------------------------------------------------------------

    def _tell(self, task: Task[..., Any], request: Request, end: _End) -> None:
        """Tell hooks and receivers, in an app context of their own."""
        state = end.outcome.state
        try:
            with self.app.execution_context(False):
                if state:  # else it runs again: its result could not be stored
                    hooks.ended(task, request, state, end.value, end.retry)
                hooks.leaves(task, request, state, end.value)
        except BaseException:
            log.exception("task %s[%s]: the context of its hooks failed", task.name, request.id)

    def _at_fault(self, message: TaskMessage, exc: BaseException) -> Outcome:
        log.exception("worker fault in task %s[%s]", message.task, message.id)
        self._tell_of_fault(message, exc)
        return Outcome(Settlement.REQUEUE, reason=f"worker fault: {type(exc).__name__}: {exc}")

    def _tell_of_fault(self, message: TaskMessage, exc: BaseException) -> None:
        if signals.task_internal_error.receivers:
            signals.task_internal_error.notify(
                self.app.registry.get(message.task), task_id=message.id,
                args=message.payload.args, kwargs=message.payload.kwargs, request=message,
                exception=exc, traceback=exc.__traceback__, einfo=hooks.info_of(exc),
            )  # fmt: skip

    # -- storing --------------------------------------------------------------------------

    def _store_started(self, request: Request, message: TaskMessage) -> None:
        if request.ignore_result or not self.backend.enabled:
            return
        meta = {"pid": os.getpid(), "hostname": self.hostname}
        try:
            self.backend.store(replace(_record(message, states.STARTED, None), result=meta))
        except Exception as exc:  # worth a line, not worth the run
            log.warning("state STARTED of %s is not stored: %s", message.id, exc)

    def _store(self, end: _End, delivery: Delivery, at_once: bool = False) -> _End:
        """Store the record now, or prepare it to be stored with the settlement."""
        message = delivery.message
        if self._settled_elsewhere:
            goes_along = end.outcome.settlement is Settlement.ACKNOWLEDGE
            at_once = at_once or delivery.acknowledged or not goes_along
        concluded = self._continuation.concerns(delivery, end.outcome)
        try:
            if concluded:
                return self._continuation.conclude(delivery, end, at_once=at_once)
            try:
                return end._replace(outcome=self.store_record(end.outcome, at_once))
            except EncodeError as exc:
                end = self.failed(delivery, exc)
                return end._replace(outcome=self.store_record(end.outcome, at_once))
        except self.backend.transient_errors as exc:
            what = "what comes next" if concluded else "its result"
            reason = f"{what} could not be stored: {type(exc).__name__}: {exc}"
            log.error("task %s[%s] is put back: %s", message.task, message.id, reason)
            return end._replace(outcome=Outcome(Settlement.REQUEUE, reason=reason))

    def store_record(self, outcome: Outcome, at_once: bool = False) -> Outcome:
        """Store the record of an outcome, or prepare it; what is stored is no longer in it."""
        record = outcome.record
        if record is None:
            return outcome
        if self.stores_with_settlement and not at_once:
            # It may have to look at the database once.
            statement = self.patiently(lambda: self.backend.statement(record), record.task_id)
            return outcome._replace(record=record, statement=statement)
        failpoints.hit("before_result")
        self.patiently(lambda: self.backend.store(record), record.task_id)
        failpoints.hit("after_result")
        return outcome._replace(record=None)

    def patiently(self, step: Callable[[], T], task_id: str) -> T:
        """Do a step that needs store or broker, again and again while that is away."""
        pause = 0.1
        deadline = clock.monotonic() + STORE_PATIENCE
        while True:
            try:
                return step()
            except self.backend.transient_errors as exc:
                if clock.monotonic() + pause > deadline or self._closing.wait(pause):
                    raise
                log.warning("result of %s is not stored yet: %s", task_id, exc)
                pause = min(pause * 2, 5.0)


def acks_failure(task: Task[..., Any] | None, config: Config) -> bool:
    """Whether the message of a run that failed, or ran out of time, is acknowledged."""
    default = config.acks_on_failure_or_timeout
    return task.options_.get("acks_on_failure_or_timeout", default) if task else default


def _read_body(delivery: Delivery, config: Config) -> None:
    """Read what was left to the process that runs the task. A pickle stays unread: it is code."""
    if delivery.message.payload is UNREAD:
        whole = parse(delivery.raw, config.accept_content - {"pickle"})
        if not isinstance(whole, Unreadable):
            delivery.message = whole


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
    """The traceback from the task's own frame on."""
    first = traceback
    while first is not None and first.tb_frame.f_code.co_filename.startswith(_OURS):
        first = first.tb_next
    return first or traceback


def _shown(reason: object) -> str:
    try:
        return str(reason)
    except Exception:  # its __str__ raises
        return safe_repr(reason)


def _log_failure(
    message: TaskMessage, exc: BaseException, expected: tuple[type[BaseException], ...] = ()
) -> None:
    text = text_of(exc)
    if isinstance(exc, expected):
        shown = text[:LOGGED_TEXT]
        log.info("task %s[%s] raised expected %s: %s", message.task, message.id,
                 type(exc).__name__, shown)  # fmt: skip
        return
    if len(text) <= LOGGED_TEXT:
        info = (type(exc), exc, exc.__traceback__)
        described = f"{type(exc).__name__}: {text}"
        log.error("task %s[%s] raised %s", message.task, message.id, described, exc_info=info)
    else:  # the log gets what the store gets: a traceback of bounded length
        traceback = format_traceback(exc)
        log.error("task %s[%s] raised\n%s", message.task, message.id, traceback)
