"""Tasks one after the other, and how chains, groups and chords are put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..exceptions import TaskArgumentError
from .chords import Chord
from .groups import PLACE, Group, Several, first_of, members_of
from .signature import Signature, listed, maybe_signature, source_of

if TYPE_CHECKING:
    from .plan import Planner

R = TypeVar("R", covariant=True)
R2 = TypeVar("R2")


class Chain(Several[R], kind="chain"):
    """Tasks one after the other, each with the result of the one before.

    Use :func:`chain`, or ``|`` between signatures.
    """

    def __init__(
        self,
        tasks: Iterable[Any] = (),
        *,
        args: Sequence[Any] = (),
        app: Any = None,
        **options: Any,
    ) -> None:
        source = source_of(app)
        members = [maybe_signature(task, source) for task in tasks]
        super().__init__("celery.chain", args, {"tasks": members}, options, app=source)

    def unchained(self) -> list[Signature[Any]]:
        """Its steps, with the callbacks of the chain moved to them."""
        steps = [task.clone() for task in self.tasks]
        for callback in listed(self.options.get("link")):
            steps[-1].link(callback)
        for errback in listed(self.options.get("link_error")):
            for step in steps:
                step.link_error(errback)
        if steps and self.options.get("task_id"):
            steps[-1].options.setdefault("task_id", self.options["task_id"])
        return steps

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Send it; an empty chain gives None."""
        return self.apply_async(args, kwargs) if self.tasks else None

    def __or__(self, other: Signature[R2]) -> Signature[R2]:  # type: ignore[override]
        if not isinstance(other, Signature):
            return NotImplemented
        return join(self.unchained(), other)

    __ior__ = __or__  # type: ignore[assignment]

    def size(self) -> int:
        return next((size for task in reversed(self.tasks) if (size := task.size())), 0)

    def freeze(self, *args: Any, **kwargs: Any) -> Any:
        self.tasks = steps = _steps(self.tasks)
        if not steps:
            raise TaskArgumentError("an empty chain has nothing to send")
        result = _freeze_in_line(steps, *args, **kwargs)
        self.options["task_id"] = result.id
        return result

    def plan(
        self,
        planner: Planner,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        merged = self._merged(args, kwargs or {}, options or {})
        options = merged[2]
        steps = _steps(self.tasks)
        if not steps:
            return None
        for callback in listed(options.pop("link", None)):
            steps[-1].link(callback)
        for errback in listed(options.pop("link_error", None)):
            for step in steps:
                step.link_error(errback)
        place = {name: options.pop(name, None) for name in PLACE[:-1]}
        options.pop("reply_to", None)
        result = _freeze_in_line(steps, **place)
        after = options.pop("chain", None)
        if after is not None or len(steps) > 1:
            # Reversed, so that a worker takes the next one from the end.
            options["chain"] = [*(after or ()), *reversed(steps[1:])]
        if place["parent_id"]:
            options["parent_id"] = place["parent_id"]
        sent = steps[0].plan(planner, merged[0], kwargs, options)
        return result if len(steps) > 1 else sent

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.tasks)) or "<empty chain>"


def chain(*tasks: Any, **options: Any) -> Signature[Any]:
    """Tasks one after the other, each with the result of the one before.

    :param tasks: signatures, or one iterable of them.
    :param options: of the chain as a whole: ``link`` is for its last task, ``link_error`` for
        each, ``task_id`` is the id of the last, all others are for the first.
    :return: what can be sent. A group in front of another task makes the two a chord.
    """
    app = options.pop("app", None)
    joined = join([], *members_of(tasks, app))
    if app is not None:
        joined._app = source_of(app)
    return joined.set(**options) if options else joined


def join(steps: list[Signature[Any]], *others: Signature[Any]) -> Signature[Any]:
    """Steps, which become the result's own, and what comes after them.

    :return: a chain; a group or a chord if there is nothing else.
    """
    for other in others:
        for step in other.unchained() if isinstance(other, Chain) else [other.clone()]:
            _append(steps, step)
    if len(steps) == 1 and isinstance(steps[0], (Group, Chord)):
        return steps[0]
    return Chain(steps)


def _append(steps: list[Signature[Any]], step: Signature[Any]) -> None:
    if isinstance(step, Group):
        step = _unrolled(step)
        if isinstance(step, Group) and not step.tasks and steps:
            return
    if steps and isinstance(steps[-1], Group):
        steps[-1] = Chord(steps[-1], step) if steps[-1].tasks else step
    else:
        steps.append(step)


def _steps(tasks: Iterable[Signature[Any]]) -> list[Signature[Any]]:
    """Copies of the steps of a chain, with no chain in it and each group a chord's header."""
    steps: list[Signature[Any]] = []
    for task in tasks:
        if isinstance(task, Chain):
            for step in _steps(task.unchained()):
                _append(steps, step)
        else:
            _append(steps, task.clone())
        if steps:
            steps += _split(steps[-1])
    return steps


def _split(step: Signature[Any]) -> list[Signature[Any]]:
    """What follows a chord whose body is a chain; the first step of that stays the body.

    Each task of a header carries the body: it should not carry all the rest as well.
    """
    body = step.kwargs["body"] if isinstance(step, Chord) else None
    if not isinstance(body, Chain) or not body.tasks:
        return []
    first, *rest = _steps(body.unchained())
    step.kwargs["body"] = first
    return [*_split(step), *rest]


def _unrolled(task: Group) -> Signature[Any]:
    """A group of one is that one."""
    while len(task.tasks) == 1:
        member = task.tasks[0]
        if not isinstance(member, Group):
            return member
        task = member
    return task


def _freeze_in_line(
    steps: Sequence[Signature[Any]],
    task_id: str | None = None,
    group_id: str | None = None,
    chord: Any = None,
    root_id: str | None = None,
    parent_id: str | None = None,
    group_index: int | None = None,
) -> Any:
    """Freeze the steps of a chain: its place is that of the last, whose result it is."""
    result: Any = None
    for step in steps:
        before = result
        if step is steps[-1]:
            result = step.freeze(
                task_id, group_id=group_id, chord=chord, root_id=root_id, group_index=group_index
            )
        else:
            result = step.freeze(root_id=root_id)
        first_of(result).parent = before
    return result
