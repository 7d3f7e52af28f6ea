"""What takes the place of a running task, or joins it in its chord."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..exceptions import InvalidSignatureError
from .chains import Chain
from .chords import Chord
from .groups import Group
from .signature import Signature, listed, maybe_signature

if TYPE_CHECKING:
    from ..app import TaskApp
    from ..task import Request


def replacement(request: Request, signature: Signature[Any], app: TaskApp) -> Signature[Any]:
    """A signature with the id and the place of a run.

    :raises InvalidSignatureError: if it has a place of its own, or nothing in it.
    """
    if signature.options.get("chord"):
        raise InvalidSignatureError("what replaces a task must not be part of a chord itself")
    if isinstance(signature, Chain) and not signature.tasks:
        raise InvalidSignatureError("a task cannot be replaced by an empty chain")
    signature = maybe_signature(signature, app, clone=True)
    nesting = request.replaced_task_nesting + 1
    signature = _with_one_result(signature, app)
    for callback in listed(request.callbacks):
        signature.link(maybe_signature(callback, app))
    for errback in listed(request.errbacks):
        signature.link_error(maybe_signature(errback, app))
    if isinstance(signature, Chain):  # its callbacks are for its last step, not for what follows
        signature = Chain(signature.unchained(), app=app)
        for step in signature.tasks:
            step.options["replaced_task_nesting"] = nesting
    signature.freeze(request.id)
    signature.options.update(
        chord=request.chord,
        group_id=request.group,
        group_index=request.group_index,
        root_id=request.root_id,
        replaced_task_nesting=nesting,
    )
    for step in reversed(listed(request.chain)):
        following = maybe_signature(step, app, clone=True)
        following.options["replaced_task_nesting"] = nesting
        signature = signature | following
    return signature


def _with_one_result(signature: Signature[Any], app: TaskApp) -> Signature[Any]:
    """The same, with the results of a group at its end gathered into one."""
    gather: Signature[Any] = Signature("celery.accumulate", (), {"index": 0}, app=app)
    if isinstance(signature, Group):
        return Chord(signature, gather, app=app)
    if isinstance(signature, Chain) and isinstance(signature.tasks[-1], Group):
        *first, last = signature.tasks
        signature.tasks = [*first, Chord(last, gather, app=app)]
    return signature


def joined_to_chord(request: Request, signature: Signature[Any], app: TaskApp) -> Signature[Any]:
    """A signature as one more task of a run's chord, which waits for it.

    :raises InvalidSignatureError: if the run belongs to no chord.
    """
    if not request.chord or not request.group:
        raise InvalidSignatureError(f"task {request.task}[{request.id}] is not part of a chord")
    added: Signature[Any] = maybe_signature(signature, app, clone=True)
    added.options.update(
        group_id=request.group,
        group_index=request.group_index,
        chord=request.chord,
        root_id=request.root_id,
    )
    added.freeze()
    app.backend.grow_chord(request.group)
    return added
