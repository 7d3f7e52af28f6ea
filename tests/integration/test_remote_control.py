"""Remote control, revocations and events on every broker that can broadcast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kombu
import pytest

from flask_taskworker import AsyncResult, TaskRevokedError, events, states
from flask_taskworker.broker import broker_connection
from flask_taskworker.exceptions import BrokerError
from flask_taskworker.worker.supervisor import Worker
from support.monitor import Monitor, assert_form
from support.room import PATIENCE, Room
from support.shapes import captured
from support.waiting import wait_until

services = pytest.mark.services
BROKERS: dict[str, Callable[[pytest.FixtureRequest], dict[str, Any]]] = {
    "sqlite": lambda request: {},
    "postgresql": lambda request: {
        "TASKER_DRIVER": "postgresql",
        "TASKER_DATABASE_URI": request.getfixturevalue("postgresql_url"),
    },
    "mysql": lambda request: {
        "TASKER_DRIVER": "mysql",
        "TASKER_DATABASE_URI": request.getfixturevalue("mysql_url"),
    },
    "amqp": lambda request: {
        "TASKER_BROKER_URL": request.getfixturevalue("amqp_url"),
        "TASKER_RESULT_BACKEND": request.getfixturevalue("redis_url"),
    },
    "redis": lambda request: {"TASKER_BROKER_URL": request.getfixturevalue("redis_url")},
}
#: Where the broker keeps what concerns all workers.
KEEPING = ("sqlite", "postgresql", "mysql", "redis")


@pytest.fixture(
    params=[pytest.param(name, marks=[] if name == "sqlite" else [services]) for name in BROKERS]
)
def broker(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def room(
    broker: str, request: pytest.FixtureRequest, tmp_path: Path, unique: str
) -> Iterator[Room]:
    room = Room({"TASKER_DEBUG": False, **BROKERS[broker](request)}, tmp_path, unique)
    yield room
    room.close()


@contextmanager
def at_work(room: Room, name: str, **options: Any) -> Iterator[Worker]:
    """A worker of the room that listens to commands."""
    with room.worker(hostname=f"{name}@{room.queue}", **options) as worker:
        wait_until(worker.remote.ready.is_set, "the worker listens", PATIENCE)
        yield worker


def ask(room: Room, command: str, worker: Worker, **arguments: Any) -> Any:
    """One worker's answer."""
    (answer,) = (
        room.task_app.control.broadcast(
            command, arguments, destination=[worker.hostname], reply=True, timeout=PATIENCE
        )
        or ()
    )
    return answer[worker.hostname]


# -- asking and steering ----------------------------------------------------------------------


def test_workers_answer_while_every_slot_is_busy(room: Room) -> None:
    with at_work(room, "one", concurrency=2) as worker:
        ids = {room.wait.delay(i).id for i in range(2)}
        room.wait_for_starts("wait", 2)
        assert ask(room, "ping", worker) == {"ok": "pong"}
        assert {task["id"] for task in ask(room, "active", worker)} == ids
        assert ask(room, "stats", worker)["total"] == {"wait": 2}
        room.gate.set()


def test_every_worker_answers_or_those_that_are_named(room: Room) -> None:
    with at_work(room, "one") as one, at_work(room, "two") as two:

        def nodes(**options: Any) -> set[str]:
            replies = room.task_app.control.broadcast("ping", reply=True, **options) or []
            return {node for reply in replies for node in reply}

        assert nodes(limit=2, timeout=PATIENCE) == {one.hostname, two.hostname}
        assert nodes(destination=[two.hostname], timeout=PATIENCE) == {two.hostname}
        pattern = {"pattern": "one@*", "matcher": "glob"}
        assert nodes(limit=1, timeout=PATIENCE, **pattern) == {one.hostname}
        assert nodes(destination=["nobody"], timeout=0.3) == set()


def test_nonsense_is_answered_or_ignored_and_hurts_nobody(room: Room) -> None:
    with at_work(room, "one") as worker:
        assert ask(room, "nonsense", worker) == {"error": "KeyError('nonsense')"}
        error = ask(room, "rate_limit", worker, foo=1)["error"]
        assert error == captured("pidbox", "bad_argument")["api_return"][0]["w1@cap"]["error"]
        with broker_connection(room.config, role="publish") as connection:
            exchange = kombu.Exchange("celery.pidbox", type="fanout", durable=False)
            producer = kombu.Producer(connection.default_channel)
            for body in (
                [], "text", 7, None, {}, {"method": 7}, {"method": "ping", "arguments": [1]},
                {"method": "ping", "destination": 7}, {"method": "ping", "reply_to": "nobody"},
                {"method": "revoke", "arguments": {"task_id": {"a": [1]}}},
                {"method": "ping", "pattern": "(", "matcher": "pcre"},
                {"method": "hello", "arguments": {"from_node": 7, "revoked": 7}},
            ):  # fmt: skip
                producer.publish(body, exchange=exchange, declare=[exchange], serializer="json")
            producer.publish(
                b"\xff{", exchange=exchange, content_type="application/json",
                content_encoding="utf-8",
            )  # fmt: skip
        assert ask(room, "ping", worker) == {"ok": "pong"}
        assert room.add.delay(1, 2).get(timeout=PATIENCE) == 3


def test_a_command_stops_a_worker(room: Room) -> None:
    with at_work(room, "one") as worker:
        room.task_app.control.shutdown(destination=[worker.hostname])
        wait_until(lambda: not worker.ready.is_set(), "the worker stops", PATIENCE)


def test_queues_are_added_and_cancelled(room: Room) -> None:
    other = f"{room.queue}_other"
    with at_work(room, "one") as worker:
        ask(room, "add_consumer", worker, queue=other)
        assert room.add.apply_async((1, 2), queue=other).get(timeout=PATIENCE) == 3
        ask(room, "cancel_consumer", worker, queue=other)
        wait_until(
            lambda: other not in worker.consumer.subscriptions.queues,
            "it is read no more",
            PATIENCE,
        )


def test_remote_control_can_be_switched_off(broker: str, request: Any, tmp_path: Path) -> None:
    settings = {**BROKERS[broker](request), "TASKER_REMOTE_CONTROL": False}
    room = Room(settings, tmp_path, f"off_{time.time_ns()}")
    try:
        with at_work(room, "one") as worker:
            control = room.task_app.control
            assert control.ping(destination=[worker.hostname], timeout=0.5) == []
            assert room.add.delay(1, 2).get(timeout=PATIENCE) == 3
    finally:
        room.close()


def test_two_workers_with_one_name_are_warned_of(
    room: Room, caplog: pytest.LogCaptureFixture
) -> None:
    with at_work(room, "same"):
        assert "is named" not in caplog.text
        with at_work(room, "same") as worker:
            wait_until(
                lambda: f"another worker is named {worker.hostname}" in caplog.text,
                "the warning",
                PATIENCE,
            )
            assert room.add.delay(1, 2).get(timeout=PATIENCE) == 3


# -- revocations ------------------------------------------------------------------------------


def test_a_revoked_task_is_revoked_at_once_and_never_runs(room: Room) -> None:
    with at_work(room, "one", concurrency=1) as worker:
        room.wait.delay(0)
        room.wait_for_starts("wait", 1)
        waiting = room.note.delay("waiting")
        later = room.note.apply_async(("later",), countdown=2)
        for result in (waiting, later):
            result.revoke()
            assert result.state == states.REVOKED
            with pytest.raises(TaskRevokedError):
                result.get(timeout=PATIENCE)
        wait_until(lambda: later.id in worker.state.revoked.ids(), "the worker knows", PATIENCE)
        room.gate.set()
        room.note.apply_async(("last",), countdown=2.5).get(timeout=PATIENCE)
        assert room.starts("note") == ["last"]


def test_what_has_succeeded_stays_so(room: Room) -> None:
    with at_work(room, "one"):
        result = room.add.delay(1, 2)
        assert result.get(timeout=PATIENCE) == 3
        result.revoke()
        again: AsyncResult[int] = room.task_worker.AsyncResult(result.id)
        assert again.state == states.SUCCESS


@pytest.mark.not_on("amqp")
def test_workers_that_start_later_know_of_a_revocation(room: Room) -> None:
    result = room.note.delay("revoked")
    result.revoke()
    stamped = room.task_app.control.revoke_by_stamped_headers({"tenant": "acme"})
    assert stamped is None
    with room.worker() as worker:  # it need not listen to commands yet
        room.note.delay("other").get(timeout=PATIENCE)
        assert result.id in worker.state.revoked.ids()
        assert room.task_worker.AsyncResult(result.id).state == states.REVOKED
    assert room.starts("note") == ["other"]
    with at_work(room, "two") as worker:
        assert result.id in ask(room, "revoked", worker)


@pytest.mark.only_on("amqp")
def test_workers_that_start_later_learn_of_a_revocation_from_others(room: Room) -> None:
    with at_work(room, "one", queues=[f"{room.queue}_other"]):
        room.task_app.control.revoke("known-to-one")
        with at_work(room, "two") as two:
            wait_until(
                lambda: "known-to-one" in two.state.revoked.ids(), "two has learnt it", PATIENCE
            )


# -- pausing ----------------------------------------------------------------------------------


def test_a_paused_queue_hands_out_nothing_to_anybody(room: Room, broker: str) -> None:
    control = room.task_app.control
    with at_work(room, "one"):
        control.pause_queue(room.queue, reply=True, limit=1, timeout=PATIENCE)
        assert control.paused_queues() == ({room.queue} if broker in KEEPING else None)
        if broker in ("redis", "amqp"):  # the workers themselves leave it alone
            time.sleep(0.5)
        result = room.note.delay("paused")
        time.sleep(1.0)
        assert room.starts("note") == []
        control.resume_queue(room.queue)
        assert result.get(timeout=PATIENCE) == "paused"
        assert not control.paused_queues()


@pytest.mark.not_on("amqp")
def test_a_queue_stays_paused_for_workers_that_start_later(room: Room) -> None:
    control = room.task_app.control
    control.pause_queue(room.queue)
    with room.worker():
        room.note.delay("paused")
        time.sleep(1.0)
        assert room.starts("note") == []
        control.resume_queue(room.queue)
        room.wait_for_starts("note", 1)


# -- events -----------------------------------------------------------------------------------


def test_the_event_stream_has_celerys_form(room: Room) -> None:
    with Monitor(room.task_app) as monitor:
        with at_work(room, "one", task_events=True) as worker:
            good = room.add.delay(1, 2)
            bad = room.fail.delay("why")
            retried = room.retry.delay(1)
            refused = room.refuse.delay()
            revoked = room.note.apply_async(("never",), expires=0)
            for type, result in (
                ("task-received", good),
                ("task-started", good),
                ("task-succeeded", good),
                ("task-failed", bad),
                ("task-retried", retried),
                ("task-rejected", refused),
                ("task-revoked", revoked),
            ):
                assert_form(monitor.wait_for(type, result.id))
            succeeded = monitor.wait_for("task-succeeded", good.id)
            assert succeeded["result"] == "3"
            assert monitor.wait_for("task-failed", bad.id)["exception"] == "LookupError('why', 7)"
            assert "LookupError" in monitor.wait_for("task-failed", bad.id)["traceback"]
            assert monitor.wait_for("task-revoked", revoked.id)["expired"] is True
            assert_form(monitor.wait_for("worker-heartbeat"))
        for type in ("worker-online", "worker-offline"):
            assert_form(monitor.wait_for(type))
        of_good = [event["type"] for event in monitor.of(worker) if event.get("uuid") == good.id]
        assert of_good == ["task-received", "task-started", "task-succeeded"]
        clocks = [event["clock"] for event in monitor.of(worker) if "uuid" in event]
        assert clocks == sorted(clocks)


def test_task_events_are_sent_on_request_alone(room: Room) -> None:
    with Monitor(room.task_app) as monitor, at_work(room, "one") as worker:
        first = room.add.delay(1, 2)
        first.get(timeout=PATIENCE)
        assert ask(room, "enable_events", worker) == {"ok": "task events enabled"}
        second = room.add.delay(1, 2)
        monitor.wait_for("task-succeeded", second.id)
        assert not [event for event in monitor.seen if event.get("uuid") == first.id]
        assert ask(room, "disable_events", worker) == {"ok": "task events disabled"}


def test_a_heartbeat_comes_on_request(room: Room) -> None:
    with at_work(room, "one"), Monitor(room.task_app) as monitor:
        room.task_app.control.heartbeat()
        wait_until(
            lambda: [e for e in monitor.seen if e["type"] == "worker-heartbeat" and e["freq"] == 5],
            "the heartbeat",
            PATIENCE,
        )


def test_senders_tell_what_they_send(broker: str, request: Any, tmp_path: Path) -> None:
    settings = {**BROKERS[broker](request), "TASKER_SEND_SENT_EVENT": True}
    room = Room(settings, tmp_path, f"sent_{time.time_ns()}")
    try:
        with Monitor(room.task_app) as monitor:
            result = room.add.delay(1, b=2)
            sent = monitor.wait_for("task-sent", result.id)
        assert_form(sent)
        assert (sent["queue"], sent["name"], sent["args"]) == (room.queue, "add", "(1,)")
    finally:
        room.close()


def test_a_broker_that_cannot_broadcast_is_named(tmp_path: Path, unique: str) -> None:
    room = Room({"TASKER_ENGINE": "filesystem"}, tmp_path, unique)
    try:
        with room.worker():
            assert room.add.delay(1, 2).get(timeout=PATIENCE) == 3
            with pytest.raises(BrokerError, match="cannot broadcast"):
                room.task_app.control.ping()
            with pytest.raises(BrokerError, match="cannot broadcast"):
                next(events.receive(room.task_app))
    finally:
        room.close()
