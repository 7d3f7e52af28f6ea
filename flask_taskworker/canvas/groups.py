"""Tasks side by side, and what chains and groups have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..exceptions import InvalidSignatureError, TaskArgumentError
from .signature import AppSource, Signature, maybe_signature, source_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..result import AsyncResult, GroupResult
    from .plan import Planner

R = TypeVar("R", covariant=True)

#: Options that belong to the place of a signature among others, not to the calls in it.
PLACE = ("task_id", "group_id", "group_index", "chord", "root_id", "parent_id", "reply_to")


class Several(Signature[R]):
    """What chains and groups have in common: members in ``kwargs["tasks"]``."""

    @classmethod
    def _of(cls, fields: dict[str, Any], app: Any) -> Self:
        return cast("Self", super()._of(_with_members(fields, app), app))

    @property
    def tasks(self) -> list[Signature[Any]]:
        return cast("list[Signature[Any]]", self.kwargs["tasks"])

    @tasks.setter
    def tasks(self, value: Iterable[Signature[Any]]) -> None:
        self.kwargs["tasks"] = list(value)

    def _source(self) -> AppSource:
        return self._app or source_of_first(self.tasks)

    def clone(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        copy = super().clone(args, None, **options)
        copy.kwargs["tasks"] = [task.clone() for task in self.tasks]
        return copy


class Group(Several["list[Any]"], kind="group"):
    """Tasks side by side.

    :param tasks: signatures, or one iterable of them.
    :param options: for the call of each.
    """

    def __init__(self, *tasks: Any, app: Any = None, **options: Any) -> None:
        source = source_of(app)
        super().__init__(
            "celery.group", (), {"tasks": members_of(tasks, source)}, options, app=source
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
            elif not isinstance(task, Several) or task.tasks:  # an empty chain is nothing
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


group = Group


def members_of(tasks: Sequence[Any], app: Any) -> list[Signature[Any]]:
    """Signatures of what was given: several, or one iterable of them."""
    if len(tasks) == 1 and not isinstance(tasks[0], Mapping):
        tasks = list(tasks[0])
    for task in tasks:
        if not isinstance(task, Mapping):
            raise TaskArgumentError(
                f"{task!r} is no signature; write task.s(...) instead of the task itself"
            )
    return [maybe_signature(task, app) for task in tasks]


def as_group(header: Any, app: Any) -> Group:
    if isinstance(header, Mapping):
        header = maybe_signature(header, app)
        return header if isinstance(header, Group) else Group([header], app=app)
    return Group(header, app=app)


def first_of(result: AsyncResult[Any] | GroupResult) -> Any:
    """The result that all others on the way to this one come after."""
    while result.parent is not None:
        result = result.parent
    return result


def source_of_first(tasks: Iterable[Signature[Any]]) -> AppSource:
    return next((source for task in tasks if (source := task._source()) is not None), None)


def _with_members(fields: dict[str, Any], app: Any) -> dict[str, Any]:
    members = fields["kwargs"].get("tasks")
    if not isinstance(members, (list, tuple)):
        raise InvalidSignatureError(f"{fields['task']} has no list of tasks")
    tasks = [maybe_signature(member, app) for member in members]
    return {**fields, "kwargs": {**fields["kwargs"], "tasks": tasks}}
