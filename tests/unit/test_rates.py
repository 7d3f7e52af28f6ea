"""How many runs may start in a time."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from flask_taskworker.worker.rates import AWAY, RateLimits
from support import Bench, FakeClock, make_app, make_task_app, run_worker, wait_until


@pytest.fixture
def rates(bench: Bench) -> RateLimits:
    for name, rate in {"ten": "10/s", "minute": "6/m", "rare": "1/h", "free": None}.items():
        bench.task(lambda: 1, name=name, rate_limit=rate)
    return RateLimits(bench.task_app)


def test_runs_start_evenly_and_never_in_a_burst(rates: RateLimits, clock: FakeClock) -> None:
    assert [rates.reserve("ten") for _ in range(4)] == pytest.approx([0, 0.1, 0.2, 0.3])
    clock.advance(100)  # what was not used is not saved
    assert [rates.reserve("ten") for _ in range(2)] == pytest.approx([0, 0.1])
    assert [rates.reserve("minute") for _ in range(2)] == pytest.approx([0, 10])


def test_tasks_without_a_limit_never_wait(rates: RateLimits, clock: FakeClock) -> None:
    assert {rates.reserve(name) for name in ("free", "free", "unknown", "unknown")} == {0}


def test_no_token_is_taken_that_is_too_far_away(rates: RateLimits, clock: FakeClock) -> None:
    taken = [rates.reserve("ten", at_most=0.25) for _ in range(6)]
    assert taken[:3] == pytest.approx([0, 0.1, 0.2])
    assert taken[3:] == [None, None, None]
    clock.advance(0.1)
    assert rates.reserve("ten", at_most=0.25) == pytest.approx(0.2)


def test_however_rare_one_run_waits(rates: RateLimits, clock: FakeClock) -> None:
    assert rates.reserve("rare", at_most=2) == 0
    assert rates.reserve("rare", at_most=2) == pytest.approx(3600)
    assert rates.reserve("rare", at_most=2) is None


def test_what_is_sent_away_comes_back_one_by_one(rates: RateLimits, clock: FakeClock) -> None:
    while rates.reserve("ten", at_most=1) is not None:
        pass
    backs = [rates.send_away("ten") for _ in range(3)]
    assert backs == pytest.approx([backs[0], backs[0] + 0.1, backs[0] + 0.2])
    assert {rates.send_away("rare") for _ in range(3)} == {AWAY}


def test_a_limit_may_be_changed_and_lifted(rates: RateLimits, clock: FakeClock) -> None:
    rates.reserve("rare")
    rates.set("rare", "2/s")
    assert [rates.reserve("rare") for _ in range(2)] == pytest.approx([0, 0.5])
    rates.set("rare", None)
    assert [rates.reserve("rare") for _ in range(2)] == [0, 0]
    rates.set("free", 1)
    assert [rates.reserve("free") for _ in range(2)] == pytest.approx([0, 1])
    assert rates.version == 3
    with pytest.raises(ValueError, match="fast"):
        rates.set("ten", "fast")


def test_the_app_may_limit_every_task(clock: FakeClock) -> None:
    bench = Bench(make_task_app(TASKER_RATE_LIMIT="1/s"))
    bench.task(lambda: 1, name="plain")
    bench.task(lambda: 1, name="free", rate_limit=None)
    rates = RateLimits(bench.task_app)
    assert [rates.reserve("plain") for _ in range(2)] == pytest.approx([0, 1])
    assert [rates.reserve("free") for _ in range(2)] == [0, 0]


# -- in a worker --------------------------------------------------------------------------


def settings(broker: str, tmp_path: Any) -> dict[str, Any]:
    return {} if broker == "memory" else {"TASKER_ENGINE": "sqlalchemy"}


@pytest.mark.parametrize("broker", ["memory", "sqlite"])
def test_what_has_to_wait_holds_up_nobody(broker: str, tmp_path: Any) -> None:
    from flask_taskworker import BaseTaskWorker

    app = make_app(**settings(broker, tmp_path))
    app.instance_path = str(tmp_path)
    task_worker = BaseTaskWorker(app)
    task_app = task_worker.task_app()
    slow: list[int] = []
    done = threading.Event()

    @task_worker.define_task(name="slow", rate_limit="1/h")
    def limited(n: int) -> None:
        slow.append(n)

    @task_worker.define_task(name="free")
    def free() -> None:
        done.set()

    for n in range(50):
        limited.delay(n)
    free.delay()
    with run_worker(task_app) as worker:
        assert done.wait(8)
        wait_until(lambda: slow == [0], "the first one runs")
        held = worker.consumer.held()
        if broker == "sqlite":
            assert len(held) <= 1, "the others are in the store"
        worker.rates.set("slow", None)
        if broker == "memory":
            wait_until(lambda: sorted(slow) == list(range(50)), "all run once the limit is lifted")
