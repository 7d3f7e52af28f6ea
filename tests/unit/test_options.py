"""Options of tasks and of calls: what is taken, and what is refused with which words."""

from __future__ import annotations

import typing
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from flask_taskworker.exceptions import InvalidOptionError, TaskWorkerError, UnknownOptionError
from flask_taskworker.options import (
    FARTHEST_ETA,
    CallOptions,
    TaskOptions,
    check_call_options,
    check_task_options,
    runs_per_second,
)
from support import FakeClock

AWARE = datetime(2026, 3, 4, tzinfo=timezone.utc)

GOOD_TASK: dict[str, list[Any]] = {
    "name": ["a", "shop.bill", "größe"],
    "queue": ["mail", "mail.high", "with space inside"],
    "max_retries": [0, 5, None],
    "retry_delay": [0, 1.5],
    "ignore_result": [True, False],
    "serializer": ["json"],
    "compression": ["gzip", None],
    "priority": [0, 9],
    "expires": [0, 60, 1.5, timedelta(minutes=1)],
    "acks_late": [True, False],
    "acks_on_failure_or_timeout": [True, False],
    "reject_on_worker_lost": [True, False],
    "store_errors_even_if_ignored": [True, False],
    "default_retry_delay": [0, 1.5],
    "autoretry_for": [(), (OSError,), [ValueError, KeyError]],
    "dont_autoretry_for": [(ConnectionError,)],
    "retry_kwargs": [
        {},
        {"max_retries": 5, "countdown": 3, "queue": "slow"},
        {"max_retries": None},
    ],
    "retry_backoff": [True, False, 5, 0.5],
    "retry_backoff_max": [600, 1.5],
    "retry_jitter": [True, False],
    "rate_limit": ["10/s", "5/m", "2/h", "0.5/s", "7", 3, 0, 2.5, None],
    "throws": [(), (KeyError,)],
    "track_started": [True, False],
    "time_limit": [1, 0.5, None],
    "soft_time_limit": [1, 0.5, None],
    "request_context": [True, False],
}
BAD_TASK: dict[str, list[Any]] = {
    "name": ["", None, 5, "x" * 256, "two\nlines", "nul\0", "\ud800"],
    "queue": ["", " mail", "mail ", 5, None, "a\0b", "a\nb", "x" * 256, "\udcff"],
    "max_retries": [-1, 1.5, "3", True],
    "retry_delay": [-1, "1", None, True, float("nan"), float("inf"), timedelta(1)],
    "ignore_result": [0, 1, None, "yes"],
    "serializer": ["", None, 5],
    "compression": ["", 5],
    "priority": [-1, 10, 1.0, "5", True, None],
    "expires": [-1, "60", None, timedelta(seconds=-1), float("nan"), AWARE],
    "acks_late": [1, None],
    "acks_on_failure_or_timeout": [1, None],
    "reject_on_worker_lost": [1, None],
    "store_errors_even_if_ignored": [1, None],
    "default_retry_delay": [-1, None],
    "autoretry_for": [OSError, None, ("OSError",), (OSError("x"),), (5,), {OSError}],
    "dont_autoretry_for": [OSError],
    "retry_kwargs": [
        None,
        {"max_retry": 5},
        {"countdown": -1},
        {"task_id": "a"},
        {"exc": ValueError()},
    ],
    "retry_backoff": ["1", -1, None, float("inf")],
    "retry_backoff_max": [None, -1],
    "retry_jitter": [1, None],
    "rate_limit": ["10/d", "fast", "-1/s", -1, True, "nan/s", "inf", [], "/s"],
    "throws": [KeyError, None],
    "track_started": [1, None],
    "time_limit": [0, -1, "5", True, float("inf"), float("nan")],
    "soft_time_limit": [0, -1, "5", True, float("inf"), float("nan")],
    "request_context": [1, None],
}
GOOD_CALL: dict[str, list[Any]] = {
    "countdown": [0, 1, 2.5, FARTHEST_ETA],
    "eta": [AWARE, AWARE - timedelta(days=4000), AWARE.astimezone(timezone(timedelta(hours=5)))],
    "expires": [60, timedelta(minutes=1), AWARE, AWARE + timedelta(days=4000)],
    "task_id": ["a", "0785c156-f66f-47ca-afbe-7e216cdf3957"],
    "queue": ["mail"],
    "priority": [0, 9],
    "headers": [{}, {"x-trace": "abc"}],
    "serializer": ["json"],
    "compression": ["gzip", None],
    "ignore_result": [True],
    "shadow": ["alias"],
    "time_limit": [1, 0.5, None],
    "soft_time_limit": [1, 0.5, None],
    "retry": [True, False],
    "retry_policy": [{}, {"max_retries": 3, "interval_start": 0.5}, {"max_retries": None}],
    "link": [None, {"task": "a"}, [{"task": "a"}, {"task": "b"}]],
    "link_error": [None, {"task": "a"}, [{"task": "a"}]],
}
BAD_CALL: dict[str, list[Any]] = {
    "countdown": [-1, "5", None, True, float("nan"), timedelta(1), FARTHEST_ETA + 1, 10**400],
    "eta": [5, "2026-01-01", None, datetime(2026, 1, 1), AWARE + timedelta(days=400)],
    "expires": [-1, None, "soon", datetime(2026, 1, 1), timedelta(seconds=-1)],
    "time_limit": [0, -1, "5", True],
    "soft_time_limit": [0, -1, "5", True],
    "task_id": ["", 5, None, "x" * 256, "a\0", "a\nb", "\ud800"],
    "queue": ["", "mail ", 5],
    "priority": [10],
    "headers": [5, [("a", 1)], {1: 2}, {"task": "x"}, {"root_id": "x"}, {"compression": "x"}],
    "serializer": [5],
    "compression": [5],
    "ignore_result": ["no"],
    "shadow": [""],
    "retry": [3],
    "retry_policy": [
        5,
        {"retries": 3},
        {"max_retries": -1},
        {"interval_start": None},
        {"interval_step": "1"},
        {"interval_max": float("nan")},
    ],
    "link": ["a", {"args": []}, [5]],
    "link_error": [print, [{}]],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}-{str(value)[:30]!a}")
        for name, values in table.items()
        for value in values
    ]


@pytest.fixture(autouse=True)
def _at_a_fixed_time(clock: FakeClock) -> None:
    """Some values depend on the time."""


@pytest.mark.parametrize(("name", "value"), cases(GOOD_TASK))
def test_an_option_of_a_task_takes(name: str, value: Any) -> None:
    check_task_options({name: value})


@pytest.mark.parametrize(("name", "value"), cases(GOOD_CALL))
def test_an_option_of_a_call_takes(name: str, value: Any) -> None:
    check_call_options({name: value})


@pytest.mark.parametrize(("name", "value"), cases(BAD_TASK))
def test_an_option_of_a_task_refuses(name: str, value: Any) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        check_task_options({name: value})
    assert str(caught.value).startswith(f"define_task({name}={value!r}): ")
    assert isinstance(caught.value, (ValueError, TaskWorkerError))


@pytest.mark.parametrize(("name", "value"), cases(BAD_CALL))
def test_an_option_of_a_call_refuses(name: str, value: Any) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        check_call_options({name: value})
    assert str(caught.value).startswith(f"apply_async({name}={value!r}): ")


@pytest.mark.parametrize(
    ("options", "good"), [(TaskOptions, GOOD_TASK), (CallOptions, GOOD_CALL)], ids=["task", "call"]
)
def test_type_checkers_know_the_options_that_are_checked(options: Any, good: Any) -> None:
    assert set(options.__annotations__) == set(good)
    assert typing.is_typeddict(options)


@pytest.mark.parametrize(
    ("check", "option", "words"),
    [
        (check_call_options, "countdwn", "apply_async() has no option 'countdwn'. Did you mean 'c"),
        (check_call_options, "prioriti", "Did you mean 'priority'?"),
        (check_task_options, "max_retry", "define_task() has no option 'max_retry'. Did you mean"),
        (check_task_options, "qqq", "There are: acks_late, acks_on_failure_or_timeout, autoret"),
    ],
)
def test_an_unknown_option_is_refused_with_a_suggestion(
    check: Any, option: str, words: str
) -> None:
    with pytest.raises(UnknownOptionError) as caught:
        check({option: 5})
    assert words in str(caught.value)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"eta": datetime(2026, 1, 1)}, "has no time zone, so its meaning depends on the machine"),
        ({"eta": 60}, "for seconds from now use countdown"),
        ({"eta": AWARE + timedelta(days=400)}, "is more than a year away"),
        ({"countdown": 10**9}, "is more than a year away"),
        ({"priority": 10}, "from 0 to 9 (9 is most urgent)"),
        ({"headers": {"id": "x", "eta": "y"}}, "may not contain eta, id: the protocol uses them"),
        ({"retry_policy": {"interval_start": None}}, "a number of 0 or more as interval_start"),
        ({"retry_policy": {"tries": 1}}, "some of interval_max, interval_start, interval_step, m"),
    ],
)
def test_a_refusal_says_what_to_write(option: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        check_call_options(option)
    assert words in str(caught.value)


def test_one_option_under_both_its_names_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="two names of one option"):
        check_task_options({"retry_delay": 5, "default_retry_delay": 5})


def test_wrong_options_for_automatic_retries_are_named() -> None:
    with pytest.raises(InvalidOptionError, match=r"retry\(\) has no option 'countdwn'. Did you"):
        check_task_options({"retry_kwargs": {"countdwn": 5}})


@pytest.mark.parametrize(
    ("rate", "a_second"),
    [("10/s", 10), ("30/m", 0.5), ("36/h", 0.01), ("4", 4), (4, 4), (0, None), (None, None)],
)
def test_a_rate_is_a_number_a_second(rate: Any, a_second: float | None) -> None:
    assert runs_per_second(rate) == (None if a_second is None else pytest.approx(a_second))
