"""One run of one task: whatever the task does, there is an outcome and the app is clean after."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

import flask
import pytest
from flask import current_app, g, has_app_context, has_request_context

from flask_taskworker import (
    Ignore,
    MaxRetriesExceededError,
    Reject,
    Request,
    Task,
    current_request,
    failpoints,
    states,
)
from flask_taskworker.backends.base import TaskRecord
from flask_taskworker.backends.memory import MemoryBackend
from flask_taskworker.exceptions import (
    BrokerUnavailableError,
    EncodeError,
    TaskRevokedError,
    UnknownTaskError,
)
from flask_taskworker.worker.delivery import Settlement
from flask_taskworker.worker.eager import run_eagerly
from flask_taskworker.worker.executor import Executor
from support import Bench, FakeClock, deliver, make_task_app

ACKNOWLEDGE, REQUEUE, DEAD_LETTER = Settlement


# -- outcomes -----------------------------------------------------------------------------


def test_a_value_is_stored_and_the_message_is_done(bench: Bench) -> None:
    outcome = bench.run(lambda x, y: {"sum": x + y}, 1, 2)
    assert outcome[:4] == (ACKNOWLEDGE, None, None, "")
    assert bench.stored() == (states.SUCCESS, {"sum": 3})
    assert bench.handle.get(timeout=0) == {"sum": 3}


def test_a_run_is_timed(bench: Bench, clock: FakeClock) -> None:
    assert bench.run(lambda: clock.advance(1.5)).runtime == pytest.approx(1.5)


def test_keyword_arguments_arrive(bench: Bench) -> None:
    bench.run(lambda *args, **kwargs: [args, kwargs], 1, kwargs={"a": 2})
    assert bench.stored() == (states.SUCCESS, [[1], {"a": 2}])


def test_a_bound_task_gets_itself_and_its_request(bench: Bench) -> None:
    def bound(self: Task[..., Any], x: int) -> Any:
        return [self.name, x, self.request.id, self.request.called_directly]

    task = bench.task(bound, bind=True)
    bench.run(task, 5)
    assert bench.stored()[1] == ["t.bound", 5, bench.delivery.message.id, False]


def test_an_exception_is_a_failure_with_its_traceback(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(x: int) -> None:
        raise KeyError(x)

    outcome = bench.run(broken, 5)
    assert outcome[:3] == (ACKNOWLEDGE, None, None)
    assert bench.stored() == (
        states.FAILURE,
        {"exc_type": "KeyError", "exc_message": [5], "exc_module": "builtins"},
    )
    traceback = bench.handle.traceback
    assert traceback is not None
    assert "in broken\n    raise KeyError(x)" in traceback
    assert "KeyError: 5" in traceback
    with pytest.raises(KeyError, match="5"):
        bench.handle.get(timeout=0)
    assert f"task t.broken[{bench.delivery.message.id}] raised KeyError: 5" in caplog.text


def test_a_traceback_begins_in_the_task(bench: Bench) -> None:
    def broken() -> None:
        raise ValueError

    bench.run(broken)
    assert "worker/executor.py" not in (bench.handle.traceback or "")


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int = 5


class Unshowable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


class Slotted(Exception):
    __slots__ = ("a",)


def too_deep() -> None:
    too_deep()


def with_cycle() -> None:
    error = ValueError("a")
    error.__cause__ = KeyError("b")
    error.__cause__.__cause__ = error
    raise error


def raising(exc: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise exc

    return run


def leave() -> None:
    sys.exit(3)


NASTY: dict[str, tuple[Callable[[], Any], str]] = {
    "SystemExit": (leave, "SystemExit"),
    "KeyboardInterrupt": (raising(KeyboardInterrupt()), "KeyboardInterrupt"),
    "GeneratorExit": (raising(GeneratorExit()), "GeneratorExit"),
    "MemoryError": (raising(MemoryError()), "MemoryError"),
    "RecursionError": (too_deep, "RecursionError"),
    "StopIteration": (raising(StopIteration(5)), "StopIteration"),
    "str raises": (raising(Unshowable("x")), "Unshowable"),
    "unpicklable": (raising(ValueError(lambda: None, threading.Lock())), "ValueError"),
    "cyclic cause": (with_cycle, "ValueError"),
    "slots": (raising(Slotted("x")), "Slotted"),
    "lone surrogate and NUL": (raising(ValueError("\ud800\0")), "ValueError"),
    "CancelledError": (raising(asyncio.CancelledError()), "CancelledError"),
    "10 MB of text": (raising(ValueError("x" * 10**7)), "ValueError"),
}


@pytest.mark.parametrize(("function", "name"), NASTY.values(), ids=NASTY)
@pytest.mark.parametrize("wants_request", [False, True], ids=["app", "request"])
def test_whatever_a_task_raises_is_its_failure_alone(
    function: Callable[[], Any], name: str, wants_request: bool, bench: Bench
) -> None:
    task = bench.task(function, name="t", request_context=wants_request)
    assert bench.run(task).settlement is ACKNOWLEDGE
    status, stored = bench.stored()
    assert (status, stored["exc_type"]) == (states.FAILURE, name)
    assert len(bench.handle.traceback or "") < 70_000
    assert not has_app_context()
    assert isinstance(bench.handle.get(timeout=0, propagate=False), Exception)


def test_an_exception_that_cannot_be_changed_is_a_failure(bench: Bench) -> None:
    assert bench.run(raising(Frozen())).settlement is ACKNOWLEDGE
    assert bench.stored()[0] == states.FAILURE


@pytest.mark.parametrize("value", [{1, 2}, object(), lambda: None], ids=["set", "object", "lambda"])
def test_a_value_that_cannot_be_stored_is_a_failure(value: Any, bench: Bench) -> None:
    runs = []

    def give() -> Any:
        runs.append(1)
        return value

    assert bench.run(give).settlement is ACKNOWLEDGE
    status, stored = bench.stored()
    assert (status, stored["exc_type"]) == (states.FAILURE, "EncodeError")
    assert "the result cannot be serialized as json" in stored["exc_message"][0]
    assert len(stored["exc_message"][0]) < 1024
    assert runs == [1]
    with pytest.raises(EncodeError, match="cannot be serialized"):
        bench.handle.get(timeout=0)


def test_wrong_arguments_are_a_failure(bench: Bench) -> None:
    assert bench.run(lambda x: x, 1, 2, 3).settlement is ACKNOWLEDGE
    assert bench.stored()[1]["exc_type"] == "TypeError"


def test_ignore_stores_nothing(bench: Bench) -> None:
    assert bench.run(raising(Ignore()))[:2] == (ACKNOWLEDGE, None)
    assert bench.record is None


def test_reject_parks_the_message(bench: Bench) -> None:
    outcome = bench.run(raising(Reject("out of stock")))
    assert outcome.settlement is DEAD_LETTER
    assert outcome.reason == "rejected by the task: out of stock"
    status, stored = bench.stored()
    assert status == states.FAILURE
    assert stored == {
        "exc_type": "Reject",
        "exc_message": ["out of stock", False],
        "exc_module": "celery.exceptions",
    }


def test_reject_may_put_the_message_back(bench: Bench) -> None:
    assert bench.run(raising(Reject("later", requeue=True))).settlement is REQUEUE
    assert bench.record is None


def test_an_expired_message_is_not_run(bench: Bench, clock: FakeClock) -> None:
    runs = []
    task = bench.task(lambda: runs.append(1), name="t")
    delivery = deliver(task, expires=clock.at(10))
    clock.advance(11)
    assert bench.executor.run(delivery).settlement is ACKNOWLEDGE
    handle = bench.task_app.result(delivery.message.id)
    assert handle.state == states.REVOKED
    with pytest.raises(TaskRevokedError, match="expired"):
        handle.get(timeout=0)
    assert runs == []


def test_an_unknown_name_is_parked_with_its_reason(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = bench.run("nobody.knows")
    assert f"task nobody.knows[{bench.delivery.message.id}] is parked: no task" in caplog.text
    assert outcome.settlement is DEAD_LETTER
    assert outcome.reason == (
        "no task 'nobody.knows' is registered in this worker. Import its module in the app, "
        "then replay the message."
    )
    assert bench.stored() == (
        states.FAILURE,
        {
            "exc_type": "NotRegistered",
            "exc_message": ["nobody.knows"],
            "exc_module": "celery.exceptions",
        },
    )
    with pytest.raises(UnknownTaskError, match=r"nobody\.knows"):
        bench.handle.get(timeout=0)


def test_a_result_nobody_wants_is_not_stored(bench: Bench) -> None:
    for function in (lambda: 5, raising(ValueError())):
        assert bench.run(function, ignore_result=True).settlement is ACKNOWLEDGE
        assert bench.record is None


@pytest.mark.parametrize(
    ("of_message", "of_task", "stored"),
    [(None, True, False), (None, False, True), (False, True, True), (True, False, False)],
)
def test_the_message_decides_about_the_result_then_the_task(
    of_message: bool | None, of_task: bool, stored: bool, bench: Bench
) -> None:
    task = bench.task(lambda: 5, name="t", ignore_result=of_task)
    bench.run(task, ignore_result=of_message)
    assert (bench.record is not None) is stored


def test_the_start_is_stored_if_asked_for(bench: Bench) -> None:
    seen: list[Any] = []

    def look() -> None:
        record = bench.task_app.backend.fetch(current_request().id or "")
        seen.append(record and (record.status, record.result))

    bench.run(bench.task(look, name="silent"))
    bench.run(bench.task(look, name="tracked", track_started=True))
    bench.run(
        bench.task(look, name="ignored", track_started=True, ignore_result=True), ignore_result=None
    )
    assert seen[0] is None
    assert seen[1][0] == states.STARTED
    assert seen[1][1].keys() == {"pid", "hostname"}
    assert seen[1][1]["hostname"] == "worker@test"
    assert seen[2] is None


# -- retry --------------------------------------------------------------------------------


def retrying(**options: Any) -> Callable[..., Any]:
    def retried(self: Task[..., Any], *args: Any, **kwargs: Any) -> None:
        raise self.retry(**options)

    return retried


def test_a_retry_is_published_before_the_message_is_done(bench: Bench, clock: FakeClock) -> None:
    task = bench.task(retrying(exc=OSError("down"), countdown=30), bind=True)
    outcome = bench.run(
        task, 1, kwargs={"a": 2}, retries=1, root_id="root", parent_id="parent", group="g",
        headers={"x-trace": "t"}, reply_to="q", priority=4, expires=clock.at(99),
        timelimit=(9, 8), properties={},
    )  # fmt: skip
    assert outcome.settlement is ACKNOWLEDGE
    ((again, queue),) = bench.publisher.published
    first = bench.delivery.message
    assert queue == "celery"
    assert again == first.copy(
        retries=2,
        eta=clock.at(30),
        parent_id=first.id,
        argsrepr=None,
        kwargsrepr=None,
        origin=None,
    )
    assert bench.stored()[0] == states.RETRY
    assert bench.stored()[1]["exc_type"] == "OSError"
    assert isinstance(bench.handle.result, OSError)
    assert not bench.handle.ready()


def test_a_retry_without_a_time_waits_as_the_task_says(bench: Bench, clock: FakeClock) -> None:
    bench.run(bench.task(retrying(), bind=True, name="a", retry_delay=7))
    bench.run(bench.task(retrying(), bind=True, name="b"))
    bench.run(bench.task(retrying(countdown=0), bind=True, name="c"))
    bench.run(bench.task(retrying(eta=clock.at(50)), bind=True, name="d"))
    assert [message.eta for message, _ in bench.publisher.published] == [
        clock.at(7),
        clock.at(bench.task_app.config.retry_delay),
        None,
        clock.at(50),
    ]


def test_a_retry_may_change_the_arguments(bench: Bench) -> None:
    task = bench.task(retrying(args=(7,), kwargs={"b": 8}), bind=True)
    bench.run(task, 1, kwargs={"a": 2})
    payload = bench.publisher.published[0][0].payload
    assert (tuple(payload.args), payload.kwargs) == ((7,), {"b": 8})


def test_the_last_retry_fails_with_its_cause(bench: Bench) -> None:
    task = bench.task(retrying(exc=OSError("down")), bind=True, max_retries=2)
    bench.run(task, retries=1)
    assert len(bench.publisher.published) == 1
    assert bench.run(task, retries=2).settlement is ACKNOWLEDGE
    assert len(bench.publisher.published) == 1
    with pytest.raises(OSError, match="down"):
        bench.handle.get(timeout=0)


def test_without_a_cause_it_fails_as_too_many_retries(bench: Bench) -> None:
    bench.run(bench.task(retrying(), bind=True, max_retries=0))
    with pytest.raises(MaxRetriesExceededError, match=r"can't retry t\.retried\[.+\]: 0 retries"):
        bench.handle.get(timeout=0)


@pytest.mark.parametrize(("of_task", "of_call", "retries"), [(None, None, 50), (0, 9, 8)])
def test_the_limit_may_be_lifted(
    of_task: int | None, of_call: int | None, retries: int, bench: Bench
) -> None:
    task = bench.task(retrying(max_retries=of_call), bind=True, max_retries=of_task)
    bench.run(task, retries=retries)
    assert len(bench.publisher.published) == 1


def test_a_retry_that_cannot_be_published_loses_nothing(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.publisher.error = BrokerUnavailableError("the broker is away")
    outcome = bench.run(bench.task(retrying(), bind=True))
    assert outcome.settlement is REQUEUE
    assert "the broker is away" in outcome.reason
    assert bench.record is None


# -- the store is away --------------------------------------------------------------------


class Failing(MemoryBackend):
    """A store that is away for some attempts."""

    attempts = 0
    away_for = 0
    error: Exception = OSError("the store is away")

    def store(self, record: TaskRecord) -> None:
        self.attempts += 1
        if self.attempts <= self.away_for:
            raise self.error
        super().store(record)


@pytest.fixture
def failing(bench: Bench) -> Failing:
    backend = Failing(bench.task_app.config)
    bench.task_app.__dict__["backend"] = backend
    bench.executor = Executor(bench.task_app, "worker@test")
    return backend


def test_a_result_is_tried_again_until_it_is_stored(bench: Bench, failing: Failing) -> None:
    runs = []

    def give() -> int:
        runs.append(1)
        return 5

    failing.away_for = 1
    assert bench.run(give).settlement is ACKNOWLEDGE
    assert bench.stored() == (states.SUCCESS, 5)
    assert (failing.attempts, runs) == (2, [1])


def test_a_stopping_worker_puts_back_what_it_cannot_store(bench: Bench, failing: Failing) -> None:
    failing.away_for = 10**6
    bench.executor.close()
    outcome = bench.run(lambda: 5)
    assert outcome.settlement is REQUEUE
    assert outcome.reason == "its result could not be stored: OSError: the store is away"
    assert outcome.record is None


def test_patience_with_a_store_has_an_end(bench: Bench, failing: Failing, clock: FakeClock) -> None:
    failing.away_for = 10**6

    def finish() -> None:
        clock.advance(0)

    store = failing.store

    def slow(record: TaskRecord) -> None:
        clock.advance(300)  # each attempt takes that long
        store(record)

    failing.store = slow  # type: ignore[method-assign]
    assert bench.run(finish).settlement is REQUEUE
    assert failing.attempts == 2


def test_a_fault_in_the_store_puts_the_message_back(
    bench: Bench, failing: Failing, caplog: pytest.LogCaptureFixture
) -> None:
    failing.away_for, failing.error = 1, ZeroDivisionError("a bug")
    outcome = bench.run(lambda: 5)
    assert outcome.settlement is REQUEUE
    assert outcome.reason == "worker fault: ZeroDivisionError: a bug"
    assert "worker fault in task" in caplog.text


def test_a_store_that_settles_with_the_message_gets_a_statement(bench: Bench) -> None:
    class Shared(MemoryBackend):
        def statement(self, record: TaskRecord) -> tuple[str, list[Any]]:
            return "INSERT", [record.task_id, record.status]

    executor = Executor(
        bench.task_app,
        "w",
        backend=Shared(bench.task_app.config),
        stores_with_settlement=True,
    )
    delivery = deliver(bench.task(lambda: 5, name="t"))
    outcome = executor.run(delivery)
    assert outcome.statement == ("INSERT", [delivery.message.id, states.SUCCESS])
    assert outcome.record is not None
    assert executor.backend.fetch(delivery.message.id) is None


@pytest.mark.usefixtures("no_failpoints")
@pytest.mark.parametrize("point", ["before_run", "after_run", "before_result", "after_result"])
def test_a_crash_between_two_steps_means_it_runs_again(point: str, bench: Bench) -> None:
    task = bench.task(lambda: 5, name="t")
    failpoints.arm(point, "raise")
    assert bench.run(task).settlement is REQUEUE
    assert bench.run(task).settlement is ACKNOWLEDGE


@pytest.mark.usefixtures("no_failpoints")
@pytest.mark.parametrize(("point", "published"), [("before_retry", 0), ("after_retry", 1)])
def test_a_crash_around_a_retry_means_it_runs_again(
    point: str, published: int, bench: Bench
) -> None:
    failpoints.arm(point, "raise")
    assert bench.run(bench.task(retrying(), bind=True)).settlement is REQUEUE
    assert len(bench.publisher.published) == published


# -- the context --------------------------------------------------------------------------


def test_a_task_runs_in_a_fresh_context_of_its_app(bench: Bench) -> None:
    seen: list[Any] = []

    def look() -> None:
        seen.append((current_app._get_current_object(), g._get_current_object(), "mark" in g))  # type: ignore[attr-defined]
        g.mark = 1

    task = bench.task(look)
    bench.run(task)
    bench.run(task)
    (first, one, dirty), (second, two, dirty_again) = seen
    assert first is second is bench.app
    assert one is not two
    assert not dirty
    assert not dirty_again
    assert not has_app_context()


def test_a_task_sees_nothing_of_the_callers_context(bench: Bench) -> None:
    with flask.Flask("other").app_context():
        g.mark = 1
        bench.run(lambda: [current_app.name, "mark" in g, has_request_context()])
    assert bench.stored()[1] == ["shop", False, False]


@pytest.mark.parametrize("wants_request", [False, True], ids=["app", "request"])
@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (lambda: 5, None),
        (raising(ValueError()), ValueError),
        (leave, SystemExit),
        (raising(Ignore()), Ignore),
        (raising(Reject()), Reject),
    ],
    ids=["success", "failure", "exit", "ignore", "reject"],
)
def test_the_context_is_torn_down_with_what_the_task_raised(
    end: Callable[[], Any], kind: type[BaseException] | None, wants_request: bool, bench: Bench
) -> None:
    seen: list[Any] = []
    bench.app.teardown_appcontext(seen.append)
    bench.run(bench.task(end, name="t", request_context=wants_request))
    assert [type(exc) if exc else None for exc in seen] == [kind]


def test_the_context_is_torn_down_after_a_retry(bench: Bench) -> None:
    seen: list[Any] = []
    bench.app.teardown_appcontext(seen.append)
    bench.run(bench.task(retrying(), bind=True))
    assert len(seen) == 1


def test_request_context_runs_the_before_request_functions(bench: Bench) -> None:
    seen: list[str] = []
    bench.app.before_request(lambda: seen.append("before"))

    @bench.app.after_request
    def after(response: flask.Response) -> flask.Response:
        seen.append("after")
        return response

    bench.app.teardown_request(lambda exc: seen.append("teardown"))

    def look() -> str:
        seen.append(f"{has_request_context()} {flask.request.path}")
        return flask.url_for("static", filename="a.css")

    bench.run(bench.task(look, request_context=True))
    assert seen == ["before", "True /", "after", "teardown"]
    assert bench.stored() == (states.SUCCESS, "/static/a.css")
    assert not has_request_context()

    seen.clear()
    bench.run(bench.task(lambda: has_request_context(), name="plain"))
    assert seen == []
    assert bench.stored() == (states.SUCCESS, False)


def test_an_error_in_a_before_request_function_is_a_failure(bench: Bench) -> None:
    @bench.app.before_request
    def broken() -> None:
        raise PermissionError("no")

    bench.run(bench.task(lambda: 5, name="t", request_context=True))
    assert bench.stored()[1]["exc_type"] == "PermissionError"


def test_the_request_of_a_run_has_all_that_the_message_says(bench: Bench, clock: FakeClock) -> None:
    seen: list[Request] = []
    task = bench.task(lambda *args, **kwargs: seen.append(current_request()), name="t")
    bench.run(
        task, 1, kwargs={"a": 2}, id="my-id", retries=2, eta=clock.at(-5), expires=clock.at(60),
        root_id="root", parent_id="parent", group="g", group_index=3, reply_to="q",
        correlation_id="c", origin="gen1@h", shadow="s", headers={"x-trace": "t"},
        properties={"delivery_count": 4},
    )  # fmt: skip
    assert seen == [
        Request(
            id="my-id",
            task="t",
            args=[1],
            kwargs={"a": 2},
            retries=2,
            eta=clock.at(-5),
            expires=clock.at(60),
            root_id="root",
            parent_id="parent",
            group="g",
            group_index=3,
            reply_to="q",
            correlation_id="c",
            origin="gen1@h",
            shadow="s",
            headers={"x-trace": "t"},
            delivery_info={"exchange": "", "routing_key": "celery"},
            delivery_count=4,
            hostname="worker@test",
            ignore_result=False,
            called_directly=False,
        )
    ]
    assert current_request().called_directly


def test_a_delivery_counts_what_the_broker_says() -> None:
    task = "t"
    assert deliver(task).delivery_count == 1
    assert deliver(task, properties={"delivery_count": 3}).delivery_count == 3
    again = deliver(task)
    again.raw.delivery_info["redelivered"] = True
    assert again.delivery_count == 2


def test_a_call_from_inside_a_task_knows_its_parent(bench: Bench) -> None:
    child = bench.task(lambda: None, name="child")
    bench.run(bench.task(lambda: child.delay().id, name="parent"), root_id="root")
    ((message, _),) = bench.publisher.published
    assert message.parent_id == bench.delivery.message.id
    assert message.root_id == "root"
    assert bench.stored() == (states.SUCCESS, message.id)


# -- async def ----------------------------------------------------------------------------


def test_a_coroutine_is_awaited_in_the_context(bench: Bench) -> None:
    async def look(x: int) -> Any:
        await asyncio.sleep(0)
        return [current_app.name, current_request().id, x]

    bench.run(look, 5)
    assert bench.stored() == (states.SUCCESS, ["shop", bench.delivery.message.id, 5])


def test_a_coroutine_may_fail_and_retry(bench: Bench) -> None:
    async def broken() -> None:
        await asyncio.sleep(0)
        raise KeyError("x")

    async def again(self: Task[..., Any]) -> None:
        await asyncio.sleep(0)
        raise self.retry(countdown=1)

    bench.run(broken)
    assert bench.stored()[1]["exc_type"] == "KeyError"
    bench.run(bench.task(again, bind=True))
    assert bench.stored()[0] == states.RETRY
    assert len(bench.publisher.published) == 1


# -- in the caller ------------------------------------------------------------------------


@pytest.fixture
def eager() -> Bench:
    return Bench(make_task_app(TASKER_ALWAYS_EAGER=True))


def test_eagerly_a_call_is_run_at_once(eager: Bench) -> None:
    task = eager.task(lambda x: [x, current_app.name, current_request().hostname], name="t")
    handle = task.delay(5)
    assert handle.ready()
    value = handle.get(timeout=0)
    assert value[:2] == [5, "shop"]
    assert value[2].startswith("eager@")
    assert eager.publisher.published == []


def test_eagerly_arguments_still_go_over_the_wire(eager: Bench) -> None:
    task = eager.task(lambda x: x, name="t")
    assert task.delay((1, 2)).get(timeout=0) == [1, 2]
    with pytest.raises(EncodeError, match="argument 1"):
        task.delay(object())


def test_eagerly_a_failure_is_on_the_handle_or_raised(eager: Bench) -> None:
    task = eager.task(raising(KeyError("x")), name="t")
    assert task.delay().state == states.FAILURE
    loud = Bench(make_task_app(TASKER_ALWAYS_EAGER=True, TASKER_EAGER_PROPAGATES=True))
    with pytest.raises(KeyError, match="x"):
        loud.task(raising(KeyError("x")), name="t").delay()


def test_run_eagerly_reads_any_serializer_it_writes(bench: Bench) -> None:
    task = bench.task(lambda x: len(x), name="t")
    message = deliver(task, [1, 2]).message
    assert run_eagerly(bench.task_app, message, "pickle").get(timeout=0) == 2


# -- nothing is poison --------------------------------------------------------------------


def test_a_retry_with_arguments_that_cannot_be_sent_is_a_failure(bench: Bench) -> None:
    outcome = bench.run(bench.task(retrying(args=(object(),)), bind=True))
    assert outcome.settlement is ACKNOWLEDGE
    assert bench.stored()[1]["exc_type"] == "EncodeError"


def test_a_retry_at_a_time_without_a_zone_is_a_failure(bench: Bench) -> None:
    outcome = bench.run(bench.task(retrying(eta=datetime(2026, 1, 1)), bind=True))
    assert outcome.settlement is ACKNOWLEDGE
    assert bench.publisher.published == []
    assert bench.stored()[1]["exc_type"] == "InvalidOptionError"


def test_a_reason_that_cannot_be_shown_parks_the_message_all_the_same(bench: Bench) -> None:
    outcome = bench.run(raising(Reject(Unshowable())))
    assert outcome.settlement is DEAD_LETTER


def test_a_store_that_is_away_at_the_start_is_no_failure_of_the_task(
    bench: Bench, failing: Failing
) -> None:
    failing.away_for = 1
    bench.executor.close()  # so that it does not try again
    bench.run(bench.task(lambda: 5, name="t", track_started=True))
    assert bench.record is None or bench.stored() == (states.SUCCESS, 5)


def test_a_huge_text_of_an_exception_does_not_flood_the_log(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.run(raising(ValueError("x" * 10**6)))
    assert len(caplog.text) < 200_000


def test_an_error_in_a_teardown_function_does_not_undo_a_success(bench: Bench) -> None:
    @bench.app.teardown_appcontext
    def broken(exc: BaseException | None) -> None:
        raise RuntimeError("teardown")

    bench.run(lambda: 5)
    assert bench.stored() == (states.SUCCESS, 5)
