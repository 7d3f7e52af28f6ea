"""The steps after a run that leads to others: send what comes next, store, count, fail onwards.

Success: send callbacks and the next of the chain, store the result, count the task in its chord.
Failure: store it, count it, fail the rest of the chain, call the errbacks.

The message is settled after the last step, so a process that dies between two of them has the
task run again, and all steps are taken again: nothing is lost. What was sent already is sent once
more with the same id. In a chord the task is counted once, whatever happens. Where messages and
results are in one database, what comes next is sent in the transaction that stores the result and
settles the message: all of it has happened, or nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import failpoints, states
from ..backends.base import ChordPart
from ..backends.encoding import dumps, encode_exception
from ..canvas.aftermath import Aftermath, Failure
from ..canvas.plan import Plan, Planner
from ..exceptions import (
    ChordNotSupportedError,
    EncodeError,
    InvalidMessageError,
    InvalidSignatureError,
    MessageTooLargeError,
    NoResultBackendError,
    TaskArgumentError,
)
from .delivery import Delivery, Outcome, Settlement
from .outcomes import End, Outcomes

if TYPE_CHECKING:
    from ..app import TaskApp
    from ..task import ReplaceNow, Request
    from .recording import Recorder

log = logging.getLogger("flask_taskworker.worker")

#: Takes a step, with or without patience.
Take = Callable[[Callable[[], object]], object]

#: What is wrong with what comes next, and would be wrong each time: the task has failed.
UNSENDABLE = (
    EncodeError,
    MessageTooLargeError,
    InvalidSignatureError,
    InvalidMessageError,
    TaskArgumentError,
    ChordNotSupportedError,
    NoResultBackendError,
)


class Continuation:
    """Takes the steps after a run.

    :param app: whose tasks.
    :param outcomes: makes the outcomes of runs that fail here.
    :param recorder: stores records, and takes steps with patience.
    :param request_of: a delivery as its task sees it.
    """

    def __init__(
        self,
        app: TaskApp,
        outcomes: Outcomes,
        recorder: Recorder,
        request_of: Callable[[Delivery], Request],
    ) -> None:
        self._app = app
        self._outcomes = outcomes
        self._recorder = recorder
        self._request_of = request_of
        self._aftermath = Aftermath(app)

    def concerns(self, delivery: Delivery, outcome: Outcome) -> bool:
        """Whether a run that leads on has ended. A task that is not known here has not."""
        if outcome.settlement is Settlement.REQUEUE:
            return False
        known = delivery.message.task in self._app.registry
        return outcome.state == states.REVOKED or (outcome.state in states.READY_STATES and known)

    def conclude(
        self, delivery: Delivery, end: End, *, at_once: bool = False, patient: bool = True
    ) -> End:
        """Take all steps but the settlement.

        :param at_once: whether the result is to be stored before this returns.
        :param patient: whether to wait for a store or a broker that is away.
        :return: the end, with what is left to be stored with the settlement.
        :raises Exception: one of the backend's ``transient_errors``, if a step could not be taken
            in time.
        """
        take = self._taker(delivery, patient)
        if end.outcome.state == states.SUCCESS:
            try:
                if end.outcome.record is not None or delivery.message.payload.chord:
                    # Else what comes next would go out after a result that cannot be kept.
                    dumps(end.value, self._app.config.result_serializer)
                end, children = self._send_next(delivery, end, take, at_once)
            except UNSENDABLE as exc:
                end = self._outcomes.failed_after_run(delivery, exc)
            else:
                return end._replace(
                    outcome=self._store(delivery, _with(end, children), take, at_once)
                )
        return self._fail(delivery, end, take)

    def replaced(self, delivery: Delivery, replacing: ReplaceNow) -> End:
        """Send what takes the place of a task, under its id."""
        message, app = delivery.message, self._app
        planner = Planner(app, message.id, message.root_id or message.id)
        signature = replacing.signature
        try:
            signature.plan(planner)
            self._taker(delivery)(lambda: app.carry_out(planner.plan))
        except UNSENDABLE as exc:
            return self._outcomes.failed_after_run(delivery, exc)
        except app.backend.transient_errors as exc:
            reason = f"what replaces it could not be sent: {type(exc).__name__}: {exc}"
            return End(Outcome(Settlement.REQUEUE, reason=reason), exc)
        log.info("task %s[%s] is replaced by %s", message.task, message.id, signature.task)
        return End(Outcome(Settlement.ACKNOWLEDGE, state=states.IGNORED), replacing)

    def _send_next(
        self, delivery: Delivery, end: End, take: Take, at_once: bool
    ) -> tuple[End, list[Any]]:
        message, app = delivery.message, self._app
        if not message.payload.callbacks and not message.payload.chain:
            return end, []
        failpoints.hit("before_continuation")
        plan, children = self._aftermath.next_of(message, end.value)
        packed = None
        if self._settles_with_messages(delivery) and not at_once:
            packed = app.publisher.pack(plan.messages)
        if packed is None:
            take(lambda: app.carry_out(plan))
        else:
            take(lambda: app.carry_out(Plan(chords=plan.chords)))
            end = end._replace(outcome=end.outcome._replace(messages=packed))
        failpoints.hit("after_continuation")
        return end, children

    def _settles_with_messages(self, delivery: Delivery) -> bool:
        """Whether messages can go out in the transaction that acknowledges this one."""
        return (
            self._recorder.with_settlement
            and not delivery.acknowledged
            and not delivery.message.payload.chord
        )

    def _store(self, delivery: Delivery, end: End, take: Take, at_once: bool) -> Outcome:
        """Store the record, and count the task in the same step if it is part of a chord."""
        message, outcome = delivery.message, end.outcome
        group, body, record = message.group, message.payload.chord, outcome.record
        if not body or not group:
            return self._recorder.store(outcome, at_once)
        part = ChordPart(message.id, message.group_index, outcome.state, _stored(end))
        root_id = message.root_id or message.id
        failpoints.hit("before_chord")
        take(lambda: self._aftermath.arrive(group, part, body, record, root_id))
        failpoints.hit("after_chord")
        return outcome._replace(record=None)

    def _fail(self, delivery: Delivery, end: End, take: Take) -> End:
        # Whoever is called because of the failure may look at it: it is stored before.
        message, record, stored = delivery.message, end.outcome.record, _stored(end)
        if message.payload.chord and message.group:
            end = end._replace(outcome=self._store(delivery, end, take, at_once=True))
        elif record is not None:
            take(lambda: self._recorder.backend.store(record))
            end = end._replace(outcome=end.outcome._replace(record=None))
        failure = Failure(
            end.value, stored, record.traceback if record else None, end.outcome.state
        )
        take(lambda: self._aftermath.fail_rest(message.payload.chain, failure))
        if message.payload.errbacks and end.outcome.state == states.FAILURE:
            request = self._request_of(delivery)
            take(lambda: self._aftermath.call_errbacks(request, failure))
        return end

    def _taker(self, delivery: Delivery, patient: bool = True) -> Take:
        """Takes a step that must not be lost."""
        task_id = delivery.message.id
        return lambda step: self._recorder.take(step, task_id, patient=patient)


def _with(end: End, children: list[Any]) -> End:
    """The end with what was sent because of it."""
    record = end.outcome.record
    if record is None or not children:
        return end
    record = replace(record, children=[*(record.children or ()), *children])
    return end._replace(outcome=end.outcome._replace(record=record))


def _stored(end: End) -> Any:
    """The value of a run, or its exception, as plain data."""
    if end.outcome.record is not None:
        return end.outcome.record.result
    return encode_exception(end.value) if isinstance(end.value, BaseException) else end.value
