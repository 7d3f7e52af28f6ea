"""The pool of child processes in a worker of this process: limits, orders from outside, sizes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flask_taskworker.exceptions import (
    ConfigurationError,
    SoftTimeLimitExceeded,
    TaskRevokedError,
    TimeLimitExceeded,
)
from flask_taskworker.worker.delivery import Delivery, Outcome
from flask_taskworker.worker.pools.processes import ProcessPool
from flask_taskworker.worker.pools.source import AppSource
from flask_taskworker.worker.supervisor import Worker
from support.app_folder import AppFolder
from support.processes import PATIENCE, eventually

pytestmark = pytest.mark.timeout(120)

APP = """
    import asyncio, hashlib

    task_worker = BaseTaskWorker(app)
    define = task_worker.define_task

    @define(bind=True)
    def work(self, name, seconds=0.0):
        ledger.write("start", name)
        time.sleep(seconds)
        ledger.write("end", name)
        return [os.getpid(), self.request.hostname, self.request.delivery_info["routing_key"]]

    @define
    def cleans_up():
        try:
            time.sleep(600)
        except SoftTimeLimitExceeded:
            return "cleaned up"

    @define
    def is_deaf():
        while True:
            try:
                time.sleep(600)
            except BaseException:
                pass

    @define
    def holds_the_interpreter():
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10)
        sum(range(10**11))

    @define
    async def sleeps():
        try:
            await asyncio.sleep(600)
        except SoftTimeLimitExceeded:
            return "cleaned up"

    @define
    def large(text):
        return len(text)

    @define(acks_late=False)
    def early(name, seconds=0.0):
        ledger.write("start", name)
        time.sleep(seconds)
        ledger.write("end", name)
"""


class Lab(AppFolder):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, APP)
        self.names = self.load()
        self.task_app = self.names["task_worker"].task_app()

    @contextmanager
    def in_worker(self, **options: Any) -> Iterator[ProcessPool]:
        """A worker with child processes in this process; gives its pool."""
        source = AppSource("flask_taskworker.target:from_target", "lab")
        options = {"concurrency": 2, "source": source, **options}
        worker = Worker(self.task_app, pool="processes", **options)
        thread = threading.Thread(target=worker.run, name="lab-worker")
        thread.start()
        try:
            assert worker.ready.wait(PATIENCE)
            self.worker = worker
            pool = worker.pool
            assert isinstance(pool, ProcessPool)
            yield pool
        finally:
            worker.stop(10)
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def __getattr__(self, name: str) -> Any:
        return self.names[name]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.syspath_prepend(str(tmp_path))
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def pids(pool: ProcessPool) -> set[int]:
    return set(pool.info()["processes"])


def test_a_run_sees_what_it_sees_in_any_pool(lab: Lab) -> None:
    with lab.in_worker(hostname="here@%h") as pool:
        pid, hostname, queue = lab.work.delay("a").get(timeout=PATIENCE)
        assert pid in pids(pool)
        assert hostname == lab.worker.hostname
        assert queue == "celery"


def test_a_message_of_many_megabytes_comes_whole(lab: Lab) -> None:
    with lab.in_worker():
        handles = [lab.large.delay("x" * size) for size in (5_000_000, 3, 2_000_000)]
        assert [handle.get(timeout=PATIENCE) for handle in handles] == [5_000_000, 3, 2_000_000]


# -- limits -----------------------------------------------------------------------------------


def test_a_soft_limit_reaches_a_task_that_blocks(lab: Lab) -> None:
    with lab.in_worker():
        handle = lab.cleans_up.apply_async(soft_time_limit=0.3)
        assert handle.get(timeout=PATIENCE) == "cleaned up"
        with pytest.raises(SoftTimeLimitExceeded):
            lab.work.apply_async(["slow", 600], soft_time_limit=0.3).get(timeout=PATIENCE)
        assert lab.sleeps.apply_async(soft_time_limit=0.3).get(timeout=PATIENCE) == "cleaned up"


@pytest.mark.parametrize("call", ["work", "is_deaf", "holds_the_interpreter", "sleeps"])
def test_a_hard_limit_ends_whatever_runs(lab: Lab, call: str) -> None:
    with lab.in_worker() as pool:
        lab.work.delay("warm").get(timeout=PATIENCE)
        before = pids(pool)
        arguments = ["slow", 600] if call == "work" else []
        handle = getattr(lab, call).apply_async(arguments, time_limit=1, soft_time_limit=0.5)
        if call == "sleeps":
            assert handle.get(timeout=PATIENCE) == "cleaned up"
            return
        with pytest.raises((TimeLimitExceeded, SoftTimeLimitExceeded)) as caught:
            handle.get(timeout=PATIENCE)
        assert isinstance(
            caught.value, SoftTimeLimitExceeded if call == "work" else TimeLimitExceeded
        )
        if call != "work":
            eventually(lambda: len(pids(pool)) == 2 and pids(pool) != before, "it is replaced")
        assert lab.work.delay("after").get(timeout=PATIENCE)


def test_limits_set_at_run_time_hold_from_then_on(lab: Lab) -> None:
    with lab.in_worker():
        lab.worker.consumer.limits.set("lab.work", 0.5, None)
        with pytest.raises(TimeLimitExceeded):
            lab.work.delay("slow", 600).get(timeout=PATIENCE)


def test_many_limits_in_a_row_hurt_nobody_else(lab: Lab) -> None:
    with lab.in_worker() as pool:
        short = [lab.work.apply_async([f"w{n}", 600], time_limit=0.1) for n in range(8)]
        good = [lab.work.delay(f"g{n}", 0.01) for n in range(20)]
        for handle in short:
            with pytest.raises(TimeLimitExceeded):
                handle.get(timeout=PATIENCE)
        assert all(handle.get(timeout=PATIENCE) for handle in good)
        assert max(lab.ledger.count("start").values()) == 1, "none ran twice"
        eventually(lambda: len(pids(pool)) == 2, "all slots are there")


# -- orders -----------------------------------------------------------------------------------


def test_a_run_can_be_terminated(lab: Lab) -> None:
    with lab.in_worker() as pool:
        handle = lab.work.delay("slow", 600)
        lab.wait_for_steps("start", 1)
        assert pool.terminate("another", signal.SIGTERM) is False
        assert pool.terminate(handle.id, signal.SIGTERM) is True
        with pytest.raises(TaskRevokedError, match="terminated"):
            handle.get(timeout=PATIENCE)
        assert lab.work.delay("after").get(timeout=PATIENCE)


def test_sigusr1_is_the_soft_limit_by_hand(lab: Lab) -> None:
    with lab.in_worker() as pool:
        handle = lab.work.delay("slow", 600)
        lab.wait_for_steps("start", 1)
        assert pool.terminate(handle.id, signal.SIGUSR1)
        with pytest.raises(SoftTimeLimitExceeded):
            handle.get(timeout=PATIENCE)


def test_the_size_follows_orders(lab: Lab) -> None:
    with lab.in_worker() as pool:
        eventually(lambda: len(pids(pool)) == 2, "two children")
        pool.grow(2)
        eventually(lambda: len(pids(pool)) == 4, "four children")
        handles = [lab.work.delay(f"w{n}", 0.5) for n in range(4)]
        eventually(lambda: len(pool.running()) == 4, "four at once")
        pool.shrink(3)
        assert all(handle.get(timeout=PATIENCE) for handle in handles), "what runs ends as usual"
        eventually(lambda: len(pids(pool)) == 1, "one child")
        assert pool.size == 1


def test_a_restart_loads_the_app_anew_and_ends_no_run(lab: Lab) -> None:
    with lab.in_worker() as pool:
        handle = lab.work.delay("slow", 1)
        lab.wait_for_steps("start", 1)
        before = pids(pool)
        pool.restart()
        pid, *_ = handle.get(timeout=PATIENCE)
        assert pid in before
        pid, *_ = lab.work.delay("after").get(timeout=PATIENCE)
        assert pid not in before
        eventually(lambda: len(pids(pool)) == 2 and not pids(pool) & before, "all are new")


def test_autoscale_grows_with_the_work(lab: Lab) -> None:
    with lab.in_worker(autoscale=(3, 1)) as pool:
        assert pool.size == 1
        handles = [lab.work.delay(f"w{n}", 0.5) for n in range(9)]
        eventually(lambda: len(pool.running()) == 3, "three at once")
        assert all(handle.get(timeout=PATIENCE) for handle in handles)


def test_nothing_short_waits_behind_something_long(lab: Lab) -> None:
    with lab.in_worker():
        for n in range(40):  # many are given ahead from now on
            lab.work.delay(f"warm{n}")
        lab.wait_for_steps("end", 40)
        long = lab.work.delay("long", 3)
        short = [lab.work.delay(f"s{n}") for n in range(40)]
        assert all(handle.get(timeout=PATIENCE) for handle in short)
        assert not long.ready()
        long.get(timeout=PATIENCE)


def test_a_task_acknowledged_before_its_run_never_runs_twice(lab: Lab) -> None:
    with lab.in_worker() as pool:
        handle = lab.early.delay("once", 600)
        lab.wait_for_steps("start", 1)
        (running,) = eventually(pool.running, "it runs")
        assert running.pid is not None
        os.kill(running.pid, signal.SIGKILL)
        with pytest.raises(Exception, match="Worker exited prematurely: signal 9"):
            handle.get(timeout=PATIENCE)
    assert lab.ledger.count("start")["once"] == 1


class Watcher:
    """Follows everything."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def received(self, delivery: Delivery) -> None:
        delivery.watched = True

    def started(self, delivery: Delivery) -> None:
        self.seen.append(("started", delivery.pid))

    def ended(self, delivery: Delivery, outcome: Outcome) -> None:
        self.seen.append(("ended", outcome.shown))


def test_who_watches_is_told_of_starts_and_ends(lab: Lab) -> None:
    with lab.in_worker() as pool:
        watcher = Watcher()
        lab.worker.consumer._observer = watcher
        began = time.time()
        lab.work.delay("a", 0.3)
        eventually(lambda: watcher.seen, "it started")
        assert watcher.seen[0] == ("started", pool.running()[0].pid)
        assert began - 1 < (pool.running()[0].started or 0) < time.time() + 1
        eventually(lambda: len(watcher.seen) == 2, "it ended")
        assert watcher.seen[1][1].startswith("[")


# -- which app --------------------------------------------------------------------------------


def test_a_worker_that_does_not_know_where_its_app_is_says_so(lab: Lab) -> None:
    with pytest.raises(ConfigurationError, match="TASKER_APP"):
        Worker(lab.task_app, pool="processes")


def test_children_can_be_new_interpreters(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flask_taskworker.worker.pools.MUST_SPAWN", True)
    with lab.in_worker() as pool:
        pid, *_ = lab.work.delay("a").get(timeout=PATIENCE)
        assert pid in pids(pool)
        handle = lab.work.apply_async(["slow", 600], time_limit=0.5)
        with pytest.raises(TimeLimitExceeded):
            handle.get(timeout=PATIENCE)


def test_what_comes_after_a_run_comes_after_one_that_was_ended_too(lab: Lab) -> None:
    """The body of its message, which names what comes next, was read by the child alone."""
    with lab.in_worker():
        chained = lab.work.s("slow", 600).set(time_limit=0.5) | lab.work.si("next")
        handle = chained.delay()
        with pytest.raises(TimeLimitExceeded):
            handle.parent.get(timeout=PATIENCE)
        with pytest.raises(Exception):  # noqa: B017, PT011 - the rest of the chain fails with it
            handle.get(timeout=PATIENCE)
        good = lab.work.si("one") | lab.work.si("two")
        assert good.delay().get(timeout=PATIENCE)[1] == lab.worker.hostname
