"""Queues and dead letters from outside, on every broker."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from flask_taskworker import BrokerUnavailableError, dead_letters, queues
from flask_taskworker.exceptions import UnsupportedByBrokerError
from support import wait_until
from support.room import PATIENCE, Room

SERVERS = ["postgresql_url", "mysql_url", "redis_url", "amqp_url"]
BROKERS = ["sqlite", "filesystem", *(pytest.param(s, marks=pytest.mark.services) for s in SERVERS)]


@pytest.fixture(params=BROKERS)
def room(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Room]:
    name = request.param
    if name == "sqlite":
        settings = {"TASKER_DATABASE_URI": f"sqlite:///{tmp_path / 'queue.db'}"}
    elif name == "filesystem":
        settings = {"TASKER_ENGINE": "filesystem"}
    else:
        settings = {"TASKER_BROKER_URL": request.getfixturevalue(name)}
    settings["TASKER_RESULT_BACKEND"] = "cache+memory://"
    room = Room(settings, tmp_path, f"q-{uuid.uuid4().hex[:8]}")
    yield room
    queues.purge(room.task_app, [room.queue, room.queue + queues.DEAD_SUFFIX])
    room.close()


def send(room: Room, name: str, count: int = 1) -> list[str]:
    return [room.task_app.send_by_name(name, [n], {}, {}).id for n in range(count)]


def state(room: Room) -> queues.QueueState:
    (found,) = queues.states(room.task_app, [room.queue])
    return found


def test_what_waits_is_counted_and_purged(room: Room) -> None:
    assert state(room).waiting == 0
    send(room, "somewhere.else", 3)
    assert state(room).waiting == 3
    assert queues.purge(room.task_app, [room.queue, room.queue]) == {room.queue: 3}
    assert state(room).waiting == 0


def test_a_queue_that_does_not_exist_is_empty_and_is_not_made(room: Room) -> None:
    name = f"none-{uuid.uuid4().hex[:8]}"
    (found,) = queues.states(room.task_app, [name])
    assert (found.name, found.waiting) == (name, 0)
    assert queues.purge(room.task_app, [name]) == {name: 0}


def test_dead_letters_come_back_or_go(room: Room) -> None:
    app = room.task_app
    first, second, third = send(room, "no.such.task", 3)
    room.burst()
    assert (state(room).waiting, state(room).dead) == (0, 3)
    letters = dead_letters.listing(app, room.queue)
    assert {letter.task_id for letter in letters} == {first, second, third}
    assert {letter.task for letter in letters} == {"no.such.task"}
    assert all("no.such.task" in letter.reason for letter in letters)
    assert len(dead_letters.listing(app, room.queue, limit=2)) == 2
    for _ in range(room.config.max_deliveries):
        dead_letters.listing(app, room.queue)
    assert state(room).dead == 3, "looking at them changes nothing"

    assert dead_letters.replay(app, [second, "nonsense"], room.queue) == 1
    assert (state(room).waiting, state(room).dead) == (1, 2)
    assert dead_letters.delete(app, [first]) == 1
    room.burst()
    left = dead_letters.listing(app)
    assert {letter.task_id for letter in left} == {second, third}
    assert dead_letters.delete(app, None, room.queue) == 2
    assert dead_letters.listing(app, room.queue) == []


def test_a_replayed_call_runs_with_its_arguments(room: Room) -> None:
    app = room.task_app
    handle = app.send_by_name("late.task", [20], {"by": 2}, {})
    room.burst()
    room.task_worker.define_task(name="late.task")(lambda x, by: x + by)
    assert dead_letters.replay(app) == 1
    room.burst()
    assert handle.get(PATIENCE) == 22


@pytest.mark.only_on("sqlite", "postgresql_url", "mysql_url")
def test_a_pause_holds_for_every_worker(room: Room) -> None:
    app = room.task_app
    queues.pause(app, room.queue)
    send(room, "no.such.task")
    assert state(room).paused
    room.burst()
    assert state(room).waiting == 1
    queues.pause(app, room.queue, paused=False)
    room.burst()
    assert (state(room).waiting, state(room).dead) == (0, 1)


@pytest.mark.only_on("redis_url", "amqp_url")
def test_where_the_broker_hands_out_all_the_same_the_workers_are_asked(room: Room) -> None:
    app = room.task_app
    with room.worker():
        queues.pause(app, room.queue)
        wait_until(lambda: app.control.paused_queues() in (None, {room.queue}), "it is kept")
        queues.pause(app, room.queue, paused=False)
        handle = room.add.delay(1, 2)
        assert handle.get(PATIENCE) == 3


@pytest.mark.only_on("filesystem")
def test_a_broker_that_can_neither_pause_nor_tell_the_workers_says_so(room: Room) -> None:
    with pytest.raises(UnsupportedByBrokerError, match="cannot pause a queue"):
        queues.pause(room.task_app, room.queue)


def test_a_broker_that_is_away_is_named(tmp_path: Path) -> None:
    room = Room({"TASKER_BROKER_URL": "redis://:s3cret@127.0.0.1:1/0"}, tmp_path, "q")
    for action in (queues.states, dead_letters.listing, dead_letters.replay):
        with pytest.raises(BrokerUnavailableError, match=r"redis://:\*\*\*@127\.0\.0\.1:1/0"):
            action(room.task_app)
    room.close()
