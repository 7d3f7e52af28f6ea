"""Calls of several tasks: one after the other, side by side, and side by side with an end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..exceptions import InvalidSignatureError, TaskArgumentError
from .signature import AppSource, Signature, listed, maybe_signature, plain, source_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..result import AsyncResult, GroupResult
    from ..task import Task
    from .plan import Planner

R = TypeVar("R", covariant=True)
R2 = TypeVar("R2")

#: Options that belong to the place of a signature among others, not to the calls in it.
_PLACE = ("task_id", "group_id", "group_index", "chord", "root_id", "parent_id", "reply_to")


class _Several(Signature[R]):
    """What chains and groups have in common: members in ``kwargs["tasks"]``."""

    @classmethod
    def _of(cls, fields: dict[str, Any], app: Any) -> Self:
        return cast("Self", super()._of(_with_members(fields, ("tasks",), app), app))

    @property
    def tasks(self) -> list[Signature[Any]]:
        return cast("list[Signature[Any]]", self.kwargs["tasks"])

    @tasks.setter
    def tasks(self, value: Iterable[Signature[Any]]) -> None:
        self.kwargs["tasks"] = list(value)

    def _source(self) -> AppSource:
        return self._app or _source_of_first(self.tasks)

    def clone(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        copy = super().clone(args, None, **options)
        copy.kwargs["tasks"] = [task.clone() for task in self.tasks]
        return copy


class Chain(_Several[R], kind="chain"):
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
        place = {name: options.pop(name, None) for name in _PLACE[:-1]}
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
    joined = join([], *_members(tasks, app))
    if app is not None:
        joined._app = source_of(app)
    return joined.set(**options) if options else joined


class Group(_Several["list[Any]"], kind="group"):
    """Tasks side by side.

    :param tasks: signatures, or one iterable of them.
    :param options: for the call of each.
    """

    def __init__(self, *tasks: Any, app: Any = None, **options: Any) -> None:
        source = source_of(app)
        super().__init__(
            "celery.group", (), {"tasks": _members(tasks, source)}, options, app=source
        )

    def __len__(self) -> int:
        return len(self.tasks)

    def __bool__(self) -> bool:
        return True

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Send it with these arguments for each task."""
        return self.apply_async(args, **options)

    def delay(self, *args: Any, **kwargs: Any) -> GroupResult:  # type: ignore[override]
        return self.apply_async(args, kwargs)

    def apply_async(  # type: ignore[override]
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> GroupResult:
        return cast("GroupResult", super().apply_async(args, kwargs, **options))

    def __or__(self, other: Signature[R2]) -> Signature[R2]:  # type: ignore[override]
        if not isinstance(other, Signature):
            return NotImplemented
        return join([self.clone()], other)

    __ior__ = __or__  # type: ignore[assignment]

    def set_immutable(self, immutable: bool) -> None:
        for task in self.tasks:
            task.set_immutable(immutable)

    def link(self, callback: Signature[Any]) -> Signature[Any]:
        """Link a copy to the first task, without that one's result; see a chord for the rest."""
        return self.tasks[0].link(callback.clone().set(immutable=True))

    def link_error(self, errback: Signature[Any]) -> Any:
        """Link a copy to each task."""
        return tuple(task.link_error(errback.clone()) for task in self.tasks)

    def size(self) -> int:
        return sum(task.size() for task in self.tasks)

    def flat(self) -> list[Signature[Any]]:
        """Copies of its tasks, those of groups among them included."""
        found: list[Signature[Any]] = []
        for task in self.tasks:
            if isinstance(task, Group):
                found += task.flat()
            elif not isinstance(task, Chain) or task.tasks:
                found.append(task.clone())
        return found

    def freeze(
        self,
        task_id: str | None = None,
        group_id: str | None = None,
        chord: Any = None,
        root_id: str | None = None,
        parent_id: str | None = None,
        group_index: int | None = None,
    ) -> Any:
        place = {
            "group_id": group_id, "chord": chord, "root_id": root_id, "parent_id": parent_id,
        }  # fmt: skip
        self.tasks = members = self.flat()
        options = self.options
        if not options.get("task_id"):
            options["task_id"] = task_id or self.app.new_id()
        options.update({name: value for name, value in place.items() if value is not None})
        if group_index is not None:
            options["group_index"] = group_index
        results = [
            member.freeze(None, group_id, chord, root_id, parent_id, index)
            for index, member in enumerate(members)
        ]
        return self.app.group_result(options["task_id"], results)

    def plan(
        self,
        planner: Planner,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        options = self._merged((), {}, options or {})[2]
        for name in ("link", "link_error"):
            if options.pop(name, None):
                raise TaskArgumentError(
                    f"a group takes no {name}: nothing is there when all of it has ended. Make "
                    "it a chord: group(...) | callback, or link the tasks in it"
                )
        group_id = options.pop("task_id", None) or planner.app.new_id()
        options.pop("group_index", None)
        chord = options.pop("chord", None)
        members = self.flat()
        results = []
        for index, member in enumerate(members):
            member.freeze(
                group_id=options.get("group_id") or group_id, chord=chord,
                root_id=options.get("root_id"), group_index=index,
            )  # fmt: skip
            results.append(member.plan(planner, args, kwargs, options))
        if len(results) == 1 and hasattr(results[0], "results"):
            return results[0]  # a chain that ends in a group: that one is meant
        return planner.app.group_result(group_id, results)

    def skew(self, start: float = 1.0, stop: float | None = None, step: float = 1.0) -> Self:
        """Let the tasks start one after the other, ``step`` seconds apart."""
        for number, task in enumerate(self.tasks):
            countdown = start + number * step
            task.set(countdown=countdown if stop is None else min(countdown, stop))
        return self

    def __repr__(self) -> str:
        return f"group({', '.join(map(repr, self.tasks))})"


class Chord(Signature[R], kind="chord"):
    """Tasks side by side (the header), and one that gets the list of their results (the body).

    :param header: the signatures, or a group.
    :param body: the signature of what comes after them.
    """

    def __init__(
        self,
        header: Any,
        body: Any = None,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        app: Any = None,
        **options: Any,
    ) -> None:
        source = source_of(app)
        parts = {
            "kwargs": dict(kwargs or {}),
            "header": _as_group(header, source),
            "body": maybe_signature(body, source),
        }
        super().__init__("celery.chord", args, parts, options, app=source)

    @classmethod
    def _of(cls, fields: dict[str, Any], app: Any) -> Self:
        parts = dict(fields["kwargs"])
        if "header" not in parts:
            raise InvalidSignatureError("a chord has no header")
        parts["header"] = _as_group(parts["header"], app)
        parts["body"] = maybe_signature(parts.get("body"), app)
        if not isinstance(parts.setdefault("kwargs", {}), dict):
            raise InvalidSignatureError("a chord has kwargs that are no mapping")
        return cast("Self", super()._of({**fields, "kwargs": parts}, app))

    @property
    def header(self) -> Group:
        return cast(Group, self.kwargs["header"])

    @property
    def tasks(self) -> list[Signature[Any]]:
        """The tasks of the header."""
        return self.header.tasks

    @property
    def body(self) -> Signature[R]:
        return cast("Signature[R]", self.kwargs["body"])

    @body.setter
    def body(self, value: Signature[Any] | None) -> None:
        self.kwargs["body"] = value

    def _source(self) -> AppSource:
        body = self.kwargs["body"]
        return self._app or _source_of_first(self.tasks) or (body._source() if body else None)

    def clone(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        copy = super().clone(args, None, **options)
        body = self.kwargs["body"]
        copy.kwargs.update(
            header=self.header.clone(),
            body=body.clone() if body is not None else None,
            kwargs={**self.kwargs["kwargs"], **(kwargs or {})},
        )
        return copy

    def __call__(self, body: Any = None, **options: Any) -> Any:
        """Send it, with this body if one is given."""
        return self.apply_async((), {"body": body} if body is not None else {}, **options)

    def link(self, callback: Signature[Any]) -> Signature[Any]:
        """Link to the body."""
        self.body.link(callback)
        return callback

    def link_error(self, errback: Signature[Any]) -> Signature[Any]:
        """Link to the body, which fails when a task of the header does."""
        for task in self.tasks:
            if isinstance(task, Chord):
                task.link_error(errback)
        self.body.link_error(errback)
        return errback

    def set_immutable(self, immutable: bool) -> None:
        self.header.set_immutable(immutable)

    def size(self) -> int:
        body = self.kwargs["body"]
        return body.size() if body is not None else 0

    def freeze(
        self,
        task_id: str | None = None,
        group_id: str | None = None,
        chord: Any = None,
        root_id: str | None = None,
        parent_id: str | None = None,
        group_index: int | None = None,
    ) -> Any:
        header = self.header.freeze(root_id=root_id)
        self.options["task_id"] = self.header.id
        self.body = body = self._body()
        result = body.freeze(task_id, group_id, chord, root_id, None, group_index)
        _first(result).parent = header
        return result

    def plan(
        self,
        planner: Planner,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        body = maybe_signature(given.pop("body", None), self._source()) or self._body()
        merged_args, _, options = self._merged(args, {}, options or {})
        delay = {name: options.pop(name) for name in ("countdown", "eta") if options.get(name)}
        body = _with_links(body, options)
        task_id = options.pop("task_id", None)
        root_id, app = options.get("root_id"), planner.app
        header = self.header.clone()
        if task_id == header.id:  # that is how a frozen chord is marked
            task_id = None
        group_id = header.id or app.new_id()
        body.options.update({k: v for k, v in options.items() if k != "parent_id"})
        result = body.freeze(task_id, group_id=group_id, root_id=root_id)
        members = header.flat()
        frozen = [
            member.freeze(group_id=group_id, chord=body, root_id=root_id, group_index=index)
            for index, member in enumerate(members)
        ]
        _first(result).parent = app.group_result(group_id, frozen)
        if not members:
            body.plan(planner, ([],))
            return result
        nested = any(hasattr(handle, "results") for handle in frozen)
        shape = app.group_result(group_id, frozen).as_tuple() if nested else None
        planner.open_chord(group_id, sum(member.size() for member in members), shape)
        for name in ("chain", "chord", "group_id", "group_index"):
            options.pop(name, None)
        header_kwargs = {**self.kwargs["kwargs"], **given}
        own = {name: value for name, value in header.options.items() if name not in _PLACE}
        for member in members:
            member.plan(planner, merged_args, header_kwargs, {**own, **options, **delay})
        return result

    def _body(self) -> Signature[Any]:
        body = self.kwargs["body"]
        if body is None:
            raise TaskArgumentError(
                "a chord has no body: write chord(header, body) or chord(header)(body)"
            )
        return cast("Signature[Any]", body.clone())

    def __repr__(self) -> str:
        return f"chord({self.header!r}, {self.kwargs['body']!r})"


group = Group
chord = Chord


def xmap(
    task: Task[..., Any] | Signature[Any], it: Iterable[Any], app: Any = None
) -> Signature[list[Any]]:
    """One task that calls another with each item, one after the other."""
    return _over("celery.map", task, it, app)


def xstarmap(
    task: Task[..., Any] | Signature[Any], it: Iterable[Sequence[Any]], app: Any = None
) -> Signature[list[Any]]:
    """As :func:`xmap`, but each item is a list of arguments."""
    return _over("celery.starmap", task, it, app)


def chunks(
    task: Task[..., Any] | Signature[Any], it: Iterable[Sequence[Any]], n: int, app: Any = None
) -> Group:
    """A group of :func:`xstarmap` over ``n`` items each."""
    if n < 1:
        raise TaskArgumentError(f"chunks of {n} items: it takes at least 1")
    items = list(it)
    return Group([xstarmap(task, items[i : i + n], app) for i in range(0, len(items), n)], app=app)


def _over(name: str, task: Any, it: Iterable[Any], app: Any) -> Signature[list[Any]]:
    called = task if isinstance(task, Signature) else Signature(task)
    return Signature(
        name,
        (),
        {"task": plain(called), "it": list(it)},
        immutable=True,
        app=app or called._source(),
    )


# -- putting them together --------------------------------------------------------------------


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
        _first(result).parent = before
    return result


def _first(result: AsyncResult[Any] | GroupResult) -> Any:
    """The result that all others on the way to this one come after."""
    while result.parent is not None:
        result = result.parent
    return result


def _with_links(body: Signature[Any], options: dict[str, Any]) -> Signature[Any]:
    """The body of a chord with the callbacks that were meant for the chord."""
    body = body.clone()
    for callback in listed(options.pop("link", None)):
        body.link(callback)
    for errback in listed(options.pop("link_error", None)):
        body.link_error(errback)
    return body


def _members(tasks: Sequence[Any], app: Any) -> list[Signature[Any]]:
    """Signatures of what was given: several, or one iterable of them."""
    if len(tasks) == 1 and not isinstance(tasks[0], Mapping):
        tasks = list(tasks[0])
    for task in tasks:
        if not isinstance(task, Mapping):
            raise TaskArgumentError(
                f"{task!r} is no signature; write task.s(...) instead of the task itself"
            )
    return [maybe_signature(task, app) for task in tasks]


def _as_group(header: Any, app: Any) -> Group:
    if isinstance(header, Mapping):
        header = maybe_signature(header, app)
        return header if isinstance(header, Group) else Group([header], app=app)
    return Group(header, app=app)


def _with_members(fields: dict[str, Any], names: tuple[str, ...], app: Any) -> dict[str, Any]:
    parts = dict(fields["kwargs"])
    for name in names:
        members = parts.get(name)
        if not isinstance(members, (list, tuple)):
            raise InvalidSignatureError(f"{fields['task']} has no list of {name}")
        parts[name] = [maybe_signature(member, app) for member in members]
    return {**fields, "kwargs": parts}


def _source_of_first(tasks: Iterable[Signature[Any]]) -> AppSource:
    return next((source for task in tasks if (source := task._source()) is not None), None)
