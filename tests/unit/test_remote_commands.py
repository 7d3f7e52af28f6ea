"""The commands of remote control, asked of a worker in this process, against Celery's answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from flask_taskworker import BaseTaskWorker
from flask_taskworker.worker.questions import COMMANDS
from flask_taskworker.worker.supervisor import Worker
from support.apps import make_app, run_worker
from support.shapes import answer_of, shape
from support.waiting import wait_until


class Staff:
    """A worker with two slots, and a task that waits for the gate."""

    def __init__(self, task_worker: BaseTaskWorker) -> None:
        self.gate = threading.Event()
        self.ran: list[Any] = []
        self.worker: Worker

        @task_worker.define_task(name="wait")
        def wait(value: int = 0) -> int:
            assert self.gate.wait(10)
            self.ran.append(value)
            return value

        @task_worker.define_task(name="limited", queue="mail", max_retries=5)
        def limited() -> None: ...

        self.wait, self.limited = wait, limited
        self.control = task_worker.control

    def ask(self, name: str, **arguments: Any) -> Any:
        return COMMANDS[name].handler(self.worker.state, **arguments)

    def busy(self) -> list[str]:
        """The ids of tasks in both slots, and of one that waits for its time."""
        later = self.wait.apply_async((3,), countdown=1000)
        wait_until(lambda: len(self.worker.state.scheduled()) == 1, "a scheduled task")
        running = [self.wait.delay(i) for i in range(2)]
        wait_until(lambda: len(self.worker.state.active()) == 2, "two running tasks")
        return [*(result.id for result in running), later.id]


@pytest.fixture
def staff() -> Iterator[Staff]:
    app = make_app(TASKER_MAX_RETRIES=3)
    task_worker = BaseTaskWorker(app)
    staff = Staff(task_worker)
    with run_worker(task_worker.task_app()) as worker:
        staff.worker = worker
        try:
            yield staff
        finally:
            staff.gate.set()


def test_what_is_asked_about_tasks_has_celerys_form(staff: Staff) -> None:
    first, _, later = staff.busy()
    active = staff.ask("active")
    assert shape(active) == shape(answer_of("active"))
    assert {item["id"] for item in active} >= {first}
    assert shape(staff.ask("active", safe=True)) == shape(answer_of("active_safe"))
    assert staff.ask("active", safe=True)[0]["args"] in ("(0,)", "(1,)")
    scheduled = staff.ask("scheduled")
    assert shape(scheduled) == shape(answer_of("scheduled"))
    assert [item["request"]["id"] for item in scheduled] == [later]
    found = staff.ask("query_task", ids=[first, later, "unknown"])
    assert {task_id: word for task_id, (word, _) in found.items()} == {
        first: "active",
        later: "scheduled",
    }
    assert shape(found[first][1]) == shape(next(iter(answer_of("query_task").values()))[1])


def test_a_worker_at_rest_holds_nothing(staff: Staff) -> None:
    assert [staff.ask(name) for name in ("active", "reserved", "scheduled", "revoked")] == [[]] * 4
    assert staff.ask("query_task", ids="unknown") == {}


def test_stats_have_celerys_form(staff: Staff) -> None:
    staff.busy()
    ours, celerys = shape(staff.ask("stats")), shape(answer_of("stats"))
    assert ours.keys() == celerys.keys()
    for name in ("clock", "pid", "uptime", "prefetch_count", "rusage"):
        assert ours[name] == celerys[name], name
    assert ours["broker"].keys() == celerys["broker"].keys()
    assert ours["pool"].keys() >= {"implementation", "max-concurrency", "processes"}
    assert staff.ask("stats")["total"] == {"wait": 2}
    assert staff.ask("stats")["pool"]["max-concurrency"] == 2


def test_registered_tasks_are_named_with_their_options(staff: Staff) -> None:
    assert staff.ask("registered") == ["limited [routing_key=mail]", "wait"]
    assert staff.ask("registered", taskinfoitems=["max_retries"]) == [
        "limited [max_retries=5]",
        "wait [max_retries=3]",
    ]
    assert staff.ask("rate_limit", task_name="wait", rate_limit="10/m") == answer_of("rate_limit")
    assert "wait [rate_limit=10/m]" in staff.ask("registered")


def test_an_invalid_rate_or_an_unknown_task_is_refused(staff: Staff) -> None:
    with pytest.raises(KeyError, match="y"):
        staff.ask("rate_limit", task_name="wait", rate_limit="x/y")
    assert staff.ask("rate_limit", task_name="nope", rate_limit="1/s") == answer_of(
        "rate_limit_unknown"
    )
    assert "error" in staff.ask("rate_limit", task_name="wait", rate_limit="fast")
    assert staff.ask("time_limit", task_name="nope", soft=1.0) == {"error": "unknown task"}
    assert staff.ask("rate_limit", task_name="wait", rate_limit=0) == {
        "ok": "rate limit disabled successfully"
    }


def test_queues_are_described_as_by_celery_and_can_be_changed(staff: Staff) -> None:
    assert shape(staff.ask("active_queues")) == shape(answer_of("active_queues"))

    def names() -> set[str]:
        return {queue["name"] for queue in staff.ask("active_queues")}

    before = names()
    assert staff.ask("add_consumer", queue="extra") == answer_of("add_consumer")
    wait_until(lambda: names() == before | {"extra"}, "the new queue")
    result = staff.wait.apply_async((7,), queue="extra")
    staff.gate.set()
    assert result.get(timeout=10) == 7
    assert staff.ask("cancel_consumer", queue="extra") == answer_of("cancel_consumer")
    wait_until(lambda: names() == before, "the queue is not read any more")


def test_a_queue_behind_an_exchange_of_its_own_can_be_added(staff: Staff) -> None:
    staff.ask("add_consumer", queue="q2", exchange="ex", exchange_type="topic", routing_key="a.#")
    wait_until(lambda: len(staff.ask("active_queues")) == 3, "the new queue")
    queue = staff.ask("active_queues")[2]
    assert (queue["exchange"]["name"], queue["exchange"]["type"]) == ("ex", "topic")
    assert queue["routing_key"] == "a.#"


def test_a_paused_queue_is_not_read_until_it_is_resumed(staff: Staff) -> None:
    queue = staff.worker.queues[0]
    staff.gate.set()
    assert staff.ask("pause_queue", queue=queue) == {"ok": f"queue {queue} paused"}
    wait_until(lambda: len(staff.ask("active_queues")) == 1, "the queue rests")
    result = staff.wait.delay(5)
    staff.ask("resume_queue", queue=queue)
    assert result.get(timeout=10) == 5


def test_the_pool_grows_and_shrinks(staff: Staff) -> None:
    assert staff.ask("pool_grow", n=2) == answer_of("pool_grow")
    assert staff.worker.pool.size == 4
    assert staff.ask("pool_shrink", n=3) == answer_of("pool_shrink")
    assert staff.worker.pool.size == 1
    with pytest.raises(ValueError, match="a number of 0 to 10000"):
        staff.ask("pool_grow", n=10**9)


def test_threads_keep_soft_time_limits_alone(staff: Staff) -> None:
    assert staff.ask("time_limit", task_name="wait", soft=60.0) == answer_of("time_limit")
    assert staff.worker.limits._of_task("wait") == (None, 60.0)
    with pytest.raises(NotImplementedError, match="use -P processes"):
        staff.ask("time_limit", task_name="wait", soft=60.0, hard=120.0)


def test_what_is_not_switched_on_says_so_in_celerys_words(staff: Staff) -> None:
    with pytest.raises(ValueError, match="Autoscale not enabled") as autoscale:
        staff.ask("autoscale", max=4, min=2)
    assert {"error": repr(autoscale.value)} == answer_of("autoscale_not_enabled")
    with pytest.raises(ValueError, match="Pool restarts not enabled") as restart:
        staff.ask("pool_restart")
    assert {"error": repr(restart.value)} == answer_of("pool_restart_not_enabled")


def test_events_are_switched_on_and_off(staff: Staff) -> None:
    assert staff.ask("enable_events") == answer_of("enable_events")
    assert staff.ask("enable_events") == answer_of("enable_events_again")
    assert staff.ask("disable_events") == answer_of("disable_events")
    assert staff.ask("disable_events") == answer_of("disable_events_again")


def test_events_that_were_switched_on_for_good_stay_on(staff: Staff) -> None:
    staff.worker.state.events.always = staff.worker.state.events.tasks = True
    assert staff.ask("enable_events") == answer_of("enable_events_again")
    assert staff.ask("disable_events") == answer_of("disable_events_again")
    assert staff.worker.state.events.tasks


def test_a_revoked_task_does_not_run_wherever_it_waits(staff: Staff) -> None:
    first, second, later = staff.busy()
    assert staff.ask("revoke", task_id=later) == {"ok": f"tasks {{{later!r}}} flagged as revoked"}
    wait_until(lambda: staff.ask("scheduled") == [], "the scheduled task is gone")
    staff.control.revoke("known-before")  # before it is sent
    wait_until(lambda: "known-before" in staff.ask("revoked"), "the worker knows of it")
    staff.wait.apply_async((9,), task_id="known-before")
    staff.gate.set()
    wait_until(lambda: staff.worker.state.totals().get("wait") == 2, "both runs have ended")
    wait_until(lambda: not staff.worker.consumer.unsettled(), "all is settled")
    assert sorted(staff.ran) == [0, 1]
    assert first not in staff.ask("revoked")
    assert second not in staff.ask("revoked")


def test_what_threads_run_cannot_be_ended_and_unknown_tasks_are_not_here(staff: Staff) -> None:
    first, _, _ = staff.busy()
    with pytest.raises(NotImplementedError, match="use -P processes"):
        staff.ask("revoke", task_id=first, terminate=True, signal="SIGTERM")
    assert staff.ask("terminate", signal="KILL", task_id=["unknown"]) == answer_of(
        "terminate_unknown"
    )


@pytest.mark.parametrize("signal", ["SIGNONSENSE", -7])
def test_a_signal_that_does_not_exist_ends_nothing(staff: Staff, signal: Any) -> None:
    first, _, _ = staff.busy()
    with pytest.raises((KeyError, ValueError)):
        staff.ask("revoke", task_id=first, terminate=True, signal=signal)


def test_stamps_are_revoked(staff: Staff) -> None:
    answer = staff.ask("revoke_by_stamped_headers", headers={"tenant": ["zzz"]})
    assert answer == answer_of("revoke_by_stamped_headers")
    answer = staff.ask("revoke_by_stamped_headers", headers=["tenant=acme"], terminate=True)
    assert answer == {"ok": "headers {'tenant': 'acme'} were not terminated"}


def test_greetings_bring_what_is_revoked(staff: Staff) -> None:
    told = staff.ask("hello", from_node="other@host", revoked=["one", 7])
    assert shape(told) == shape(answer_of("hello"))
    assert told["revoked"] == ["one"]
    assert staff.ask("hello", from_node="old@celery", revoked={"two": 1.0})["revoked"] == [
        "one",
        "two",
    ]
    assert staff.ask("hello", from_node=staff.worker.hostname) is None


def test_the_rest_is_answered_in_celerys_form(staff: Staff) -> None:
    assert staff.ask("ping") == answer_of("ping")
    assert shape(staff.ask("clock")) == shape(answer_of("clock"))
    assert staff.ask("memsample").endswith("MB")
    assert "MB" in staff.ask("memdump", samples=1)
    assert staff.ask("election", id="1", topic="task", action={}) is None
    with pytest.raises(ImportError, match="Requires the objgraph library"):
        staff.ask("objgraph")


def test_settings_are_shown_without_secrets() -> None:
    app = make_app(
        TASKER_RESULT_BACKEND="redis://:geheim@127.0.0.1:1/0",
        TASKER_TRANSPORT_OPTIONS={"password": "geheim"},
    )
    task_worker = BaseTaskWorker(app)
    worker = Worker(task_worker.task_app())
    try:
        for name, arguments in (("conf", {"with_defaults": True}), ("report", {}), ("stats", {})):
            told = COMMANDS[name].handler(worker.state, **arguments)
            assert "geheim" not in str(told), name
        conf = COMMANDS["conf"].handler(worker.state)
        assert conf["result_backend"].startswith("redis://")
        assert "task_serializer" not in conf
        assert (
            COMMANDS["conf"].handler(worker.state, with_defaults=True)["task_serializer"] == "json"
        )
    finally:
        worker._waker.close()


def test_shutdown_stops_the_worker(staff: Staff) -> None:
    with pytest.raises(SystemExit):
        staff.ask("shutdown")
    wait_until(lambda: not staff.worker.ready.is_set(), "the worker has stopped")
