"""Arguments are checked against the function's signature before anything is queued."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from flask_taskworker.arguments import Signature
from flask_taskworker.exceptions import TaskArgumentError, TaskDefinitionError


def plain(x: int, y: int = 0) -> None: ...
def nothing() -> None: ...
def keywords(**kwargs: Any) -> None: ...
def payload(*, to: str, subject: str = "") -> None: ...
def only_positional(x: int, /, y: int) -> None: ...
def whatever(*args: Any, **kwargs: Any) -> None: ...
def first_and_rest(first: int, *rest: int) -> None: ...
def mixed(x: int, *, key: int) -> None: ...


FITS: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
    (plain, (1,), {}),
    (plain, (1, 2), {}),
    (plain, (), {"x": 1, "y": 2}),
    (plain, (1,), {"y": 2}),
    (nothing, (), {}),
    (keywords, (), {"to": "a", "n": 1}),
    (payload, (), {"to": "a"}),
    (only_positional, (1,), {"y": 2}),
    (whatever, (1, 2, 3), {"a": 4}),
    (first_and_rest, (1, 2, 3, 4), {}),
    (mixed, (1,), {"key": 2}),
    (functools.partial(plain, 1), (), {"y": 2}),
    (dict.fromkeys, (1, 2), {}),
    (max, (1, 2, 3), {"anything": 1}),
]
FITS_NOT: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
    (plain, (), {}, "t(x: 'int', y: 'int' = 0): missing a required argument: 'x'"),
    (plain, (1, 2, 3), {}, "too many positional arguments"),
    (plain, (1,), {"z": 1}, "unexpected keyword argument 'z'"),
    (plain, (1,), {"x": 1}, "multiple values for argument 'x'"),
    (nothing, (1,), {}, "t(): too many positional arguments"),
    (keywords, (1,), {}, "too many positional arguments"),
    (payload, (), {}, "missing a required"),
    (payload, ("a",), {}, "t(*, to: 'str', subject: 'str' = '')"),
    (only_positional, (), {"x": 1, "y": 2}, "'x'"),
    (first_and_rest, (), {}, "missing a required argument: 'first'"),
    (mixed, (1,), {}, "missing a required"),
    (keywords, (), {1: 2}, "keywords must be strings"),  # type: ignore[dict-item]
]


@pytest.mark.parametrize(("function", "args", "kwargs"), FITS)
def test_a_call_that_python_would_take_is_taken(
    function: Callable[..., Any], args: Any, kwargs: Any
) -> None:
    Signature(function).check("t", args, kwargs)


@pytest.mark.parametrize(("function", "args", "kwargs", "words"), FITS_NOT)
def test_a_call_that_does_not_fit_is_refused_with_the_signature(
    function: Callable[..., Any], args: Any, kwargs: Any, words: str
) -> None:
    with pytest.raises(TaskArgumentError) as caught:
        Signature(function).check("t", args, kwargs)
    assert words in str(caught.value)
    assert str(caught.value).startswith("t(")
    assert isinstance(caught.value, TypeError)


def test_a_bound_task_does_not_count_its_first_parameter() -> None:
    def task(self: Any, x: int) -> None: ...

    signature = Signature(task, bound=True)
    signature.check("t", (1,), {})
    with pytest.raises(TaskArgumentError, match="too many positional"):
        signature.check("t", ("self", 1), {})
    Signature(whatever, bound=True).check("t", (1, 2), {"a": 3})


@pytest.mark.parametrize("function", [nothing, keywords, payload])
def test_a_function_with_no_place_for_the_task_cannot_be_bound(function: Any) -> None:
    with pytest.raises(TaskDefinitionError, match=rf"'{function.__name__}' as its first argument"):
        Signature(function, bound=True)


@pytest.mark.parametrize(
    ("function", "possible"),
    [(plain, True), (whatever, True), (payload, False), (keywords, False), (nothing, False)],
)
def test_it_knows_whether_one_positional_argument_could_fit(function: Any, possible: bool) -> None:
    assert Signature(function).takes_one_positional() is possible
