"""Time limits: which hold, and how they end a run in a thread or on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import Any

import pytest

from flask_taskworker.exceptions import (
    ConfigurationError,
    InvalidOptionError,
    SoftTimeLimitExceeded,
    TimeLimitExceeded,
)
from flask_taskworker.worker.limits import ThreadAlarm, TimeLimits, limited, refuse_hard_limits
from support import deliver, make_task_app


def job() -> None:
    pass


async def coroutine() -> None:
    pass


def test_the_limits_of_a_call_come_before_those_of_the_task_and_of_the_settings() -> None:
    room = make_task_app(TASKER_TASK_TIME_LIMIT=30, TASKER_TASK_SOFT_TIME_LIMIT=20)
    limits = TimeLimits(room.task_app)
    plain = room.task_worker.define_task(job)
    assert limits.of(deliver(plain).message) == (30, 20)
    own = room.task_worker.define_task(name="own", time_limit=9, soft_time_limit=8)(job)
    assert limits.of(deliver(own).message) == (9, 8)
    assert limits.of(deliver(own, timelimit=(5, 4)).message) == (5, 4)
    limits.set("own", 7, 6)
    assert limits.of(deliver(own).message) == (7, 6)
    assert limits.of(deliver(own, timelimit=(5, None)).message) == (5, None), "6 is never reached"
    limits.set("own", None, None)
    assert limits.of(deliver(own).message) == (None, None)
    assert limits.of(deliver("unknown").message) == (30, 20)


def test_a_task_without_a_limit_of_the_settings_says_so_with_none() -> None:
    room = make_task_app(TASKER_TASK_TIME_LIMIT=30)
    free = room.task_worker.define_task(time_limit=None)(job)
    assert TimeLimits(room.task_app).of(deliver(free).message) == (None, None)


def test_the_limits_of_a_call_travel_in_the_message() -> None:
    room = make_task_app()
    task = room.task_worker.define_task(job)
    task.apply_async(time_limit=5, soft_time_limit=4)
    ((message, _),) = room.publisher.published
    assert message.timelimit == (5, 4)


@pytest.mark.parametrize("options", [{}, {"soft_time_limit": 9}])
def test_a_soft_limit_after_the_hard_one_is_refused_at_the_call(options: Any) -> None:
    room = make_task_app()
    task = room.task_worker.define_task(**options)(job)
    call = {"time_limit": 5} if options else {"time_limit": 5, "soft_time_limit": 6}
    with pytest.raises(InvalidOptionError, match="must not be longer than time_limit=5"):
        task.apply_async(**call)
    assert room.publisher.published == []


def test_a_soft_limit_after_the_hard_one_is_refused_where_it_is_defined() -> None:
    room = make_task_app()
    with pytest.raises(InvalidOptionError, match=r"define_task\(soft_time_limit=2\)"):
        room.task_worker.define_task(time_limit=1, soft_time_limit=2)(job)
    with pytest.raises(ConfigurationError, match="TASKER_TASK_SOFT_TIME_LIMIT"):
        make_task_app(TASKER_TASK_TIME_LIMIT=1, TASKER_TASK_SOFT_TIME_LIMIT=2)


def test_a_hard_limit_is_refused_where_nobody_can_keep_it() -> None:
    room = make_task_app()
    room.task_worker.define_task(name="awaited", time_limit=5)(coroutine)
    room.task_worker.define_task(name="elsewhere", queue="other", time_limit=5)(job)
    queues = [room.task_app.config.default_queue]
    limits = TimeLimits(room.task_app)
    refuse_hard_limits(room.task_app, queues, "threads", limits)
    room.task_worker.define_task(name="blocking", time_limit=5)(job)
    with pytest.raises(ConfigurationError, match=r"'blocking' has time_limit=5.*-P processes"):
        refuse_hard_limits(room.task_app, queues, "threads", limits)
    with pytest.raises(ConfigurationError, match=r"5 s for all tasks.*TASKER_TASK_TIME_LIMIT"):
        refuse_hard_limits(room.task_app, [], "solo", TimeLimits(room.task_app, hard=5))


# -- in a thread ------------------------------------------------------------------------------


def spin(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pass


def test_the_limit_is_raised_inside_the_run() -> None:
    caught = []
    with ThreadAlarm()(0.05):
        try:
            spin(5)
        except SoftTimeLimitExceeded as exc:
            caught.append(exc)
    assert len(caught) == 1


def test_a_run_that_is_done_in_time_is_not_hit_later() -> None:
    alarm = ThreadAlarm()
    with alarm(0.05):
        pass
    spin(0.15)
    with alarm(None):
        spin(0.01)


def test_no_run_is_hit_by_the_limit_of_another() -> None:
    """Runs that end just when their time is over: each is hit inside its block or never."""
    alarm, hits = ThreadAlarm(), []

    def work() -> None:
        for _ in range(60):
            try:
                with alarm(0.002):
                    spin(0.002)
            except SoftTimeLimitExceeded:
                hits.append(1)
            spin(0.0005)  # here nobody may be hit

    threads = [threading.Thread(target=work) for _ in range(2)]
    failures: list[Any] = []
    hook, threading.excepthook = threading.excepthook, failures.append
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = hook
    assert failures == []


# -- on an event loop -------------------------------------------------------------------------


def test_a_coroutine_sees_its_soft_limit_where_it_waits_and_may_go_on() -> None:
    async def patient() -> str:
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded:
            await asyncio.sleep(0)
            return "cleaned up"
        return "not hit"

    assert asyncio.run(limited(patient(), (None, 0.02))) == "cleaned up"


def test_a_coroutine_that_lets_go_fails_with_its_soft_limit() -> None:
    with pytest.raises(SoftTimeLimitExceeded):
        asyncio.run(limited(asyncio.sleep(60), (30, 0.02)))


def test_a_coroutine_is_cancelled_at_its_hard_limit() -> None:
    seen = []

    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("cancelled")

    with pytest.raises(TimeLimitExceeded) as caught:
        asyncio.run(limited(stubborn(), (0.02, None)))
    assert caught.value.args == (0.02,)
    assert seen == ["cancelled"]


def test_a_coroutine_that_ignores_its_hard_limit_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flask_taskworker.worker.limits.GRACE", 0.05)

    async def deaf() -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

    with pytest.raises(TimeLimitExceeded):
        asyncio.run(limited(deaf(), (0.02, None)))


def test_a_coroutine_in_time_returns_and_raises_as_it_likes() -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise LookupError("own")

    assert asyncio.run(limited(asyncio.sleep(0, "value"), (5, 4))) == "value"
    with pytest.raises(LookupError, match="own"):
        asyncio.run(limited(fails(), (5, 4)))
