"""One run of one task, as a list of steps.

decode (done) → expired? → known? → context → STARTED → run → retry → what comes next →
result → hooks → outcome.

Settling the message is not among them: the consumer does it last, when everything
that must not be lost is safe. A crash between any two steps means "runs again".

The steps are generators, for the sake of ``async def`` tasks: a step that has to wait yields
what it waits for, and whoever drives the steps (:mod:`.driving`) decides how to.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import threading
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .. import clock, failpoints, retries, signals, states
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
from . import hooks
from .delivery import Delivery, Outcome, Settlement
from .driving import Aside, Steps, drive, drive_async
from .failures import log_failure, trim_traceback
from .outcomes import End, Outcomes
from .recording import Recorder

if TYPE_CHECKING:
    from ..app import TaskApp
    from ..backends.base import ResultBackend
    from ..config import Config
    from ..message import TaskMessage
    from .continuation import Continuation

log = logging.getLogger("flask_taskworker.worker")

_NOTHING = object()


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
        self._outcomes = Outcomes(app, self.backend)
        self._recorder = Recorder(self.backend, stores_with_settlement, self._closing)

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
        if status == states.FAILURE:
            outcome = self._outcomes.failed(delivery, exc)
        else:
            self._tell_of_revocation(delivery)
            outcome = self._outcomes.done(delivery, status, exc)
        try:
            return self._conclude(delivery, End(outcome, exc))
        except Exception as problem:
            return self._at_fault(delivery.message, problem)

    def revoked(self, delivery: Delivery) -> Outcome:
        """The outcome of a delivery that must not run. Never raises, and never waits long."""
        _read_body(delivery, self.app.config)
        message = delivery.message
        log.info("task %s[%s] is revoked", message.task, message.id)
        error = TaskRevokedError("revoked")
        self._tell_of_revocation(delivery)
        outcome = self._outcomes.done(delivery, states.REVOKED, error)
        try:
            return self._conclude(delivery, End(outcome, error))
        except Exception as exc:
            log.warning("REVOKED of task %s is not stored: %s", message.id, exc)
        return outcome._replace(record=None)

    def _conclude(self, delivery: Delivery, end: End) -> Outcome:
        """Take the steps after an end that came without a run of ours, with no patience."""
        if self._leads_on(delivery, end):
            return self._continuation.conclude(delivery, end, patient=False).outcome
        return self._recorder.store(end.outcome, at_once=delivery.acknowledged, patient=False)

    @cached_property
    def _continuation(self) -> Continuation:
        from .continuation import Continuation  # many workers never need it, nor the canvas

        return Continuation(self.app, self._outcomes, self._recorder, self.request_of)

    def _leads_on(self, delivery: Delivery, end: End) -> bool:
        return delivery.message.payload.leads_on and self._continuation.concerns(
            delivery, end.outcome
        )

    def _take(self, delivery: Delivery) -> Steps[Outcome]:
        message = delivery.message
        task = self.app.registry.get(message.task)
        if message.has_expired():
            return self._store(self._expired(delivery), delivery).outcome
        if task is None:
            return self._store(End(self._unknown(delivery)), delivery).outcome
        failpoints.hit("before_run")
        request = self.request_of(delivery)
        with running(request):
            end = yield from self._execute(task, request, delivery)
            failpoints.hit("after_run")
            finished: End = yield Aside(lambda: self._finish(task, request, delivery, end))
        return finished.outcome

    def _finish(self, task: Task[..., Any], request: Request, delivery: Delivery, end: End) -> End:
        # Who is told that it is done may look for the result at once.
        watched = hooks.watched_at_the_end(task)
        end = self._store(end, delivery, at_once=watched)
        if watched:
            self._tell(task, request, end)
        return end

    def _execute(self, task: Task[..., Any], request: Request, delivery: Delivery) -> Steps[End]:
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
            end = self._returned(delivery, value, clock.monotonic() - started)
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
                if self._tracks_start(request, message):
                    self._recorder.store_started(message, self.hostname)
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

    def _tracks_start(self, request: Request, message: TaskMessage) -> bool:
        return not request.ignore_result and self.app.option_of(message.task, "track_started")

    def request_of(self, delivery: Delivery) -> Request:
        """A delivery as its task sees it."""
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
            ignore_result=self._outcomes.ignores_result(message),
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

    # -- how it ended ---------------------------------------------------------------------

    def _returned(self, delivery: Delivery, value: Any, runtime: float) -> End:
        message = delivery.message
        log.info("task %s[%s] succeeded in %.6fs", message.task, message.id, runtime)
        return End(self._outcomes.done(delivery, states.SUCCESS, value), value)

    def _raised(
        self, task: Task[..., Any], request: Request, delivery: Delivery, exc: BaseException
    ) -> End:
        message = delivery.message
        exc = retries.automatic(task, request, exc, self.app.config)
        if isinstance(exc, RetryNow):
            try:
                return self._retry(delivery, exc)
            except (EncodeError, MessageTooLargeError) as refused:
                exc = refused  # it would be refused each time
        if isinstance(exc, ReplaceNow):
            return self._continuation.replaced(delivery, exc)
        if isinstance(exc, Ignore):
            log.info("task %s[%s] ignored", message.task, message.id)
            return End(Outcome(Settlement.ACKNOWLEDGE, state=states.IGNORED), exc)
        if isinstance(exc, Reject):
            return End(self._outcomes.rejected(delivery, exc), exc)
        trim_traceback(exc)
        log_failure(message, exc, expected=tuple(task.options_.get("throws", ())))
        return End(self._outcomes.failed(delivery, exc), exc)

    def _retry(self, delivery: Delivery, retry: RetryNow) -> End:
        self._publish_retry(delivery, retry)
        outcome = self._outcomes.done(delivery, states.RETRY, retry.exc or retry)
        return End(outcome, retry, retry)

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

    def _expired(self, delivery: Delivery) -> End:
        message = delivery.message
        log.info("task %s[%s] expired", message.task, message.id)
        self._tell_of_revocation(delivery, expired=True)
        error = TaskRevokedError("expired")
        return End(self._outcomes.done(delivery, states.REVOKED, error), error)

    def _tell_of_revocation(self, delivery: Delivery, *, expired: bool = False) -> None:
        task = self.app.registry.get(delivery.message.task)
        if signals.task_revoked.receivers and task is not None:
            signum = delivery.terminated
            signals.task_revoked.notify(
                task, request=self.request_of(delivery), terminated=signum is not None,
                signum=signum, expired=expired,
            )  # fmt: skip

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
        return self._outcomes.parked(delivery, error, reason)

    # -- telling --------------------------------------------------------------------------

    def _tell(self, task: Task[..., Any], request: Request, end: End) -> None:
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

    def _store(self, end: End, delivery: Delivery, at_once: bool = False) -> End:
        """Store the record now, or prepare it to be stored with the settlement."""
        message = delivery.message
        if self._settled_elsewhere:
            goes_along = end.outcome.settlement is Settlement.ACKNOWLEDGE
            at_once = at_once or delivery.acknowledged or not goes_along
        concluded = self._leads_on(delivery, end)
        try:
            if concluded:
                return self._continuation.conclude(delivery, end, at_once=at_once)
            try:
                return end._replace(outcome=self._recorder.store(end.outcome, at_once))
            except EncodeError as exc:
                end = self._outcomes.failed_after_run(delivery, exc)
                return end._replace(outcome=self._recorder.store(end.outcome, at_once))
        except self.backend.transient_errors as exc:
            what = "what comes next" if concluded else "its result"
            reason = f"{what} could not be stored: {type(exc).__name__}: {exc}"
            log.error("task %s[%s] is put back: %s", message.task, message.id, reason)
            return end._replace(outcome=Outcome(Settlement.REQUEUE, reason=reason))


def _read_body(delivery: Delivery, config: Config) -> None:
    """Read what was left to the process that runs the task. A pickle stays unread: it is code."""
    if delivery.message.payload is UNREAD:
        whole = parse(delivery.raw, config.accept_content - {"pickle"})
        if not isinstance(whole, Unreadable):
            delivery.message = whole
