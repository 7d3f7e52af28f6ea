"""Names of tasks, and the tasks behind them."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from flask_taskworker import BaseTaskWorker, Task
from flask_taskworker.exceptions import (
    DuplicateTaskError,
    TaskDefinitionError,
    UnknownTaskError,
)
from flask_taskworker.registry import Registry, task_name
from support import AppRoom

F = TypeVar("F", bound=Callable[..., Any])


def bill(number: int) -> int:
    return number


def no_app() -> Any:
    raise AssertionError("no app is needed to register")


def task(function: Callable[..., Any], name: str | None = None) -> Task[..., Any]:
    return Task(function, no_app, options={} if name is None else {"name": name})


def test_a_name_is_the_module_and_the_function() -> None:
    assert task_name(bill) == f"{__name__}.bill"
    assert task(bill).name == f"{__name__}.bill"
    assert task(bill, "billing").name == "billing"


@pytest.mark.parametrize(
    "function", [functools.partial(bill, 1), type("C", (), {"__call__": bill})()]
)
def test_a_callable_without_a_name_of_its_own_must_be_given_one(function: Any) -> None:
    with pytest.raises(TaskDefinitionError, match=r"give the task one: define_task\(name=\.\.\.\)"):
        task(function)
    assert task(function, "billing").name == "billing"


def test_a_registry_is_a_mapping_of_names() -> None:
    registry = Registry()
    first = task(bill)
    registry.add(first)
    assert list(registry) == [first.name]
    assert registry[first.name] is first
    assert len(registry) == 1
    assert first.name in registry
    assert "other" not in registry
    assert registry.get("other") is None


def test_an_unknown_name_comes_with_a_suggestion() -> None:
    registry = Registry()
    registry.add(task(bill, "shop.bill"))
    with pytest.raises(UnknownTaskError) as caught:
        registry["shop.bil"]
    assert str(caught.value) == (
        "task 'shop.bil' is not registered. Did you mean 'shop.bill'? Tasks known: 1."
    )
    assert isinstance(caught.value, KeyError)
    with pytest.raises(UnknownTaskError, match=r"'x' is not registered\. Tasks known"):
        registry["x"]


def test_two_functions_cannot_have_one_name() -> None:
    def other(number: int) -> None: ...

    registry = Registry()
    registry.add(task(bill, "shop.bill"))
    with pytest.raises(DuplicateTaskError) as caught:
        registry.add(task(other, "shop.bill"))
    text = str(caught.value)
    assert "two functions are defined as task 'shop.bill'" in text
    assert f"{__name__}.bill ({__file__}:" in text
    assert "other" in text
    assert 'define_task(name="...")' in text
    assert registry["shop.bill"].run is bill


def logged(function: F) -> F:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper  # type: ignore[return-value]


def test_one_decorator_does_not_make_two_functions_the_same() -> None:
    @logged
    def first() -> None: ...

    @logged
    def second() -> None: ...

    registry = Registry()
    registry.add(task(first, "t"))
    with pytest.raises(DuplicateTaskError, match="first"):
        registry.add(task(second, "t"))


def test_builtins_are_told_apart() -> None:
    registry = Registry()
    registry.add(task(len, "t"))
    registry.add(task(len, "t"))
    with pytest.raises(DuplicateTaskError):
        registry.add(task(max, "t"))


def test_a_module_that_is_imported_again_replaces_its_tasks(
    room: AppRoom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "again_tasks.py").write_text(
        "def make(worker):\n    @worker.define_task\n    def again(): ...\n    return again\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("again_tasks")
    old = module.make(room.task_worker)
    new = importlib.reload(module).make(room.task_worker)
    assert old is not new
    assert room.task_worker.registry["again_tasks.again"] is new
    monkeypatch.delitem(sys.modules, "again_tasks")


def test_an_app_factory_may_define_its_tasks_each_time() -> None:
    worker = BaseTaskWorker()

    def create_app() -> Task[..., Any]:
        @worker.define_task
        def made() -> None: ...

        return made

    create_app()
    newest = create_app()
    assert worker.registry[newest.name] is newest


PROGRAM = """
from flask_taskworker import BaseTaskWorker
worker = BaseTaskWorker()
@worker.define_task
def bill(): ...
if __name__ == "__main__":
    print(bill.name)
"""


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["shop/run.py"], "run.bill"),
        (["-m", "shop.run"], "shop.run.bill"),
        (["-m", "shop"], "shop.bill"),
        (["-c", PROGRAM], "__main__.bill"),
    ],
    ids=["file", "module", "package", "no file"],
)
def test_the_started_program_has_the_name_its_workers_import(
    arguments: list[str], name: str, tmp_path: Path, root: Path, child_environment: dict[str, str]
) -> None:
    package = tmp_path / "shop"
    package.mkdir()
    for file in ("__init__.py", "run.py", "__main__.py"):
        (package / file).write_text("" if file == "__init__.py" else PROGRAM)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=child_environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == name, done.stderr
