"""``async def`` tasks: many at once on one loop, each in a context of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from flask import current_app, g

from flask_taskworker.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from support.room import PATIENCE, Room
from support.waiting import wait_until

SETTINGS: dict[str, dict[str, Any]] = {
    "sqlite": {},
    "memory": {"TASKER_ENGINE": "memory"},
}
own: ContextVar[str] = ContextVar("own", default="nobody's")


@pytest.fixture(params=SETTINGS)
def room(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[Room]:
    room = Room({"TASKER_DEBUG": False, **SETTINGS[request.param]}, tmp_path, unique)
    yield room
    room.close()


def test_many_are_in_flight_at_once_on_one_loop(room: Room) -> None:
    arrived: list[Any] = []

    @room.task_worker.define_task(name="meet")
    async def meet(number: int, all_of_them: int) -> int:
        arrived.append(threading.current_thread().name)
        while len(arrived) < all_of_them:
            await asyncio.sleep(0.005)
        return number

    with room.worker(concurrency=2):
        handles = [meet.delay(number, 30) for number in range(30)]
        assert [handle.get(timeout=PATIENCE) for handle in handles] == list(range(30))
    assert set(arrived) == {"taskworker-loop"}


def test_tasks_that_block_and_tasks_that_wait_run_side_by_side(room: Room) -> None:
    @room.task_worker.define_task(name="breathe")
    async def breathe() -> str:
        await asyncio.sleep(0)
        return "breathed"

    with room.worker(concurrency=2):
        blocked = room.wait.delay("b")
        room.wait_for_starts("wait", 1)
        assert breathe.delay().get(timeout=PATIENCE) == "breathed"
        room.gate.set()
        assert blocked.get(timeout=PATIENCE) == "b"


def test_each_has_its_own_app_context_and_context_variables(room: Room) -> None:
    @room.task_worker.define_task(name="mine", bind=True)
    async def mine(task: Any, name: str) -> list[Any]:
        seen = [getattr(g, "name", None), own.get()]
        g.name = name
        own.set(name)
        await asyncio.sleep(0.02)
        return [*seen, g.name, own.get(), current_app.name, task.request.id]

    with room.worker(concurrency=1):
        handles = {name: mine.delay(name) for name in ("a", "b", "c")}
        for name, handle in handles.items():
            expected = [None, "nobody's", name, name, "room", handle.id]
            assert handle.get(timeout=PATIENCE) == expected


def test_what_they_raise_is_their_failure(room: Room) -> None:
    @room.task_worker.define_task(name="fails_later")
    async def fails_later() -> None:
        await asyncio.sleep(0)
        raise LookupError("later")

    @room.task_worker.define_task(name="exits_later")
    async def exits_later() -> None:
        await asyncio.sleep(0)
        raise SystemExit(2)

    with room.worker():
        with pytest.raises(LookupError, match="later"):
            fails_later.delay().get(timeout=PATIENCE)
        with pytest.raises(Exception, match="2"):
            exits_later.delay().get(timeout=PATIENCE)
        assert room.add.delay(1, 2).get(timeout=PATIENCE) == 3


def test_retries_go_on_until_they_succeed(room: Room) -> None:
    @room.task_worker.define_task(name="again", bind=True)
    async def again(task: Any) -> int:
        await asyncio.sleep(0)
        if task.request.retries < 2:
            raise task.retry(countdown=0)
        return int(task.request.retries)

    with room.worker():
        assert again.delay().get(timeout=PATIENCE) == 2


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_both_limits_cancel(room: Room, pool: str) -> None:
    @room.task_worker.define_task(name="sleeps")
    async def sleeps() -> str:
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded:
            return "cleaned up"
        return "slept"

    with room.worker(pool=pool):
        handle = sleeps.apply_async(soft_time_limit=0.1)
        assert handle.get(timeout=PATIENCE) == "cleaned up"
        with pytest.raises(TimeLimitExceeded):
            sleeps.apply_async(time_limit=0.1).get(timeout=PATIENCE)


def test_a_stopping_worker_waits_for_them_and_gives_back_those_that_stay(room: Room) -> None:
    entered = threading.Event()

    @room.task_worker.define_task(name="stays")
    async def stays(seconds: float) -> str:
        entered.set()
        await asyncio.sleep(seconds)
        return "done"

    with room.worker(drain=10):
        handle = stays.delay(0.2)
        assert entered.wait(PATIENCE)
    assert handle.get(timeout=PATIENCE) == "done"
    entered.clear()
    with room.worker(drain=0.1):
        handle = stays.delay(600)
        assert entered.wait(PATIENCE)
    assert not handle.ready()
    wait_until(
        lambda: not any(t.name == "taskworker-loop" for t in threading.enumerate()),
        "the loop's thread is gone",
        PATIENCE,
    )
