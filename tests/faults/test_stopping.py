"""Signals to a worker's process, and what waits in the store while no worker lives."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.app_folder import AppFolder
from support.processes import eventually

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")

LAB = """
    from flask_taskworker import signals

    task_worker = BaseTaskWorker(app)

    @task_worker.define_task
    def work(name, seconds=0.0):
        ledger.write("start", name)
        time.sleep(seconds)
        ledger.write("end", name)

    @task_worker.define_task(bind=True)
    def again(self, name, countdown):
        ledger.write(f"run-{self.request.retries}", name)
        if self.request.retries == 0:
            raise self.retry(countdown=countdown)

    @signals.worker_shutting_down.connect
    def ends(sender, sig, how, **details):
        ledger.write("shutting-down", f"{sig}-{how}")
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[AppFolder]:
    lab = AppFolder(tmp_path, LAB)
    yield lab
    lab.close()


def test_the_first_signal_lets_tasks_end(lab: AppFolder) -> None:
    lab.send("work.delay('one', 1)", "work.delay('two')")
    worker = lab.ready_worker("-q", "-c", "1")
    lab.wait_for_steps("start", 1)
    assert worker.stop(signal.SIGINT) == 0
    assert lab.steps("end") == ["one"]
    assert lab.waiting() == 1
    assert lab.steps("shutting-down") == ["INT-Warm"]
    worker.wait_for(r"stops after SIGINT; up to 25 s for lab\.work\[")


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_it_at_once(first: signal.Signals, lab: AppFolder) -> None:
    lab.send("work.delay('long', 60)")
    worker = lab.ready_worker("-q")
    lab.wait_for_steps("start", 1)
    worker.send(first)
    worker.wait_for("stops after")
    assert worker.running
    began = time.monotonic()
    assert worker.stop(signal.SIGINT) == 0
    assert time.monotonic() - began < 10
    worker.wait_for(r"task lab\.work\[.+\] is still running; its message goes back to the queue")
    assert lab.waiting() == 1


def test_quit_ends_it_at_once(lab: AppFolder) -> None:
    lab.send("work.delay('long', 60)")
    worker = lab.ready_worker("-q")
    lab.wait_for_steps("start", 1)
    began = time.monotonic()
    assert worker.stop(signal.SIGQUIT) == 0
    assert time.monotonic() - began < 10
    assert lab.waiting() == 1
    assert lab.steps("shutting-down") == ["QUIT-Cold"]


def test_what_outlasts_the_time_to_drain_goes_back(lab: AppFolder) -> None:
    lab.send("work.delay('long', 60)")
    worker = lab.ready_worker("-q", FLASK_TASKER_DRAIN_TIMEOUT="0.5")
    lab.wait_for_steps("start", 1)
    assert worker.stop(signal.SIGTERM) == 0
    worker.wait_for(r"task lab\.work\[.+\] is still running; its message goes back to the queue")
    assert lab.waiting() == 1


def test_hup_starts_the_same_command_again_with_the_code_of_today(lab: AppFolder) -> None:
    lab.send("work.delay('before', 1)")
    worker = lab.ready_worker("-q", "-n", "same@%h")
    lab.wait_for_steps("start", 1)
    lab.write(LAB.replace('ledger.write("end", name)', 'ledger.write("new-end", name)'))
    worker.send(signal.SIGHUP)
    eventually(
        lambda: sum(" ready, reading " in line for line in worker.lines) == 2, "it is ready again"
    )
    assert worker.running, "under the same process id"
    assert lab.steps("end") == ["before"], "what ran could end"
    lab.send("work.delay('after')")
    assert lab.wait_for_steps("new-end", 1) == ["after"]
    assert worker.stop() == 0
    assert sum("same@" in line and " ready" in line for line in worker.lines) == 2


def test_usr1_shows_where_every_thread_is(lab: AppFolder) -> None:
    lab.send("work.delay('long', 60)")
    worker = lab.ready_worker("-q")
    lab.wait_for_steps("start", 1)
    worker.send(signal.SIGUSR1)
    worker.wait_for(r'lab\.py", line \d+ in work')
    worker.wait_for(r"consumer\.py")
    assert worker.running
    worker.send(signal.SIGQUIT)
    assert worker.wait() == 0


def test_a_worker_that_cannot_reach_its_broker_stops_too(lab: AppFolder) -> None:
    url = "postgresql+psycopg://nobody@127.0.0.1:1/nothing"
    worker = lab.worker("-q", FLASK_TASKER_BROKER_URL=f"taskworker+{url}")
    worker.wait_for("no connection to the broker")
    began = time.monotonic()
    assert worker.stop(signal.SIGTERM) == 0
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("call", ["again.delay('a', 3)", "work.apply_async(['a'], countdown=3)"])
def test_what_waits_for_its_time_survives_the_death_of_its_worker(
    call: str, lab: AppFolder
) -> None:
    first, last = ("run-0", "run-1") if call.startswith("again") else ("sent", "end")
    sent = time.monotonic()
    lab.send(call)
    worker = lab.ready_worker("-q")
    if first == "run-0":
        lab.wait_for_steps(first, 1)
        eventually(
            lambda: (
                lab.query("SELECT owner FROM taskworker_message WHERE due IS NOT NULL") == [(-1,)]
                and lab.query("SELECT count(*) FROM taskworker_message") == [(1,)]
            ),
            "the next message lies in the store, claimed by nobody, and the first is settled",
        )
    worker.kill_all()
    worker.wait()
    other = lab.ready_worker("-q")
    assert lab.wait_for_steps(last, 1) == ["a"]
    assert time.monotonic() - sent >= 3
    assert other.stop() == 0
    assert len(lab.steps(first)) == (first == "run-0")
    assert lab.waiting() == 0
