"""Remote control of a worker whose tasks run in child processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flask_taskworker import AsyncResult, dead_letters, signals, states
from flask_taskworker.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded
from flask_taskworker.worker.pools.source import AppSource
from flask_taskworker.worker.supervisor import Worker
from support.app_folder import AppFolder
from support.monitor import Monitor, assert_form
from support.processes import PATIENCE, eventually
from support.shapes import answer_of, shape

pytestmark = pytest.mark.timeout(120)

APP = """
    from flask_taskworker import signals

    task_worker = BaseTaskWorker(app)

    @task_worker.define_task
    def work(name, seconds=0.0):
        ledger.write("start", name)
        time.sleep(seconds)
        ledger.write("end", name)
        return os.getpid()

    @task_worker.define_task(acks_on_failure_or_timeout=False)
    def matters(name, seconds=0.0):
        ledger.write("start", name)
        time.sleep(seconds)

    @task_worker.define_task
    def is_deaf(name):
        import signal
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        ledger.write("start", name)
        time.sleep(2)
        return "heard nothing"

    def _born(sender, **kwargs):
        ledger.write("born", os.getpid())

    def _gone(sender, pid, exitcode, **kwargs):
        ledger.write("gone", f"{pid}:{exitcode}")

    signals.worker_process_init.connect(_born, weak=False)
    signals.worker_process_shutdown.connect(_gone, weak=False)
"""
BROKERS: dict[str, Callable[[pytest.FixtureRequest], dict[str, str]]] = {
    "sqlite": lambda request: {},
    "redis": lambda request: {
        "FLASK_TASKER_BROKER_URL": request.getfixturevalue("redis_url"),
        "FLASK_TASKER_RESULT_BACKEND": request.getfixturevalue("redis_url"),
    },
}


class Lab(AppFolder):
    """The app in this process, and workers for it whose children load it from the folder."""

    def __init__(self, folder: Path, queue: str) -> None:
        super().__init__(folder, APP)
        self.queue = queue
        self.names = self.load()
        self.task_app = self.names["task_worker"].task_app()

    @contextmanager
    def at_work(self, **options: Any) -> Iterator[Worker]:
        source = AppSource("flask_taskworker.target:from_target", "lab")
        options = {"concurrency": 2, "source": source, "hostname": f"one@{self.queue}"} | options
        worker = Worker(self.task_app, pool="processes", **options)
        thread = threading.Thread(target=worker.run, name="lab-worker")
        thread.start()
        try:
            assert worker.ready.wait(PATIENCE)
            assert worker.remote.ready.wait(PATIENCE)
            self.worker = worker
            yield worker
        finally:
            worker.stop(10)
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def ask(self, command: str, **arguments: Any) -> Any:
        """The worker's answer."""
        node = self.worker.hostname
        (answer,) = (
            self.task_app.control.broadcast(
                command, arguments, destination=[node], reply=True, timeout=PATIENCE
            )
            or ()
        )
        return answer[node]

    def children(self) -> set[int]:
        return set(self.ask("stats")["pool"]["processes"])

    def started(self, name: str, **options: Any) -> AsyncResult[Any]:
        """A task that runs for long."""
        handle = self.work.apply_async((name, 600), **options)
        eventually(lambda: name in self.steps("start"), f"{name} runs")
        return handle

    def __getattr__(self, name: str) -> Any:
        return self.names[name]


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.services)])
def lab(
    request: pytest.FixtureRequest, tmp_path: Path, unique: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Lab]:
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = BROKERS[request.param](request) | {"FLASK_TASKER_DEFAULT_QUEUE": unique}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)  # for this process, and for the children of the pool
    lab = Lab(tmp_path, unique)
    yield lab
    lab.close()


# -- terminating ------------------------------------------------------------------------------


@pytest.mark.parametrize(("signal", "number"), [("SIGTERM", 15), ("KILL", 9), (3, 3)])
def test_a_running_task_is_terminated(lab: Lab, signal: str | int, number: int) -> None:
    told: list[dict[str, Any]] = []
    with lab.at_work(task_events=True) as worker, Monitor(lab.task_app) as monitor:
        with signals.task_revoked.connected_to(lambda sender, **about: told.append(about)):
            before = lab.children()
            handle = lab.started("slow")
            answer = lab.ask("revoke", task_id=handle.id, terminate=True, signal=signal)
            assert answer == {"ok": f"terminate: {handle.id}"}
            event = monitor.wait_for("task-revoked", handle.id)
        assert_form(event)
        assert (event["terminated"], event["signum"], event["expired"]) == (True, number, False)
        eventually(lambda: handle.state == states.REVOKED, "the settlement is written")
        with pytest.raises(TaskRevokedError, match="terminated"):
            handle.get(timeout=PATIENCE)
        (about,) = told
        assert about["request"].id == handle.id
        assert (about["terminated"], about["signum"], about["expired"]) == (True, number, False)
        eventually(lambda: len(lab.children()) == 2 and lab.children() != before, "a new child")
        assert lab.work.delay("after").get(timeout=PATIENCE)
        eventually(lambda: not worker.consumer.unsettled(), "all is settled")
    assert lab.ledger.count("start")["slow"] == 1
    lab.burst()
    assert lab.ledger.count("start")["slow"] == 1, "its message is gone"


def test_a_result_handle_terminates_its_task_and_no_other(lab: Lab) -> None:
    with lab.at_work():
        handle, other = lab.started("mine"), lab.work.delay("other", 2)
        eventually(lambda: "other" in lab.steps("start"), "the other runs")
        answer = handle.revoke(terminate=True, reply=True, timeout=PATIENCE, limit=1)
        assert answer == [{lab.worker.hostname: {"ok": f"terminate: {handle.id}"}}]
        with pytest.raises(TaskRevokedError):
            handle.get(timeout=PATIENCE)
        assert other.get(timeout=PATIENCE)


def test_a_task_that_waits_is_revoked_and_does_not_start(lab: Lab) -> None:
    with lab.at_work(concurrency=1):
        running = lab.started("first")
        waiting = lab.work.apply_async(("second",))
        lab.ask("revoke", task_id=[waiting.id, running.id], terminate=True)
        for handle in (running, waiting):
            with pytest.raises(TaskRevokedError):
                handle.get(timeout=PATIENCE)
        assert lab.work.delay("after").get(timeout=PATIENCE)
    assert lab.steps("start") == ["first", "after"]


def test_a_signal_that_a_task_ignores_changes_nothing(lab: Lab) -> None:
    with lab.at_work(task_events=True), Monitor(lab.task_app) as monitor:
        handle = lab.is_deaf.delay("deaf")
        lab.wait_for_steps("start", 1)
        lab.ask("terminate", signal="USR2", task_id=handle.id)
        monitor.wait_for("task-succeeded", handle.id)
        eventually(lambda: handle.state == states.SUCCESS, "it ends as usual")
        limited = lab.is_deaf.apply_async(("again",), time_limit=1)
        lab.wait_for_steps("start", 2)
        lab.ask("terminate", signal="USR2", task_id=limited.id)
        monitor.wait_for("task-failed", limited.id)
        with pytest.raises(TimeLimitExceeded):
            eventually(lambda: limited.state == states.FAILURE, "its limit holds")
            limited.get(timeout=PATIENCE)


# -- limits -----------------------------------------------------------------------------------


def test_time_limits_are_set(lab: Lab) -> None:
    with lab.at_work():
        name = lab.work.name
        answer = lab.ask("time_limit", task_name=name, soft=0.5, hard=60)
        assert answer == answer_of("time_limit")
        with pytest.raises(SoftTimeLimitExceeded):
            lab.work.delay("soft", 600).get(timeout=PATIENCE)
        lab.ask("time_limit", task_name=name, hard=0.5)
        with pytest.raises(TimeLimitExceeded):
            lab.work.delay("hard", 600).get(timeout=PATIENCE)
        lab.ask("time_limit", task_name=name)
        assert lab.work.delay("none", 0.8).get(timeout=PATIENCE)


def test_a_task_whose_failure_is_not_acknowledged_is_kept_when_its_time_is_over(lab: Lab) -> None:
    with lab.at_work():
        handle = lab.matters.apply_async(("slow", 600), time_limit=0.5)
        with pytest.raises(TimeLimitExceeded):
            handle.get(timeout=PATIENCE)
        (dead,) = eventually(
            lambda: dead_letters.listing(lab.task_app, lab.queue), "its message is kept"
        )
        assert dead.task_id == handle.id


# -- the pool ---------------------------------------------------------------------------------


def test_stats_show_the_children_as_celery_does(lab: Lab) -> None:
    with lab.at_work(time_limit=60, soft_time_limit=30, max_tasks_per_child=50):
        eventually(lambda: len(lab.children()) == 2, "two children")
        pid = lab.work.delay("one").get(timeout=PATIENCE)
        pool = lab.ask("stats")["pool"]
        assert shape(pool) | {"max-tasks-per-child": "str"} == shape(answer_of("stats")["pool"])
        assert pid in pool["processes"]
        assert (pool["max-concurrency"], pool["max-tasks-per-child"]) == (2, 50)
        assert pool["timeouts"] == [30, 60]
        assert pool["writes"]["total"] == 1


def test_the_pool_grows_shrinks_and_restarts(lab: Lab) -> None:
    with lab.at_work():
        assert lab.ask("pool_grow", n=2) == answer_of("pool_grow")
        eventually(lambda: len(lab.children()) == 4, "four children")
        assert lab.ask("pool_shrink", n=3) == answer_of("pool_shrink")
        eventually(lambda: len(lab.children()) == 1, "one child")
        before = lab.children()
        assert lab.ask("pool_restart") == {"ok": "reload started"}
        eventually(lambda: lab.children() and not lab.children() & before, "another child")
        assert lab.work.delay("after").get(timeout=PATIENCE) in lab.children()


def test_the_bounds_of_autoscale_are_set(lab: Lab) -> None:
    with lab.at_work(autoscale=(2, 1)):
        assert lab.ask("stats")["autoscaler"] == {"max": 2, "min": 1, "current": 1, "qty": 0}
        refused = lab.ask("pool_grow")
        assert refused["error"].startswith("pool_grow is not supported with autoscale")
        assert lab.ask("autoscale", max=4, min=3) == {"ok": "autoscale now max=4 min=3"}
        eventually(lambda: len(lab.children()) == 3, "three children")
        handles = [lab.work.delay(f"w{n}", 1) for n in range(8)]
        eventually(lambda: len(lab.children()) == 4, "four children")
        assert all(handle.get(timeout=PATIENCE) for handle in handles)


def test_children_tell_of_their_birth_and_their_end(lab: Lab) -> None:
    with lab.at_work(max_tasks_per_child=1, concurrency=1):
        first = lab.work.delay("one").get(timeout=PATIENCE)
        eventually(lambda: f"{first}:0" in lab.steps("gone"), "the first has gone")
        assert str(first) in lab.steps("born")
