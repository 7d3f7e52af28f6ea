"""Retries: what may be asked for, when the next run is due, what its message says."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from flask_taskworker import Ignore, Reject, Retry, Task, states
from flask_taskworker.exceptions import (
    InvalidOptionError,
    NotInitialisedError,
    TaskArgumentError,
    UnknownOptionError,
)
from flask_taskworker.message import Payload, encode
from flask_taskworker.retries import backoff
from flask_taskworker.worker.delivery import Delivery, Settlement
from support import Bench, FakeClock, received
from support.apps import make_task_app

SIGNATURE = {
    "task": "next", "args": [], "kwargs": {}, "options": {}, "subtask_type": None,
    "immutable": False,
}  # fmt: skip


def retrying(**options: Any) -> Callable[..., Any]:
    def retried(self: Task[..., Any], *args: Any, **kwargs: Any) -> None:
        raise self.retry(**options)

    return retried


def failing(exc: BaseException) -> Callable[..., Any]:
    def failed(*args: Any) -> None:
        raise exc

    return failed


# -- the next message ---------------------------------------------------------------------


def test_options_of_a_retry_change_the_message_and_its_way(bench: Bench, clock: FakeClock) -> None:
    task = bench.task(
        retrying(
            queue="slow", priority=7, headers={"x": "y"}, expires=50, shadow="alias",
            ignore_result=True, retry=False, retry_policy={"max_retries": 1}, countdown=5,
        ),
        bind=True,
    )  # fmt: skip
    bench.run(task, headers={"old": "z"})
    ((again, queue),) = bench.publisher.published
    assert queue == "slow"
    assert (again.priority, again.headers, again.shadow) == (7, {"x": "y"}, "alias")
    assert (again.expires, again.eta, again.ignore_result) == (clock.at(50), clock.at(5), True)
    (options,) = bench.publisher.options
    assert (options["retry"], options["retry_policy"]) == (False, {"max_retries": 1})


def test_time_limits_of_a_call_are_kept_unless_the_retry_has_its_own(bench: Bench) -> None:
    bench.run(bench.task(retrying(), bind=True), timelimit=(9.0, 5.0))
    bench.run(bench.task(retrying(soft_time_limit=7), bind=True), timelimit=(9.0, 5.0))
    assert [again.timelimit for again, _ in bench.publisher.published] == [(9.0, 5.0), (9.0, 7)]


def test_what_follows_the_task_is_kept(bench: Bench) -> None:
    after = Payload((1,), {}, [SIGNATURE], [SIGNATURE], [SIGNATURE, SIGNATURE], SIGNATURE)
    bench.run(bench.task(retrying(), bind=True), payload=after, root_id="root", group="g")
    again = bench.publisher.published[0][0]
    kept = again.payload
    assert kept[2:] == after[2:]
    assert (again.root_id, again.group, again.id) == ("root", "g", bench.delivery.message.id)


def test_a_retry_is_packed_as_its_message_was(bench: Bench) -> None:
    task = bench.task(retrying(), bind=True)
    message = bench_message(task)
    raw = received(encode(message, "yaml", "gzip"), delivery_info={"routing_key": "celery"})
    bench.executor.run(Delivery(raw, message, "celery", epoch=1))
    (options,) = bench.publisher.options
    assert options["serializer"] == "yaml"
    assert encode(message, "yaml", options["compression"]).headers["compression"] == (
        "application/x-gzip"
    )


def bench_message(task: Task[..., Any]) -> Any:
    from flask_taskworker.message import TaskMessage

    return TaskMessage(task=task.name, id="some-id", payload=Payload((), {}))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"task_id": "mine"}, UnknownOptionError),
        ({"countdwn": 5}, UnknownOptionError),
        ({"priority": 99}, InvalidOptionError),
        ({"max_retries": -1}, InvalidOptionError),
    ],
)
def test_wrong_options_fail_the_run(options: Any, error: type[Exception], bench: Bench) -> None:
    bench.run(bench.task(retrying(**options), bind=True))
    assert bench.publisher.published == []
    with pytest.raises(error, match=r"^retry\("):
        bench.handle.get(timeout=0)


def test_new_arguments_have_to_fit(bench: Bench) -> None:
    def strict(self: Task[..., Any], a: int) -> None:
        raise self.retry(args=(1, 2))

    bench.run(bench.task(strict, bind=True), 1)
    with pytest.raises(TaskArgumentError, match="too many positional"):
        bench.handle.get(timeout=0)


# -- asking -------------------------------------------------------------------------------


def test_without_throw_the_run_goes_on(bench: Bench) -> None:
    def goes_on(self: Task[..., Any]) -> str:
        asked = self.retry(countdown=5, throw=False)
        assert isinstance(asked, Retry)
        assert bench.publisher.published == []
        return "done"

    outcome = bench.run(bench.task(goes_on, bind=True))
    assert outcome.settlement is Settlement.ACKNOWLEDGE
    ((again, _),) = bench.publisher.published
    assert again.retries == 1
    assert bench.stored() == (states.SUCCESS, "done")


def test_a_retry_that_was_asked_for_is_sent_even_if_the_run_fails(bench: Bench) -> None:
    def fails(self: Task[..., Any]) -> None:
        self.retry(throw=False)
        raise KeyError("x")

    bench.run(bench.task(fails, bind=True))
    assert len(bench.publisher.published) == 1
    assert bench.stored()[0] == states.FAILURE


def test_a_direct_call_raises_what_went_wrong(bench: Bench) -> None:
    def tries(self: Task[..., Any], cause: BaseException | None) -> None:
        try:
            raise KeyError("inner")
        except KeyError:
            raise self.retry(exc=cause) from None

    task = bench.task(tries, bind=True)
    with pytest.raises(OSError, match="given"):
        task(OSError("given"))
    with pytest.raises(KeyError, match="inner"):
        task(None)
    with pytest.raises(NotInitialisedError):
        bench.task(retrying(), name="bare", bind=True)()


def test_another_task_that_is_called_inside_a_run_does_not_take_its_request(bench: Bench) -> None:
    inner = bench.task(retrying(exc=OSError("inner")), name="inner", bind=True)

    def outer(self: Task[..., Any]) -> list[Any]:
        with pytest.raises(OSError, match="inner"):
            inner()
        return [self.request.id, inner.request.called_directly]

    bench.run(bench.task(outer, bind=True))
    assert bench.stored()[1] == [bench.delivery.message.id, True]


# -- automatic retries --------------------------------------------------------------------


def test_named_exceptions_are_retried(bench: Bench, clock: FakeClock) -> None:
    task = bench.task(
        failing(ConnectionError("down")), autoretry_for=(OSError,), retry_kwargs={"countdown": 9}
    )
    bench.run(task)
    ((again, _),) = bench.publisher.published
    assert (again.retries, again.eta) == (1, clock.at(9))
    status, result = bench.stored()
    assert (status, result["exc_type"]) == (states.RETRY, "ConnectionError")
    assert "raise exc" in (bench.handle.traceback or "")


def test_automatic_retries_wait_as_the_task_says(bench: Bench, clock: FakeClock) -> None:
    bench.run(bench.task(failing(OSError()), autoretry_for=(OSError,), retry_delay=33))
    assert bench.publisher.published[0][0].eta == clock.at(33)


@pytest.mark.parametrize(
    "exc",
    [KeyError("x"), TimeoutError("excepted"), SystemExit(3)],
    ids=lambda exc: type(exc).__name__,
)
def test_other_exceptions_are_not(exc: BaseException, bench: Bench) -> None:
    task = bench.task(failing(exc), autoretry_for=(OSError,), dont_autoretry_for=(TimeoutError,))
    bench.run(task)
    assert bench.publisher.published == []
    assert bench.stored()[0] == states.FAILURE


@pytest.mark.parametrize("exc", [Ignore(), Reject("no", requeue=True)], ids=["Ignore", "Reject"])
def test_control_flow_is_never_retried(exc: BaseException, bench: Bench) -> None:
    bench.run(bench.task(failing(exc), autoretry_for=(BaseException,)))
    assert bench.publisher.published == []


def test_a_retry_of_the_task_s_own_wins(bench: Bench, clock: FakeClock) -> None:
    task = bench.task(retrying(countdown=5), bind=True, autoretry_for=(Exception,))
    bench.run(task)
    ((again, _),) = bench.publisher.published
    assert again.eta == clock.at(5)


def test_when_they_are_used_up_the_exception_itself_fails_the_task(bench: Bench) -> None:
    task = bench.task(failing(OSError("down")), autoretry_for=(OSError,), max_retries=2)
    bench.run(task, retries=2)
    with pytest.raises(OSError, match="down"):
        bench.handle.get(timeout=0)
    traceback = bench.handle.traceback or ""
    assert traceback.splitlines()[1].strip().endswith("in failed"), "it begins in the task"


def test_the_limit_of_automatic_retries_may_be_their_own(bench: Bench) -> None:
    task = bench.task(failing(OSError()), autoretry_for=(OSError,), retry_kwargs={"max_retries": 9})
    bench.run(task, retries=8)
    assert len(bench.publisher.published) == 1
    bench.run(task, retries=9)
    assert len(bench.publisher.published) == 1


@pytest.mark.parametrize(
    ("options", "retries", "seconds"),
    [
        ({"retry_backoff": True}, 0, 1),
        ({"retry_backoff": True}, 5, 32),
        ({"retry_backoff": 3}, 4, 48),
        ({"retry_backoff": 0.2}, 2, 4),
        ({"retry_backoff": 2.9}, 0, 2),
        ({"retry_backoff": True}, 30, 600),
        ({"retry_backoff": True, "retry_backoff_max": 7}, 3, 7),
        ({"retry_backoff": True}, 10**6, 600),
    ],
)
def test_pauses_double_up_to_a_limit(
    options: Any, retries: int, seconds: float, bench: Bench, clock: FakeClock
) -> None:
    task = bench.task(
        failing(OSError()), autoretry_for=(OSError,), max_retries=None, retry_jitter=False,
        **options,
    )  # fmt: skip
    bench.run(task, retries=retries)
    assert bench.publisher.published[0][0].eta == clock.at(seconds)


def test_jitter_takes_any_part_of_the_pause() -> None:
    random.seed(7)
    pauses = {backoff(1, 3, 600, jitter=True) for _ in range(500)}
    assert pauses == set(range(9))
    assert {backoff(1, 30, 2.5, jitter=True) for _ in range(100)} == {0, 1, 2}


# -- eagerly ------------------------------------------------------------------------------


def test_eagerly_a_retry_runs_at_once_under_the_same_id() -> None:
    eager = Bench(make_task_app(TASKER_ALWAYS_EAGER=True))
    seen: list[Any] = []

    def twice(self: Task[..., Any], x: int) -> Any:
        seen.append((self.request.id, self.request.retries, self.request.is_eager, x))
        if self.request.retries < 2:
            raise self.retry(args=(x + 1,), countdown=3600)
        return x

    handle = eager.task(twice, bind=True).delay(1)
    assert handle.get(timeout=0) == 3
    assert seen == [(handle.id, 0, True, 1), (handle.id, 1, True, 2), (handle.id, 2, True, 3)]
    assert eager.publisher.published == []


def test_eagerly_retries_end() -> None:
    eager = Bench(make_task_app(TASKER_ALWAYS_EAGER=True))
    task = eager.task(failing(OSError("down")), autoretry_for=(OSError,), max_retries=3)
    with pytest.raises(OSError, match="down"):
        task.delay().get(timeout=0)


# -- both names of the pause --------------------------------------------------------------


def test_celery_s_name_of_the_pause_is_understood(bench: Bench, clock: FakeClock) -> None:
    bench.run(bench.task(retrying(), bind=True, default_retry_delay=timedelta(0).seconds + 4))
    assert bench.publisher.published[0][0].eta == clock.at(4)
