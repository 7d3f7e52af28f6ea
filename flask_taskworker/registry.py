"""Task names and the tasks behind them."""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .exceptions import DuplicateTaskError, TaskDefinitionError, UnknownTaskError

if TYPE_CHECKING:
    from .task import Task


class Registry(Mapping[str, "Task[..., Any]"]):
    """Maps each name to one task. Filled while modules are imported, read ever after.

    Tasks that are built in are found by their names, but not listed.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, Task[..., Any]] = {}
        self._builtins: dict[str, Task[..., Any]] = {}

    def add(self, task: Task[..., Any]) -> None:
        """Register a task.

        The same function may come twice (a module that is reloaded, or imported under
        its name and as ``__main__``); the newer one wins.

        :raises DuplicateTaskError: if another function has the name already.
        """
        known = self._tasks.get(task.name)
        if known is not None and _source(known.run) != _source(task.run):
            raise DuplicateTaskError(
                f"two functions are defined as task {task.name!r}: {_describe(known.run)} and "
                f"{_describe(task.run)}. Give one of them another name: "
                f'define_task(name="...")'
            )
        self._tasks[task.name] = task

    def add_builtin(self, task: Task[..., Any]) -> None:
        """Register a task that no list shows."""
        self._builtins[task.name] = task

    def __getitem__(self, name: str) -> Task[..., Any]:
        task: Task[..., Any] | None = self.get(name)
        if task is None:
            raise UnknownTaskError(self.explain_missing(name))
        return task

    def get(self, name: str, default: Any = None) -> Any:
        return self._tasks.get(name) or self._builtins.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._tasks or name in self._builtins

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def explain_missing(self, name: str) -> str:
        """A sentence that says that a name is not registered, and which one may be meant."""
        close = difflib.get_close_matches(name, self._tasks, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"task {name!r} is not registered.{hint} Tasks known: {len(self)}."


def task_name(function: Callable[..., Any]) -> str:
    """The name of a function as a task: its module's import name and its own.

    A program started as ``python app.py`` has its functions in ``__main__``, while
    a worker imports the same file as ``app``: both must come to the same name.

    :raises TaskDefinitionError: if the function has no name that is the same in every process.
    """
    name = getattr(function, "__name__", None)
    if not isinstance(name, str):
        raise TaskDefinitionError(
            f"{function!r} has no name of its own; give the task one: define_task(name=...)"
        )
    module = getattr(function, "__module__", None) or "__main__"
    if module == "__main__":
        module = main_module_name()
    return f"{module}.{name}"


def main_module_name() -> str:
    """The name under which other processes import the program; ``__main__`` if they cannot."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:  # python -m package.module, or python -m package
        return str(spec.name).removesuffix(".__main__")
    path: str | None = getattr(main, "__file__", None)
    if path:
        return os.path.splitext(os.path.basename(path))[0]
    return "__main__"  # an interactive session


def _source(function: Callable[..., Any]) -> tuple[Any, ...]:
    """What makes two function objects the same function."""
    # Unwrapped: everything that one decorator returns has the decorator's own code.
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return (function,)
    return (os.path.abspath(code.co_filename), code.co_firstlineno, code.co_name)


def location(function: Callable[..., Any]) -> str | None:
    """Where a function is written, as ``file:line``; None if it has no source."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else None


def _describe(function: Callable[..., Any]) -> str:
    source = location(function)
    where = f" ({source})" if source else ""
    name = getattr(function, "__qualname__", None)
    return f"{function.__module__}.{name}{where}" if name else repr(function)
