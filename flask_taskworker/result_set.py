"""The handles to several tasks that were sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from . import clock
from .exceptions import ResultError

if TYPE_CHECKING:
    from .app import TaskApp
    from .backends.base import ResultBackend
    from .result import AnyResult


class ResultSet:
    """Several handles, read as one.

    :param results: the handles, in the order in which their results are wanted.
    """

    def __init__(self, results: Iterable[AnyResult] = ()) -> None:
        self.results: list[AnyResult] = list(results)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: [{', '.join(handle.id for handle in self.results)}]>"

    def __iter__(self) -> Iterator[AnyResult]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __bool__(self) -> bool:
        return bool(self.results)

    def __getitem__(self, index: int) -> AnyResult:
        return self.results[index]

    def __contains__(self, handle: object) -> bool:
        return handle in self.results

    def __eq__(self, other: object) -> bool:
        return self.results == other.results if isinstance(other, ResultSet) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def add(self, handle: AnyResult) -> None:
        """Add a handle, unless it is there."""
        if handle not in self.results:
            self.results.append(handle)

    def update(self, results: Iterable[AnyResult]) -> None:
        """Add what is not there."""
        for handle in results:
            self.add(handle)

    def remove(self, handle: AnyResult | str) -> None:
        """Remove a handle; KeyError if it is not there."""
        try:
            self.results.remove(cast("AnyResult", handle))
        except ValueError:
            raise KeyError(handle) from None

    def discard(self, handle: AnyResult | str) -> None:
        """Remove a handle, if it is there."""
        if handle in self.results:
            self.remove(handle)

    def clear(self) -> None:
        """Remove all handles."""
        self.results.clear()

    def ready(self) -> bool:
        """Whether all are done, in whatever way."""
        return all(handle.ready() for handle in self.results)

    def waiting(self) -> bool:
        """Whether any is not done."""
        return not self.ready()

    def successful(self) -> bool:
        """Whether all are done and returned."""
        return all(handle.successful() for handle in self.results)

    def failed(self) -> bool:
        """Whether any is done and raised."""
        return any(handle.failed() for handle in self.results)

    def completed_count(self) -> int:
        """How many are done and returned."""
        return sum(handle.successful() for handle in self.results)

    def maybe_throw(self, propagate: bool = True) -> None:
        """Raise the exception of one that is known to have failed."""
        for handle in self.results:
            handle.maybe_throw(propagate=propagate)

    def forget(self) -> None:
        """Delete what is stored about these tasks."""
        for handle in self.results:
            handle.forget()

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        callback: Callable[[str, Any], None] | None = None,
        **options: Any,
    ) -> list[Any]:
        """Wait for all, and return the list of their results.

        :param timeout: seconds to wait; None waits without end.
        :param propagate: False puts exceptions in the list instead of raising the first.
        :param callback: called with the id and the result of each, in their order; nothing is
            returned then.
        :raises ResultTimeoutError: if not all are done in time.
        """
        deadline = None if timeout is None else clock.monotonic() + timeout
        values = []
        for handle in self.results:
            left = None if deadline is None else max(0.0, deadline - clock.monotonic())
            value = handle.get(timeout=left, propagate=propagate)
            if callback is not None:
                callback(handle.id, value)
            else:
                values.append(value)
        return values

    join = get


class GroupResult(ResultSet):
    """The handles to a group.

    :param group_id: the id of the group.
    :param results: the handles to its members.
    :param backend: where :meth:`save` puts it.
    :param parent: the handle to what runs before it.
    """

    def __init__(
        self,
        group_id: str,
        results: Iterable[AnyResult],
        backend: ResultBackend,
        parent: AnyResult | None = None,
    ) -> None:
        super().__init__(results)
        self.id = group_id
        self.parent = parent
        self._backend = backend

    def __repr__(self) -> str:
        members = ", ".join(handle.id for handle in self.results)
        return f"<GroupResult: {self.id} [{members}]>"

    def __str__(self) -> str:
        return self.id

    def __eq__(self, other: object) -> bool:
        if isinstance(other, GroupResult):
            return (other.id, other.results, other.parent) == (self.id, self.results, self.parent)
        return self.id == other if isinstance(other, str) else NotImplemented

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self.id)

    @property
    def children(self) -> list[AnyResult]:
        """The handles to its members."""
        return self.results

    def as_tuple(self) -> Any:
        """It as plain data; :func:`result_from_tuple` reads it."""
        parent = self.parent and self.parent.as_tuple()
        return [[self.id, parent], [handle.as_tuple() for handle in self.results]]

    def as_list(self) -> list[str]:
        """Its id and those of its parents, the nearest first."""
        return [self.id, *(self.parent.as_list() if self.parent is not None else ())]

    def iterdeps(self, intermediate: bool = False) -> Iterator[tuple[AnyResult | None, AnyResult]]:
        """As :meth:`AsyncResult.iterdeps`."""
        return dependencies(self, intermediate)

    def save(self) -> None:
        """Keep it in the result backend, to be found by its id.

        :raises ResultError: if the backend keeps nothing.
        """
        self._backend.save_group(self.id, self.as_tuple())

    def delete(self) -> None:
        """Undo :meth:`save`; the results of its members stay."""
        self._backend.forget_group(self.id)

    @classmethod
    def restore(
        cls, group_id: str, backend: ResultBackend, app: TaskApp | None = None
    ) -> GroupResult | None:
        """The group that was saved under an id, or None."""
        from .result import result_from_tuple

        shape = backend.restore_group(group_id)
        return None if shape is None else cast(GroupResult, result_from_tuple(shape, backend, app))


def dependencies(
    first: AnyResult, intermediate: bool
) -> Iterator[tuple[AnyResult | None, AnyResult]]:
    """Pairs of a handle and its parent: this one, and all that came of it."""
    waiting: list[tuple[AnyResult | None, AnyResult]] = [(None, first)]
    while waiting:
        parent, handle = waiting.pop(0)
        yield parent, handle
        children: Sequence[AnyResult] | None = handle.children if handle.ready() else None
        if children is not None:
            waiting += [(handle, child) for child in children]
        elif not intermediate:
            raise ResultError(f"task {handle.id} is not done: what comes of it is not known yet")
