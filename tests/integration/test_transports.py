"""The same scenarios on every transport; only ``TASKER_*`` settings differ."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import kombu
import pytest

from flask_taskworker import Reject, states
from flask_taskworker.broker import sql_options
from flask_taskworker.exceptions import (
    MaxRetriesExceededError,
    ResultTimeoutError,
    TaskRevokedError,
    UnknownTaskError,
)
from flask_taskworker.transports.sql import dead_letters
from flask_taskworker.transports.sql.engine import database_for
from support.room import PATIENCE, Room
from support.waiting import wait_until

services = pytest.mark.services
Settings = Callable[[pytest.FixtureRequest], dict[str, Any]]

TRANSPORTS: dict[str, Settings] = {
    "sqlite": lambda request: {},
    "postgresql": lambda request: {
        "TASKER_DRIVER": "postgresql",
        "TASKER_DATABASE_URI": request.getfixturevalue("postgresql_url"),
    },
    "mysql": lambda request: {
        "TASKER_DRIVER": "mysql",
        "TASKER_DATABASE_URI": request.getfixturevalue("mysql_url"),
    },
    "amqp": lambda request: {"TASKER_BROKER_URL": request.getfixturevalue("amqp_url")},
    "redis": lambda request: {"TASKER_BROKER_URL": request.getfixturevalue("redis_url")},
    "memory": lambda request: {"TASKER_ENGINE": "memory"},
    "filesystem": lambda request: {"TASKER_ENGINE": "filesystem"},
}
LOCAL = ("sqlite", "memory", "filesystem")


def parameters(*names: str) -> list[Any]:
    return [
        pytest.param(name, id=name, marks=[] if name in LOCAL else [services]) for name in names
    ]


@pytest.fixture(params=parameters(*TRANSPORTS))
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def room(
    transport: str, request: pytest.FixtureRequest, tmp_path: Path, unique: str
) -> Iterator[Room]:
    settings = TRANSPORTS[transport](request)
    room = Room({"TASKER_DEBUG": False, **settings}, tmp_path, unique)
    yield room
    room.close()


class Parked(NamedTuple):
    reason: str
    headers: dict[str, Any]
    body: bytes


def parked(room: Room, count: int = 1) -> list[Parked]:
    """The dead letters of the room's queue; fails if there are not exactly so many."""
    if room.config.engine == "sqlalchemy":
        database = database_for(room.config.broker_url, sql_options(room.config))
        wait_until(
            lambda: len(dead_letters.list(database, room.queue)) >= count, "dead letters", PATIENCE
        )
        letters = dead_letters.list(database, room.queue)
        assert len(letters) == count
        return [Parked(letter.reason, letter.headers, letter.body) for letter in letters]
    messages = room.take_all(f"{room.queue}.dead", count)
    return [
        Parked(
            message.headers["x-dead-letter-reason"],
            message.headers,
            message.body if isinstance(message.body, bytes) else message.body.encode(),
        )
        for message in messages
    ]


def state_of(room: Room, task_id: str) -> str:
    return room.task_worker.AsyncResult(task_id).state


# -- sending and results --------------------------------------------------------------------


def test_all_three_ways_of_sending_run_the_task(room: Room) -> None:
    with room.worker():
        handles = [
            room.add.apply(a=1, b=2),
            room.add.delay(10, b=20),
            room.add.apply_async((100,), {"b": 200}),
        ]
        assert [handle.get(timeout=PATIENCE) for handle in handles] == [3, 30, 300]
    assert sorted(room.starts("add")) == [1, 10, 100]
    assert [handle.state for handle in handles] == [states.SUCCESS] * 3


def test_tasks_that_were_sent_before_the_worker_started_are_run(room: Room) -> None:
    handles = [room.add.delay(number) for number in range(20)]
    room.burst()
    assert [handle.get(timeout=PATIENCE) for handle in handles] == list(range(20))
    assert sorted(room.starts("add")) == list(range(20))
    assert room.task_app.publisher.queue_size(room.queue) == 0


def test_plain_data_arrives_as_it_was_sent(room: Room) -> None:
    value = {"text": "ä\u2028\n\0", "list": [1, 2.5, None, True], "empty": {}, "big": 2**60}
    with room.worker():
        assert room.note.delay(value).get(timeout=PATIENCE) == value


def test_a_failure_is_raised_again_with_the_workers_traceback(room: Room) -> None:
    with room.worker():
        handle = room.fail.delay("no such thing")
        with pytest.raises(LookupError) as caught:
            handle.get(timeout=PATIENCE)
        assert caught.value.args == ("no such thing", 7)
        assert "raise LookupError(text, 7)" in handle.traceback
        assert handle.state == states.FAILURE
        assert room.add.delay(1).get(timeout=PATIENCE) == 1, "the worker goes on"


def test_get_waits_no_longer_than_it_was_told(room: Room) -> None:
    handle = room.add.delay(5)
    began = time.monotonic()
    with pytest.raises(ResultTimeoutError, match=handle.id):
        handle.get(timeout=0.3)
    assert 0.25 <= time.monotonic() - began < 2
    with room.worker():
        assert handle.get(timeout=PATIENCE) == 5


def test_a_waiting_get_is_woken_when_the_task_ends(room: Room) -> None:
    with room.worker():
        room.add.delay(0).get(timeout=PATIENCE)  # connections are open
        handle = room.wait.delay("woken")
        room.wait_for_starts("wait", 1)
        got: list[tuple[Any, float]] = []
        waiter = threading.Thread(
            target=lambda: got.append((handle.get(timeout=PATIENCE), time.monotonic()))
        )
        waiter.start()
        opened = time.monotonic()
        room.gate.set()
        waiter.join(PATIENCE)
    assert got[0][0] == "woken"
    assert got[0][1] - opened < 1.0


def test_an_idle_worker_is_woken_by_a_new_task(room: Room) -> None:
    with room.worker():
        room.add.delay(0).get(timeout=PATIENCE)
        latencies = []
        for number in range(1, 6):
            sent = time.time()
            room.add.delay(number).get(timeout=PATIENCE)
            latencies.append(room.started[-1][2] - sent)
    assert sorted(latencies)[2] < 0.5, "an idle worker must not sleep out its loop interval"


# -- time -------------------------------------------------------------------------------------


def test_a_countdown_is_not_run_before_it_is_due(room: Room) -> None:
    with room.worker():
        sent = time.time()
        handle = room.note.apply_async(["later"], countdown=1.0)
        assert room.add.delay(1).get(timeout=PATIENCE) == 1, "others are not held up"
        assert handle.get(timeout=PATIENCE) == "later"
    ((_, _, started),) = [run for run in room.started if run[0] == "note"]
    assert 1.0 <= started - sent < 10.0


def test_a_countdown_survives_the_worker_that_held_it(room: Room, transport: str) -> None:
    sent = time.time()
    handle = room.note.apply_async(["later"], countdown=4.0)
    with room.worker():
        room.add.delay(1).get(timeout=PATIENCE)  # it has seen the first one as well
    assert not room.starts("note")
    with room.worker():
        assert handle.get(timeout=PATIENCE) == "later"
    assert room.started[-1][2] - sent >= 4.0
    assert len(room.starts("note")) == 1


def test_an_expired_task_is_revoked_and_not_run(room: Room) -> None:
    handle = room.note.apply_async(["too late"], expires=0.05)
    expired = time.time() + 0.05
    fresh = room.add.apply_async((1,), expires=60)
    wait_until(lambda: time.time() > expired + 0.05, "the expiry")
    with room.worker():
        assert fresh.get(timeout=PATIENCE) == 1
        with pytest.raises(TaskRevokedError):
            handle.get(timeout=PATIENCE)
    assert handle.state == states.REVOKED
    assert room.starts("note") == []


def test_what_is_due_is_run_and_not_handed_back_first(room: Room) -> None:
    """An idle worker took a task that no thread had picked up yet for one that is stuck."""
    deliveries = []

    @room.task_worker.define_task(name="count_deliveries", bind=True)
    def count_deliveries(task: Any) -> None:
        deliveries.append(task.request.delivery_count)

    with room.worker():
        for aim in range(1, 6):
            count_deliveries.apply_async(countdown=0.3)
            wait_until(lambda aim=aim: len(deliveries) == aim, "it ran", PATIENCE)
    assert deliveries == [1] * 5


# -- retry and rejection ------------------------------------------------------------------------


def test_a_retry_runs_again_under_the_same_id(room: Room) -> None:
    with room.worker():
        assert room.retry.delay(2).get(timeout=PATIENCE) == 2
    assert room.starts("retry") == [0, 1, 2]


def test_retries_that_are_used_up_end_with_the_exception(room: Room) -> None:
    with room.worker(), pytest.raises(ValueError, match="attempt 2"):
        room.retry.delay(99).get(timeout=PATIENCE)
    assert room.starts("retry") == [0, 1, 2]
    assert room.task_app.publisher.queue_size(room.queue) == 0


def test_retries_without_an_exception_of_their_own_say_so(room: Room) -> None:
    @room.task_worker.define_task(name="impatient", bind=True, max_retries=0)
    def impatient(task: Any) -> None:
        raise task.retry(countdown=0)

    with room.worker(), pytest.raises(MaxRetriesExceededError, match="impatient"):
        impatient.delay().get(timeout=PATIENCE)


def test_a_rejected_message_that_is_requeued_is_delivered_again(room: Room) -> None:
    with room.worker():
        handle = room.send_back.delay()
        assert handle.get(timeout=PATIENCE) == 2
    assert room.starts("send_back") == [handle.id, handle.id]
    assert room.task_app.publisher.queue_size(room.queue) == 0


def test_a_rejected_message_is_parked(room: Room) -> None:
    with room.worker():
        handle = room.refuse.delay()
        with pytest.raises(Reject):
            handle.get(timeout=PATIENCE)
        wait_until(lambda: handle.ready(), "the state", PATIENCE)
    (letter,) = parked(room)
    assert "not wanted" in letter.reason
    assert letter.headers["id"] == handle.id


# -- what is no task of ours ----------------------------------------------------------------


def test_an_unknown_task_is_parked_and_not_lost(room: Room) -> None:
    stranger = Room({**room.app.config}, Path(room.app.instance_path), room.queue)
    elsewhere = stranger.task_worker.define_task(name="elsewhere")(lambda number: number)
    handle = elsewhere.delay(42)
    try:
        with room.worker():
            if room.config.result_backend == "cache+memory://":  # each app has its own
                handle = room.task_worker.AsyncResult(handle.id)
            with pytest.raises(UnknownTaskError, match="elsewhere"):
                handle.get(timeout=PATIENCE)
            assert room.add.delay(1).get(timeout=PATIENCE) == 1, "the worker goes on"
    finally:
        stranger.close()
    (letter,) = parked(room)
    assert "'elsewhere'" in letter.reason
    assert letter.headers["task"] == "elsewhere"
    assert letter.headers["id"] == handle.id
    assert json.loads(letter.body)[0] == [42], "it can be replayed"


BROKEN: dict[str, dict[str, Any]] = {
    "no JSON": {"body": "{ this is no JSON"},
    "not the three parts": {"body": "5"},
    "arguments that are a text": {"body": '["abc", {}, {}]'},
    "bytes": {"body": b"\xff\xfe\x00 \x80"},
    "pickle": {
        "body": b"\x80\x04N.",
        "content_type": "application/x-python-serialize",
        "content_encoding": "binary",
    },
}


def test_an_undecodable_body_is_parked_and_the_worker_goes_on(room: Room) -> None:
    ids = {}
    for name, message in BROKEN.items():
        ids[name] = str(uuid.uuid4())
        headers = {"id": ids[name], "task": "add", "lang": "py"}
        room.send_raw(headers=headers, **message)
    with room.worker():
        assert room.add.delay(1).get(timeout=PATIENCE) == 1
        letters = parked(room, len(BROKEN))
    assert {letter.headers["id"] for letter in letters} == set(ids.values())
    assert all(letter.reason for letter in letters)
    assert room.starts("add") == [1]
    assert room.task_app.publisher.queue_size(room.queue) == 0
    if room.config.result_backend != "rpc://":  # there nobody said where to answer to
        assert {state_of(room, task_id) for task_id in ids.values()} == {states.FAILURE}


def test_a_message_without_headers_is_parked(room: Room) -> None:
    room.send_raw('{"hello": "world"}')
    with room.worker():
        (letter,) = parked(room)
    assert json.loads(letter.body) == {"hello": "world"}
    assert "task" in letter.reason


# -- acknowledging and stopping ----------------------------------------------------------------


def test_a_stop_gives_back_what_was_not_started(room: Room) -> None:
    handles = [room.wait.delay(number) for number in range(6)]
    with room.worker(concurrency=1) as worker:
        (first,) = room.wait_for_starts("wait", 1)
        worker.stop(10)
        room.gate.set()
    assert room.starts("wait") == [first], "a stopping worker starts nothing"
    assert room.task_app.publisher.queue_size(room.queue) == 5
    room.burst()
    assert [handle.get(timeout=PATIENCE) for handle in handles] == list(range(6))
    assert sorted(room.starts("wait")) == list(range(6)), "each ran exactly once"


def test_a_task_that_outlives_the_drain_time_is_delivered_again(room: Room) -> None:
    handle = room.wait.delay("again")
    with room.worker(drain=0.0):
        room.wait_for_starts("wait", 1)
    with room.worker():
        room.wait_for_starts("wait", 2)
        room.gate.set()
        assert handle.get(timeout=PATIENCE) == "again"


def test_a_task_acknowledged_early_is_never_run_twice(room: Room) -> None:
    room.wait_early.delay("once")
    with room.worker(drain=0.0):
        room.wait_for_starts("wait_early", 1)
        wait_until(
            lambda: room.task_app.publisher.queue_size(room.queue) == 0, "the early ack", PATIENCE
        )
    with room.worker():
        assert room.add.delay(1).get(timeout=PATIENCE) == 1
    room.gate.set()
    assert room.starts("wait_early") == ["once"]


def test_early_acknowledgement_still_stores_the_result(room: Room) -> None:
    room.gate.set()
    with room.worker():
        assert room.wait_early.delay("kept").get(timeout=PATIENCE) == "kept"


# -- queues -----------------------------------------------------------------------------------


def test_a_worker_reads_the_queues_it_was_told_to_and_no_other(room: Room) -> None:
    mail, reports = f"{room.queue}-mail", f"{room.queue}-reports"
    handles = {
        queue: room.note.apply_async([queue], queue=queue) for queue in (room.queue, mail, reports)
    }
    with room.worker(queues=[mail, reports]):
        assert handles[mail].get(timeout=PATIENCE) == mail
        assert handles[reports].get(timeout=PATIENCE) == reports
    assert sorted(room.starts("note")) == sorted([mail, reports])
    assert room.task_app.publisher.queue_size(room.queue) == 1
    room.burst()
    assert handles[room.queue].get(timeout=PATIENCE) == room.queue


def test_a_worker_reads_the_queues_that_tasks_name(room: Room) -> None:
    queue = f"{room.queue}-own"
    own = room.task_worker.define_task(name="own", queue=queue)(lambda: "ran")
    with room.worker():
        assert own.delay().get(timeout=PATIENCE) == "ran"
        assert room.add.delay(1).get(timeout=PATIENCE) == 1


@pytest.mark.parametrize("transport", parameters("sqlite", "postgresql", "mysql"))
def test_the_urgent_message_comes_first(room: Room) -> None:
    for number, priority in enumerate([0, 5, 9, 1]):
        room.note.apply_async([number], priority=priority)
    room.burst(pool="solo")
    assert room.starts("note") == [2, 1, 3, 0]


def test_equal_messages_come_in_the_order_they_were_sent(room: Room) -> None:
    for number in range(30):
        room.note.delay(number)
    room.burst(pool="solo")
    assert room.starts("note") == list(range(30))


def test_a_result_that_nobody_wants_is_not_kept(room: Room) -> None:
    with room.worker():
        handle = room.note.apply_async(["quiet"], ignore_result=True)
        room.wait_for_starts("note", 1)
        assert room.add.delay(1).get(timeout=PATIENCE) == 1
    assert handle.state == states.PENDING


def test_the_message_leaves_in_celerys_form(room: Room) -> None:
    handle = room.add.apply_async((1,), {"b": 2}, headers={"tenant": "acme"})
    (message,) = room.take_all(room.queue, 1)
    assert isinstance(message, kombu.Message)
    assert message.headers["task"] == "add"
    assert message.headers["id"] == handle.id
    assert message.headers["tenant"] == "acme"
    assert message.content_type == "application/json"
    args, kwargs, embed = message.decode()
    assert (args, kwargs) == ([1], {"b": 2})
    assert set(embed) == {"callbacks", "errbacks", "chain", "chord"}
