"""One task that calls another with each item of a list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..exceptions import TaskArgumentError
from .groups import Group
from .signature import Signature, plain

if TYPE_CHECKING:
    from ..task import Task


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
