"""Results and exceptions as they are stored: nothing that a task raises is too strange."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from decimal import Decimal
from types import ModuleType
from typing import Any

import pytest

from flask_taskworker import exceptions
from flask_taskworker.backends.base import TaskRecord
from flask_taskworker.backends.encoding import (
    ARGUMENT_LIMIT,
    TRACEBACK_LIMIT,
    decode_exception,
    dumps,
    encode_exception,
    format_traceback,
    loads,
)
from flask_taskworker.backends.meta import from_meta, to_meta
from flask_taskworker.exceptions import EncodeError, ResultError, TaskFailedError

# -- values -------------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", ["json", "pickle", "yaml", "msgpack"])
def test_plain_data_comes_back(serializer: str) -> None:
    value = {"a": [1, 2.5, None, True, "é"], "b": {"c": "😀"}}
    data = dumps(value, serializer)
    assert isinstance(data, bytes)
    assert loads(data, serializer) == value


def test_json_brings_back_the_types_that_kombu_tags() -> None:
    value = [datetime(2026, 1, 1, tzinfo=timezone.utc), Decimal("1.10"), b"\xff"]
    assert loads(dumps(value, "json"), "json") == value


class Shy:
    def __repr__(self) -> str:
        raise RuntimeError("no")


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


class Stubborn:
    """Raises something that cannot be shown when it is serialized."""

    def __json__(self) -> Any:
        raise Mute


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({1, 2}, "cannot be serialized as json: {1, 2}"),
        (object(), "cannot be serialized as json: <object object"),
        (Shy(), "cannot be serialized as json: <unrepresentable Shy>"),
        (Stubborn(), "cannot be serialized as json"),
        (["x" * 1000, object()], "xxx..."),
    ],
)
def test_a_value_that_cannot_be_stored_is_shown_short(value: object, words: str) -> None:
    with pytest.raises(EncodeError) as caught:
        dumps(value, "json")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_only_the_serializer_in_use_is_read(tmp_path: Any) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "executed"), "w")

    with pytest.raises(Exception, match=r".+"):
        loads(dumps(Bomb(), "pickle"), "json")
    assert not (tmp_path / "executed").exists()


# -- exceptions ---------------------------------------------------------------------------


class Needy(Exception):
    """Wants more than it keeps."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"{code}: {reason}")


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__(lambda: None, open)


class Reducing(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("no")


class ArgsRaise(Exception):
    @property
    def args(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no")


def caught(make: Callable[[], BaseException]) -> BaseException:
    try:
        raise make()
    except BaseException as exc:
        return exc


def self_containing() -> BaseException:
    exc = ValueError()
    exc.args = (exc,)
    return exc


def cyclic() -> BaseException:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    return first


def dynamic() -> BaseException:
    made: BaseException = type("Made", (Exception,), {"__module__": None})("x")
    return made


def deep() -> BaseException:
    def down(level: int) -> None:
        down(level + 1)

    try:
        down(0)
    except RecursionError as exc:
        return exc
    raise AssertionError


def long_chain() -> BaseException:
    exc: BaseException = ValueError("0")
    for number in range(300):
        following = ValueError(str(number))
        following.__cause__ = exc
        exc = following
    return exc


def with_note() -> BaseException:
    exc = ValueError("x")
    if sys.version_info >= (3, 11):
        exc.add_note("look here")
    return exc


NASTY: dict[str, Callable[[], BaseException]] = {
    "plain": lambda: ValueError("x"),
    "no arguments": ValueError,
    "needs arguments": lambda: Needy(5, reason="because"),
    "unpicklable arguments": Unpicklable,
    "reduce raises": lambda: Reducing("x"),
    "str raises": lambda: Mute("x"),
    "str of an argument raises": lambda: ValueError(Shy()),
    "args raise": lambda: ArgsRaise("x"),
    "args hold itself": self_containing,
    "cyclic cause": cyclic,
    "dynamic class": dynamic,
    "NUL": lambda: ValueError("a\0b"),
    "lone surrogate": lambda: ValueError("\ud800"),
    "bytes": lambda: ValueError(b"\xff\x00"),
    "huge text": lambda: ValueError("x" * 10_000_000),
    "many arguments": lambda: ValueError(*range(1000)),
    "SystemExit": lambda: SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "MemoryError": MemoryError,
    "RecursionError": deep,
    "long chain": long_chain,
    "unicode error": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    "os error": lambda: FileNotFoundError(2, "No such file", "/tmp/x"),
    "group with a note": with_note,
}


@pytest.mark.parametrize("make", NASTY.values(), ids=NASTY)
def test_any_exception_can_be_stored(make: Callable[[], BaseException]) -> None:
    exc = caught(make)
    started = time.perf_counter()
    kept = json.loads(dumps(encode_exception(exc), "json"))
    text = format_traceback(exc)
    assert time.perf_counter() - started < 1
    assert kept.keys() == {"exc_type", "exc_message", "exc_module"}
    assert kept["exc_type"]
    assert isinstance(kept["exc_module"], str)
    assert len(text) <= TRACEBACK_LIMIT + 100
    assert "\0" not in text
    text.encode()  # fit for a database
    rebuilt = decode_exception(loads(dumps(encode_exception(exc), "json"), "json"), text)
    assert isinstance(rebuilt, Exception)


def test_a_traceback_shows_where_and_why() -> None:
    text = format_traceback(caught(lambda: ValueError("the reason")))
    assert text.startswith("Traceback (most recent call last):")
    assert __file__ in text
    assert text.endswith("ValueError: the reason\n")


def test_a_long_traceback_keeps_both_ends() -> None:
    text = format_traceback(caught(lambda: ValueError("x" * TRACEBACK_LIMIT + "the end")))
    assert text.startswith("Traceback")
    assert text.endswith("the end\n")
    assert "characters cut" in text


def test_an_exception_is_written_as_celery_writes_it() -> None:
    assert encode_exception(Needy(5, reason="x")) == {
        "exc_type": "Needy",
        "exc_message": ["5: x"],
        "exc_module": __name__,
    }
    assert encode_exception(ValueError(1, "a", {"b": 2}))["exc_message"] == [1, "a", {"b": 2}]


def test_an_argument_that_is_no_plain_data_becomes_its_text() -> None:
    exc = ValueError(object(), Shy(), "x" * ARGUMENT_LIMIT, 5)
    first, second, third, fourth = encode_exception(exc)["exc_message"]
    assert first.startswith("<object object")
    assert second == "<unrepresentable Shy>"
    assert len(third) == ARGUMENT_LIMIT
    assert third.endswith("...")
    assert fourth == 5


@pytest.mark.parametrize(
    ("ours", "module", "name"),
    [
        (exceptions.UnknownTaskError("a.b"), "celery.exceptions", "NotRegistered"),
        (exceptions.TaskRevokedError("expired"), "celery.exceptions", "TaskRevokedError"),
        (exceptions.Retry("later"), "celery.exceptions", "Retry"),
        (exceptions.Reject("no", requeue=False), "celery.exceptions", "Reject"),
        (exceptions.Ignore(), "celery.exceptions", "Ignore"),
        (exceptions.ResultTimeoutError("x"), "celery.exceptions", "TimeoutError"),
        (exceptions.MaxRetriesExceededError("x"), "celery.exceptions", "MaxRetriesExceededError"),
        (exceptions.InvalidMessageError("x"), "celery.exceptions", "InvalidTaskError"),
        (exceptions.EncodeError("x"), "kombu.exceptions", "EncodeError"),
        (exceptions.BrokerUnavailableError("x"), "kombu.exceptions", "OperationalError"),
        (exceptions.TimeLimitExceeded(1), "billiard.exceptions", "TimeLimitExceeded"),
        (exceptions.SoftTimeLimitExceeded(), "billiard.exceptions", "SoftTimeLimitExceeded"),
        (exceptions.WorkerLostError("x"), "billiard.exceptions", "WorkerLostError"),
    ],
)
def test_our_errors_have_names_a_celery_client_knows(
    ours: BaseException, module: str, name: str
) -> None:
    written = encode_exception(ours)
    assert (written["exc_module"], written["exc_type"]) == (module, name)
    rebuilt = decode_exception(written, None)
    assert type(rebuilt) is type(ours)
    assert rebuilt.args == ours.args


class Outer:
    class Inner(Exception):
        pass


def stored(name: Any, message: Any, module: Any) -> dict[str, Any]:
    return {"exc_type": name, "exc_message": message, "exc_module": module}


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        (stored("ValueError", ["x"], "builtins"), ValueError),
        (stored("ValueError", "x", "builtins"), ValueError),
        (stored("ValueError", None, None), ValueError),
        ({"exc_type": "ValueError"}, ValueError),
        (stored("Outer.Inner", [], __name__), Outer.Inner),
        (stored("JSONDecodeError", ["x", "doc", 1], "json.decoder"), json.JSONDecodeError),
        # what must not be called, or not be found
        (stored("system", ["false"], "os"), TaskFailedError),
        (stored("SystemExit", [1], "builtins"), TaskFailedError),
        (stored("Popen", ["false"], "subprocess"), TaskFailedError),
        (stored("Odd", ["x"], "not.here"), TaskFailedError),
        (stored("path.join", [], "os"), TaskFailedError),
        (stored("__class__.mro", [], "os"), TaskFailedError),
        (stored("", [], ""), TaskFailedError),
        (stored(5, 5, 5), TaskFailedError),
        (stored("Needy", ["5: x"], __name__), TaskFailedError),
        # no exception at all
        ("ValueError('x')", TaskFailedError),
        (None, TaskFailedError),
        ([1, 2], TaskFailedError),
        ({"other": 1}, TaskFailedError),
    ],
)
def test_a_stored_exception_is_rebuilt_or_described(written: Any, kind: type[Exception]) -> None:
    assert type(decode_exception(written, None)) is kind


def test_a_description_has_all_that_was_stored() -> None:
    error = decode_exception(encode_exception(Needy(5, reason="because")), None)
    assert isinstance(error, TaskFailedError)
    assert str(error) == "Needy(5: because)"
    assert (error.exc_type, error.exc_module) == ("Needy", __name__)


def test_a_module_is_not_asked_for_what_it_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def imports_on_demand(name: str) -> Any:
        asked.append(name)
        return ValueError

    lazy = ModuleType("lazy_module")
    lazy.__getattr__ = imports_on_demand  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "lazy_module", lazy)
    written = stored("heavy", [], "lazy_module")
    assert isinstance(decode_exception(written, None), TaskFailedError)
    assert asked == []


def test_a_class_that_makes_something_else_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    class Liar(Exception):
        def __new__(cls, *args: Any) -> Any:
            return 5

    monkeypatch.setattr(sys.modules[__name__], "Liar", Liar, raising=False)
    assert isinstance(decode_exception(stored("Liar", [], __name__), None), TaskFailedError)


def test_an_exception_object_of_another_serializer_is_taken_as_it_is() -> None:
    exc = ValueError("x")
    assert decode_exception(exc, "Traceback of old") is exc


# -- the meta that Celery's stores have ---------------------------------------------------

DONE = datetime(2026, 3, 4, 5, 6, 7, tzinfo=timezone.utc)


def test_a_record_is_written_with_celerys_keys() -> None:
    assert to_meta(TaskRecord("a", "SUCCESS", 5, date_done=DONE)) == {
        "status": "SUCCESS",
        "result": 5,
        "traceback": None,
        "children": [],
        "date_done": "2026-03-04T05:06:07+00:00",
        "task_id": "a",
    }
    more = to_meta(TaskRecord("a", "STARTED", group_id="g", parent_id="p"))
    assert (more["group_id"], more["parent_id"], more["date_done"]) == ("g", "p", None)


def test_a_record_comes_back() -> None:
    record = TaskRecord(
        "a", "FAILURE", {"exc_type": "X"}, "Traceback", [[["b", None], None]], DONE, "g", "p"
    )
    assert from_meta(json.loads(json.dumps(to_meta(record)))) == record


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2026-03-04T05:06:07+00:00", DONE),
        ("2026-03-04T05:06:07", DONE),
        ("2026-03-04T05:06:07Z", DONE),
        (DONE, DONE),
        (DONE.replace(tzinfo=None), DONE),
        ("yesterday", None),
        (5, None),
        (None, None),
    ],
)
def test_a_time_is_aware_however_it_was_written(written: Any, read: Any) -> None:
    assert from_meta({"task_id": "a", "status": "SUCCESS", "date_done": written}).date_done == read


@pytest.mark.parametrize("meta", [None, 5, "x", [], {}, {"task_id": "a"}, {"status": "SUCCESS"}])
def test_what_is_no_meta_is_refused(meta: Any) -> None:
    with pytest.raises(ResultError, match="the stored result is no task meta"):
        from_meta(meta)
