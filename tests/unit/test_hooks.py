"""Hooks and signals: who is told what, in which order, and that nobody who is told can do harm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from flask import current_app, has_app_context

from flask_taskworker import Ignore, Reject, Task, signals, states
from flask_taskworker.backends.base import TaskRecord
from flask_taskworker.backends.memory import MemoryBackend
from flask_taskworker.exceptions import (
    EncodeError,
    InvalidOptionError,
    NotInitialisedError,
    TaskDefinitionError,
)
from flask_taskworker.signals import TaskSignal
from flask_taskworker.worker.delivery import Settlement
from flask_taskworker.worker.executor import Executor
from support import Bench, FakeClock, deliver

Log = list[Any]


class Watching(Task[..., Any]):
    """Notes which hooks were called, and what was stored just then."""

    log: Log
    backend: MemoryBackend

    def _note(self, what: str, *about: Any) -> None:
        assert has_app_context()
        task_id = self.request.id
        assert task_id is not None
        record = self.backend.fetch(task_id)
        self.log.append((what, record.status if record else None, *about))

    def before_start(self, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._note("before_start", args, kwargs)

    def on_success(self, retval: Any, *call: Any) -> None:
        self._note("on_success", retval)

    def on_failure(self, exc: BaseException, *call: Any) -> None:
        self._note("on_failure", repr(exc), "Traceback" in str(call[-1]))

    def on_retry(self, exc: BaseException | None, *call: Any) -> None:
        self._note("on_retry", repr(exc))

    def after_return(self, status: str, retval: Any, *call: Any) -> None:
        self._note("after_return", status, str(retval))


@pytest.fixture
def log(bench: Bench) -> Log:
    log: Log = []
    Watching.log = log
    Watching.backend = bench.task_app.backend  # type: ignore[assignment]
    return log


@pytest.fixture
def connect() -> Iterator[Callable[[TaskSignal, Callable[..., None]], None]]:
    """Connects receivers until the test ends."""
    with ExitStack() as stack:

        def connect(signal: TaskSignal, receiver: Callable[..., None]) -> None:
            signal.connect(receiver, weak=False)
            stack.callback(signal.disconnect, receiver)

        yield connect


@pytest.fixture
def told(log: Log, connect: Any, bench: Bench) -> Log:
    """The log, with a note of each signal."""

    def noting(signal: str) -> Callable[..., None]:
        def note(sender: Any, **details: Any) -> None:
            log.append((signal, details.get("state"), sorted(details)))

        return note

    for name in ("prerun", "postrun", "success", "failure", "retry", "revoked", "unknown"):
        connect(getattr(signals, f"task_{name}"), noting(f"task_{name}"))
    return log


def names(log: Log) -> list[str]:
    return [entry[0] for entry in log]


# -- the order ----------------------------------------------------------------------------


def test_the_order_of_a_success(bench: Bench, told: Log) -> None:
    def body(x: int) -> int:
        told.append(("body", None))
        return x

    bench.run(bench.task(body, base=Watching, track_started=True), 5)
    assert names(told) == [
        "task_prerun", "before_start", "body", "on_success", "task_success", "after_return",
        "task_postrun",
    ]  # fmt: skip
    assert told[1] == ("before_start", "STARTED", [5], {})
    assert told[3] == ("on_success", "SUCCESS", 5), "it is stored by then"
    assert told[4] == ("task_success", None, ["result"])
    assert told[5] == ("after_return", "SUCCESS", "SUCCESS", "5")
    assert told[6] == ("task_postrun", "SUCCESS", ["args", "kwargs", "retval", "state", "task", "task_id"])  # fmt: skip # noqa: E501


def test_the_order_of_a_failure(bench: Bench, told: Log) -> None:
    def body() -> None:
        raise KeyError("x")

    bench.run(bench.task(body, base=Watching))
    assert names(told) == [
        "task_prerun", "before_start", "on_failure", "task_failure", "after_return",
        "task_postrun",
    ]  # fmt: skip
    assert told[2] == ("on_failure", "FAILURE", "KeyError('x')", True)
    assert told[3][2] == ["args", "einfo", "exception", "kwargs", "task_id", "traceback"]
    assert told[5][1] == "FAILURE"


def test_the_order_of_a_retry(bench: Bench, told: Log) -> None:
    def body(self: Task[..., Any]) -> None:
        raise self.retry(OSError("down"))

    bench.run(bench.task(body, base=Watching, bind=True))
    assert names(told) == [
        "task_prerun", "before_start", "on_retry", "task_retry", "task_postrun",
    ]  # fmt: skip
    assert told[2] == ("on_retry", "RETRY", "OSError('down')")
    assert told[3][2] == ["einfo", "reason", "request"]
    assert told[4][1] == "RETRY"


@pytest.mark.parametrize(
    ("exc", "state"), [(Ignore(), "IGNORED"), (Reject("x"), "REJECTED")], ids=["Ignore", "Reject"]
)
def test_control_flow_is_no_return(exc: BaseException, state: str, bench: Bench, told: Log) -> None:
    def body() -> None:
        raise exc

    bench.run(bench.task(body, base=Watching))
    assert names(told) == ["task_prerun", "before_start", "task_postrun"]
    assert told[2][1] == state


def test_what_does_not_run_is_told_apart(bench: Bench, told: Log, clock: FakeClock) -> None:
    bench.run(bench.task(lambda: 1, base=Watching), expires=clock.at(-1))
    bench.run("nobody.knows")
    assert told == [
        ("task_revoked", None, ["expired", "request", "signum", "terminated"]),
        ("task_unknown", None, ["exc", "id", "message", "name"]),
    ]


def test_a_result_that_cannot_be_stored_is_told_as_the_failure_it_is(
    bench: Bench, told: Log
) -> None:
    bench.run(bench.task(lambda: object(), base=Watching))
    assert names(told)[2:] == ["on_failure", "task_failure", "after_return", "task_postrun"]
    assert "EncodeError" in told[2][2]


def test_who_is_told_of_the_end_finds_it_stored_also_where_the_message_settles_it(
    bench: Bench, log: Log
) -> None:
    class Shared(MemoryBackend):
        def statement(self, record: TaskRecord) -> tuple[str, list[Any]]:
            return "INSERT", []

    backend = Watching.backend = Shared(bench.task_app.config)
    executor = Executor(bench.task_app, "w", backend=backend, stores_with_settlement=True)
    watched = executor.run(deliver(bench.task(lambda: 5, name="watched", base=Watching)))
    assert log[1] == ("on_success", "SUCCESS", 5)
    assert watched.statement is None
    assert watched.record is None
    plain = executor.run(deliver(bench.task(lambda: 5, name="plain")))
    assert plain.statement == ("INSERT", [])


# -- watchers do no harm ------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("bad hook"), SystemExit(1)], ids=["error", "exit"])
def test_what_watchers_raise_changes_nothing(
    error: BaseException, bench: Bench, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*about: Any, **details: Any) -> None:
        raise error

    class Broken(Task[..., Any]):
        before_start = on_success = after_return = on_failure = on_retry = fail

    others: list[Any] = []
    for signal in (signals.task_prerun, signals.task_success, signals.task_postrun):
        connect(signal, fail)
        connect(signal, lambda sender, **details: others.append(sender))
    task = bench.task(lambda: 5, base=Broken)
    assert bench.run(task).settlement is Settlement.ACKNOWLEDGE
    assert bench.stored() == (states.SUCCESS, 5)
    assert others == [task, task, task]
    assert caplog.text.count("a receiver of task_") == 3
    assert "fail of task t.<lambda>" in caplog.text


def test_a_fault_of_the_worker_is_told(bench: Bench, connect: Any) -> None:
    faults: list[Any] = []
    connect(signals.task_internal_error, lambda sender, **details: faults.append(details))
    bench.publisher.error = ZeroDivisionError("a bug")  # type: ignore[assignment]

    def body(self: Task[..., Any]) -> None:
        raise self.retry()

    assert bench.run(bench.task(body, bind=True)).settlement is Settlement.REQUEUE
    (fault,) = faults
    assert fault["task_id"] == bench.delivery.message.id
    assert isinstance(fault["exception"], ZeroDivisionError)


def test_receivers_may_listen_to_one_task(bench: Bench, connect: Any) -> None:
    heard: list[str] = []
    one, other = bench.task(lambda: 1, name="one"), bench.task(lambda: 2, name="other")

    def hear(sender: Any, **details: Any) -> None:
        heard.append(sender.name)

    signals.task_success.connect(hear, sender=one)
    try:
        bench.run(one)
        bench.run(other)
    finally:
        signals.task_success.disconnect(hear)
    assert heard == ["one"]


def test_hooks_have_an_app_context_and_the_request(bench: Bench) -> None:
    seen: list[Any] = []

    class Looking(Task[..., Any]):
        def on_success(self, retval: Any, task_id: str, *call: Any) -> None:
            seen.append((current_app.name, self.request.id == task_id))

    bench.run(bench.task(lambda: 5, base=Looking))
    assert seen == [("shop", True)]
    assert not has_app_context()


# -- task classes -------------------------------------------------------------------------


def test_a_call_of_its_own_surrounds_the_run(bench: Bench) -> None:
    class Doubling(Task[..., Any]):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return [super().__call__(*args, **kwargs), self.run(*args, **kwargs), self.request.id]

    def add(self: Task[..., Any], x: int) -> list[Any]:
        return [x, self.request.retries]

    task = bench.task(add, base=Doubling, bind=True)
    bench.run(task, 5, retries=2)
    assert bench.stored()[1] == [[5, 2], [5, 2], bench.delivery.message.id]
    assert task(7) == [[7, 0], [7, 0], None]


def test_a_class_with_a_run_is_a_task(bench: Bench) -> None:
    class Add(Task[..., Any]):
        """Adds."""

        def run(self, x: int, y: int = 1) -> Any:
            return [x + y, self.request.id]

    task = bench.task_worker.define_task(Add)
    assert isinstance(task, Add)
    assert task.name == f"{__name__}.Add"
    assert task.__doc__ == "Adds."
    bench.run(task, 5)
    assert bench.stored()[1] == [6, bench.delivery.message.id]
    assert task(1, y=1) == [2, None]
    with pytest.raises(TypeError, match="missing a required argument"):
        task.delay()
    named = bench.task_worker.define_task(name="sum", queue="math")(Add)
    assert (named.name, named.options_) == ("sum", {"name": "sum", "queue": "math"})


def test_a_class_without_a_run_is_none(bench: Bench) -> None:
    class Empty(Task[..., Any]):
        pass

    with pytest.raises(TaskDefinitionError):
        bench.task_worker.define_task(Empty)
    with pytest.raises(TaskDefinitionError, match="must be a subclass of Task"):
        bench.task_worker.define_task(base=int)  # type: ignore[arg-type]


# -- states of its own --------------------------------------------------------------------


def test_a_task_shows_its_progress(bench: Bench) -> None:
    def work(self: Task[..., Any]) -> Any:
        self.update_state(state="PROGRESS", meta={"done": 3})
        handle = self.AsyncResult(self.request.id or "")
        return [handle.state, handle.info, handle.ready()]

    bench.run(bench.task(work, bind=True))
    assert bench.stored()[1] == ["PROGRESS", {"done": 3}, False]


def test_progress_of_another_task_and_from_outside(bench: Bench) -> None:
    task = bench.task(lambda: 1)
    task.update_state("some-id", state="HALF", meta=0.5)
    assert bench.task_app.result("some-id").info == 0.5
    task.update_state("some-id", state="FAILURE", meta=KeyError("x"))
    assert isinstance(bench.task_app.result("some-id").result, KeyError)
    with pytest.raises(NotInitialisedError, match="needs a task_id"):
        task.update_state(state="HALF")


@pytest.mark.parametrize(
    ("state", "meta", "error"),
    [
        (None, {}, InvalidOptionError),
        ("", {}, InvalidOptionError),
        ("x" * 51, {}, InvalidOptionError),
        ("FAILURE", {"done": 3}, InvalidOptionError),
        ("PROGRESS", object(), EncodeError),
    ],
)
def test_states_that_no_reader_could_read_are_refused(
    state: Any, meta: Any, error: type[Exception], bench: Bench
) -> None:
    with pytest.raises(error):
        bench.task(lambda: 1).update_state("some-id", state=state, meta=meta)


def test_progress_does_not_undo_the_end(bench: Bench) -> None:
    task = bench.task(lambda: 1)
    bench.run(task)
    task.update_state(bench.delivery.message.id, state="PROGRESS")
    assert bench.stored() == (states.SUCCESS, 1)


def test_progress_that_cannot_be_stored_does_not_stop_the_work(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = bench.task_app.backend
    store = backend.store

    def away(record: TaskRecord) -> None:
        if record.status == "PROGRESS":
            raise ConnectionError("away")
        store(record)

    monkeypatch.setattr(backend, "store", away)

    def work(self: Task[..., Any]) -> int:
        self.update_state(state="PROGRESS")
        return 5

    bench.run(bench.task(work, bind=True))
    assert bench.stored() == (states.SUCCESS, 5)
    assert "state PROGRESS of" in caplog.text


# -- what becomes of the message ----------------------------------------------------------


def test_a_failure_may_be_kept_as_a_dead_letter(bench: Bench) -> None:
    def fail() -> None:
        raise KeyError("x")

    outcome = bench.run(bench.task(fail, acks_on_failure_or_timeout=False))
    assert (outcome.settlement, outcome.reason) == (Settlement.DEAD_LETTER, "KeyError: 'x'")
    assert bench.stored()[0] == states.FAILURE
    fine = bench.run(bench.task(lambda: 5, acks_on_failure_or_timeout=False))
    assert fine.settlement is Settlement.ACKNOWLEDGE


def test_expected_exceptions_are_no_news(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise KeyError("x")

    with caplog.at_level(logging.INFO):
        bench.run(bench.task(fail, throws=(LookupError,)))
    (record,) = [r for r in caplog.records if "raised expected KeyError: 'x'" in r.getMessage()]
    assert (record.levelno, record.exc_info) == (logging.INFO, None)
    assert bench.stored()[0] == states.FAILURE


def test_failures_may_be_stored_although_results_are_ignored(bench: Bench) -> None:
    def fail() -> None:
        raise KeyError("x")

    options = {"ignore_result": True, "store_errors_even_if_ignored": True}
    bench.run(bench.task(fail, **options), ignore_result=True)
    assert bench.stored()[0] == states.FAILURE
    bench.run(bench.task(lambda: 5, **options), ignore_result=True)
    assert bench.record is None
