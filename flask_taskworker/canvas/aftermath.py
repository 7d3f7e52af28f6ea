"""What comes after a task has ended: callbacks, the next of a chain, a chord's body, errbacks.

The order of the steps, and what is safe when a process dies between them, is up to the caller.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import states
from ..backends.base import ChordPart, Header, TaskRecord
from ..backends.encoding import decode_exception, encode_exception
from ..exceptions import ChordError, InvalidSignatureError, TaskWorkerError
from ..task import Request, running
from .chains import Chain
from .chords import Chord
from .groups import Group
from .plan import Plan, Planner
from .signature import Signature, listed

if TYPE_CHECKING:
    from ..app import TaskApp
    from ..message import TaskMessage

log = logging.getLogger("flask_taskworker.worker")

#: The space of the ids that are made of other ids.
_SPACE = uuid.UUID("6d7a61f2-0d0c-4a53-8d2e-5a6f1c2b9e47")


class Failure(NamedTuple):
    """How a task failed: its exception, that as it is stored, and the traceback as text."""

    error: BaseException
    stored: Any
    traceback: str | None = None
    status: str = states.FAILURE

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """A failure that has no traceback."""
        return cls(error, encode_exception(error))


class Aftermath:
    """Plans and does what comes after tasks of one app.

    :param app: sends, and keeps results and chords.
    """

    def __init__(self, app: TaskApp) -> None:
        self.app = app

    # -- success --------------------------------------------------------------------------

    def next_of(self, message: TaskMessage, value: Any) -> tuple[Plan, list[Any]]:
        """What to send once a task has returned ``value``.

        :return: the plan, and the tuples of the results of what it sends.
        :raises InvalidSignatureError: if a signature in the message is none.
        """
        root_id = message.root_id or message.id
        planner = Planner(self.app, message.id, root_id)
        place = {"parent_id": message.id, "root_id": root_id}
        callbacks = [self._signature(callback) for callback in message.payload.callbacks or ()]
        handles = [
            callback.plan(planner, (value,), {}, place)
            for callback in _side_by_side(callbacks, message.id, "link")
        ]
        chain = message.payload.chain
        if chain:
            following = self._signature(chain[-1])
            handles.append(
                following.plan(planner, (value,), {}, {**place, "chain": list(chain[:-1])})
            )
        return planner.plan, [handle.as_tuple() for handle in handles if handle is not None]

    def _signature(self, fields: Any) -> Signature[Any]:
        found = Signature.from_dict(fields, app=self.app)
        return found.clone() if found is fields else found

    # -- failure --------------------------------------------------------------------------

    def fail_rest(self, chain: Sequence[Any] | None, failure: Failure) -> None:
        """Let the tasks that would have come later in a chain share its failure."""
        for fields in reversed(listed(chain)):
            try:
                lost = list(_never_run(self._signature(fields)))
            except InvalidSignatureError as exc:
                log.error("a step of a failed chain cannot be told: %s", exc)
                continue
            for signature in lost:
                self._fail_one(signature.options, failure)

    def _fail_one(self, options: Mapping[str, Any], failure: Failure) -> None:
        """Store the failure of a call that will not be made, and count it where it is counted."""
        task_id, group_id, chord = (options.get(k) for k in ("task_id", "group_id", "chord"))
        if not task_id:
            return
        record = TaskRecord(
            task_id=task_id,
            status=failure.status,
            result=failure.stored,
            traceback=failure.traceback,
            group_id=group_id,
            reply_to=options.get("reply_to"),
            correlation_id=task_id,
        ).done_now()
        if chord and group_id:
            part = ChordPart(task_id, options.get("group_index"), failure.status, failure.stored)
            self.arrive(group_id, part, chord, record=record)
        elif self.app.backend.enabled:
            self.app.backend.store(record)

    def call_errbacks(self, request: Request, failure: Failure) -> None:
        """Call the errbacks of a failed task; send those that are to run as tasks.

        :raises BrokerUnavailableError: if they cannot be sent.
        """
        sent: list[Signature[Any]] = []
        for fields in request.errbacks or ():
            try:
                errback = self._signature(fields)
            except InvalidSignatureError as exc:
                log.error("an errback of task %s[%s]: %s", request.task, request.id, exc)
                continue
            if self._is_inline(errback):
                self._call_inline(errback, request, failure)
            else:
                sent.append(errback)
        task_id = request.id
        if not sent or task_id is None:
            return
        root_id = request.root_id or task_id
        planner = Planner(self.app, task_id, root_id)
        group = Group(sent, app=self.app, task_id=derived_id(task_id, "link_error"))
        for index, errback in enumerate(group.tasks):
            _give_id(errback, task_id, f"link_error.{index}")
        group.plan(planner, (task_id,), {}, {"parent_id": task_id, "root_id": root_id})
        self.app.carry_out(planner.plan)

    def _is_inline(self, errback: Signature[Any]) -> bool:
        """Whether it takes ``(request, exc, traceback)`` and runs here.

        One argument is the id of the failed task; a bound task may want to retry.
        """
        task = self.app.registry.get(errback.task)
        if task is None or task.bind or errback.kind is not None:
            return False
        stored = ((), {}) if errback.immutable else (errback.args, errback.kwargs)
        return bool(task._signature.free_positional(*stored) > 1)

    def _call_inline(self, errback: Signature[Any], request: Request, failure: Failure) -> None:
        try:
            with self.app.execution_context(False), running(request):
                errback(request, failure.error, failure.traceback)
        except Exception:
            log.exception("errback %s of task %s[%s] raised", errback, request.task, request.id)

    # -- chords ---------------------------------------------------------------------------

    def arrive(
        self,
        group_id: str,
        part: ChordPart,
        body: Any,
        record: TaskRecord | None = None,
        root_id: str | None = None,
    ) -> None:
        """Count a task of a chord's header, and send the body, or fail it, after the last.

        :param body: its signature.
        :param record: of the task; stored with the count.
        :param root_id: of the task.
        """

        def finish(header: Header, transaction: Any) -> bool:
            if any(part.status in states.PROPAGATE_STATES for part in header.parts):
                return False
            planner = Planner(self.app, part.task_id, root_id)
            self._signature(body).plan(planner, (arranged(header),))
            self.app.carry_out(planner.plan, transaction=transaction)
            return True

        header = None
        try:
            header = self.app.backend.arrive(group_id, part, finish, record)
        except (TaskWorkerError, TypeError, ValueError) as exc:
            if isinstance(exc, self.app.backend.transient_errors):
                raise
            log.error("the body of chord %s cannot be sent: %s", group_id, exc)
            if record is not None:  # where it was in the transaction, it is gone with that
                self.app.backend.store(record)
            self.fail_body(body, ChordError(f"Callback error: {exc!r}"))
            self.app.backend.close_chord(group_id)
        if header is not None:
            self.fail_body(body, chord_error(header))
            self.app.backend.close_chord(group_id)

    def fail_body(self, body: Any, error: ChordError) -> None:
        """Let the body of a chord fail without having run, and all that waits for it."""
        try:
            signature = self._signature(body)
        except InvalidSignatureError as exc:
            log.error("a chord failed (%s), and its body is no signature: %s", error, exc)
            return
        log.error("the body of a chord fails, %s: %s", signature.task, error)
        failure = Failure.of(error)
        cause = Failure.of(error.__cause__) if error.__cause__ is not None else failure
        several = isinstance(signature, Group)
        shared = listed(signature.options.get("link_error"))
        for lost in _never_run(signature):
            options = lost.options
            self._fail_one(options, cause if several else failure)
            own = listed(options.get("link_error"))
            errbacks = own + [one for one in shared if one not in own]
            request = Request(
                id=options.get("task_id"), task=lost.task, args=lost.args, kwargs=lost.kwargs,
                errbacks=errbacks, called_directly=False,
            )  # fmt: skip
            self.call_errbacks(request, cause if several else failure)
        self.fail_rest(signature.options.get("chain"), failure)


def chord_error(header: Header) -> ChordError:
    """The error of a body whose header has failed; its text is Celery's."""
    failed = next(part for part in header.parts if part.status in states.PROPAGATE_STATES)
    cause = decode_exception(failed.result, None)
    return chord_error_of(f"Dependency {failed.task_id} raised {cause!r}", cause)


def chord_error_of(text: str, cause: Any) -> ChordError:
    """The error of a body, with what caused it."""
    error = ChordError(text)
    error.__cause__ = cause if isinstance(cause, BaseException) else None
    return error


def arranged(header: Header) -> list[Any]:
    """The results of a header, in its order and in its shape."""
    if header.shape is None:
        return [part.result for part in header.parts]
    results: dict[str, list[Any]] = {}
    for part in header.parts:
        results.setdefault(part.task_id, []).append(part.result)

    def shaped(node: Any) -> Any:
        (task_id, _), members = node
        if members is not None:
            return [shaped(member) for member in members]
        found = results.get(task_id)
        return found.pop(0) if found else None

    values: list[Any] = shaped(header.shape)
    # What was added to the chord while it ran has no place in its shape.
    return values + [value for left in results.values() for value in left]


def derived_id(task_id: str, label: str) -> str:
    """An id that is the same each time it is made.

    A task that is delivered twice sends its callbacks twice; with the same ids they are
    the same calls to whoever looks.
    """
    return str(uuid.uuid5(_SPACE, f"{task_id}.{label}"))


def _give_id(signature: Signature[Any], task_id: str, label: str) -> None:
    if signature.kind is None and not signature.id:
        signature.id = derived_id(task_id, label)


def _side_by_side(
    signatures: list[Signature[Any]], task_id: str, label: str
) -> Iterable[Signature[Any]]:
    """Callbacks as they are sent: one as it is, several that are no groups as a group."""
    for index, signature in enumerate(signatures):
        _give_id(signature, task_id, f"{label}.{index}")
    if len(signatures) < 2:
        return signatures
    groups = [signature for signature in signatures if isinstance(signature, Group)]
    others = [signature for signature in signatures if not isinstance(signature, Group)]
    if others:
        groups.append(Group(others, app=others[0]._app, task_id=derived_id(task_id, label)))
    return groups


def _never_run(signature: Signature[Any]) -> Iterator[Signature[Any]]:
    """The calls whose results somebody may wait for, when a signature is not sent."""
    if isinstance(signature, Chord):
        if signature.kwargs["body"] is not None:
            yield from _never_run(signature.body)
    elif isinstance(signature, (Chain, Group)):
        for task in signature.tasks:
            yield from _never_run(task)
    else:
        yield signature
