"""Tasks side by side, and one that comes after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..exceptions import InvalidSignatureError, TaskArgumentError
from .groups import PLACE, Group, as_group, first_of, source_of_first
from .signature import AppSource, Signature, listed, maybe_signature, source_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from .plan import Planner

R = TypeVar("R", covariant=True)


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
            "header": as_group(header, source),
            "body": maybe_signature(body, source),
        }
        super().__init__("celery.chord", args, parts, options, app=source)

    @classmethod
    def _of(cls, fields: dict[str, Any], app: Any) -> Self:
        parts = dict(fields["kwargs"])
        if "header" not in parts:
            raise InvalidSignatureError("a chord has no header")
        parts["header"] = as_group(parts["header"], app)
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
        return self._app or source_of_first(self.tasks) or (body._source() if body else None)

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
        first_of(result).parent = header
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
        first_of(result).parent = app.group_result(group_id, frozen)
        if not members:
            body.plan(planner, ([],))
            return result
        nested = any(hasattr(handle, "results") for handle in frozen)
        shape = app.group_result(group_id, frozen).as_tuple() if nested else None
        planner.open_chord(group_id, sum(member.size() for member in members), shape)
        for name in ("chain", "chord", "group_id", "group_index"):
            options.pop(name, None)
        header_kwargs = {**self.kwargs["kwargs"], **given}
        own = {name: value for name, value in header.options.items() if name not in PLACE}
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


chord = Chord


def _with_links(body: Signature[Any], options: dict[str, Any]) -> Signature[Any]:
    """The body of a chord with the callbacks that were meant for the chord."""
    body = body.clone()
    for callback in listed(options.pop("link", None)):
        body.link(callback)
    for errback in listed(options.pop("link_error", None)):
        body.link_error(errback)
    return body
