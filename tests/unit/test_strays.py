"""Runs that outlive the connection of their message."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from flask_taskworker.worker.delivery import Delivery, Outcome, Settlement
from flask_taskworker.worker.strays import Strays
from support import Bench, deliver

DONE = Outcome(Settlement.ACKNOWLEDGE, state="SUCCESS")


class StillPool:
    """Holds what it is given."""

    def __init__(self) -> None:
        self.active: list[Delivery] = []
        self.todo: list[Delivery] = []

    def running(self) -> list[Delivery]:
        return self.active

    def withdraw(self) -> list[Delivery]:
        todo, self.todo = self.todo, []
        return todo

    def submit(self, delivery: Delivery) -> None:
        self.todo.append(delivery)


@pytest.fixture
def pool() -> StillPool:
    return StillPool()


@pytest.fixture
def strays(pool: StillPool) -> Strays:
    return Strays(pool)  # type: ignore[arg-type]


@pytest.fixture
def task(bench: Bench) -> Any:
    return bench.task(lambda *args: 1, name="t")


def again(delivery: Delivery, **message: Any) -> Delivery:
    """The same message, as a new connection delivers it."""
    raw = deliver(delivery.message.task, *delivery.message.payload.args, id=delivery.message.id).raw
    changed = dataclasses.replace(delivery.message, **message)
    return dataclasses.replace(delivery, raw=raw, message=changed, epoch=2)


def test_a_run_that_goes_on_takes_its_message_up_again(
    strays: Strays, pool: StillPool, task: Any
) -> None:
    running = deliver(task, 5)
    pool.active.append(running)
    strays.gather()
    back = again(running)
    assert strays.take_up(back) == "running"
    assert (running.epoch, running.raw) == (2, back.raw), "its end settles the new delivery"
    assert strays.take_up(again(running)) is None, "another message of that id is another call"


def test_a_run_that_has_ended_settles_its_message_when_it_comes_back(
    strays: Strays, pool: StillPool, task: Any
) -> None:
    running = deliver(task, 5)
    pool.active.append(running)
    strays.gather()
    strays.ended(running, DONE)
    assert strays.take_up(again(running)) is DONE
    assert strays.take_up(again(running)) is None


def test_other_messages_run(strays: Strays, pool: StillPool, task: Any) -> None:
    running = deliver(task, 5)
    pool.active.append(running)
    strays.gather()
    strays.ended(deliver(task, 7, id="ended"), DONE)
    assert strays.take_up(deliver(task, 5)) is None, "another id"
    assert strays.take_up(again(running, retries=1)) is None, "its retry"
    assert strays.take_up(deliver(task, 6, id=running.message.id)) is None, "another body"
    assert strays.take_up(deliver(task, 8, id="ended")) is None


def test_what_has_not_started_is_forgotten_unless_nobody_sends_it_again(
    strays: Strays, pool: StillPool, task: Any
) -> None:
    late, early = deliver(task), deliver(task)
    early.acknowledged = True
    pool.todo += [late, early]
    strays.gather()
    assert pool.todo == [early]


def test_not_everything_is_remembered(strays: Strays, task: Any) -> None:
    first = deliver(task, id="first")
    strays.ended(first, DONE)
    for number in range(1000):
        strays.ended(deliver(task, id=str(number)), DONE)
    assert strays.take_up(again(first)) is None
    assert strays.take_up(again(deliver(task, id="999"))) is DONE
