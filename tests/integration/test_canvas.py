"""Chains, groups and chords with a worker, on each store that can carry them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_taskworker import ChordError, GroupResult, chain, chord, group, states
from flask_taskworker.canvas.plan import Plan, Planner
from flask_taskworker.exceptions import ChordNotSupportedError, TaskRevokedError
from support.canvas_room import CanvasRoom
from support.waiting import wait_until

PATIENCE = 30.0
services = pytest.mark.services

STORES: dict[str, Callable[[pytest.FixtureRequest], dict[str, Any]]] = {
    "sqlite": lambda request: {},
    "postgresql": lambda request: {
        "TASKER_DRIVER": "postgresql",
        "TASKER_DATABASE_URI": request.getfixturevalue("postgresql_url"),
    },
    "mysql": lambda request: {
        "TASKER_DRIVER": "mysql",
        "TASKER_DATABASE_URI": request.getfixturevalue("mysql_url"),
    },
    "redis": lambda request: {"TASKER_BROKER_URL": request.getfixturevalue("redis_url")},
    "memory": lambda request: {"TASKER_ENGINE": "memory"},
    "rpc": lambda request: {"TASKER_BROKER_URL": request.getfixturevalue("amqp_url")},
    "amqp+redis": lambda request: {
        "TASKER_BROKER_URL": request.getfixturevalue("amqp_url"),
        "TASKER_RESULT_BACKEND": request.getfixturevalue("redis_url"),
    },
    "redis+sqlite": lambda request: {
        "TASKER_BROKER_URL": request.getfixturevalue("redis_url"),
        "TASKER_RESULT_BACKEND": "sqlite:///results.db",
    },
}
LOCAL = ("sqlite", "memory")


@pytest.fixture(
    params=[pytest.param(s, id=s, marks=[] if s in LOCAL else [services]) for s in STORES]
)
def room(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[CanvasRoom]:
    settings = {"TASKER_DEBUG": False, **STORES[request.param](request)}
    room = CanvasRoom(settings, tmp_path, unique)
    with room.working():
        yield room
    room.close()


without_rpc = pytest.mark.not_on("rpc")


def stored(room: CanvasRoom, task_id: str) -> Any:
    return room.task_app.backend.fetch(task_id)


# -- callbacks ----------------------------------------------------------------------------


def test_callbacks_get_the_result(room: CanvasRoom) -> None:
    first, second = uuid.uuid4().hex, uuid.uuid4().hex
    links = [room.noted.s(), room.noted.si(second)]
    room.ident.apply_async((first,), link=links)
    wait_until(lambda: len(room.count("noted")) == 2, "both callbacks", PATIENCE)
    assert room.count("noted") == {first: 1, second: 1}


@without_rpc
def test_children_are_what_was_sent_and_what_came_next(room: CanvasRoom) -> None:
    handle = room.spawn.apply_async((2,), link=room.ident.s())
    assert handle.get(timeout=PATIENCE) == 2
    children = handle.children
    assert children is not None
    assert [child.get(timeout=PATIENCE) for child in children] == [0, 2, 2]
    assert [value for _, value in handle.collect(timeout=PATIENCE)] == [2, 0, 2, 2]


@pytest.mark.parametrize("kind", ["errback", "errback_old"])
def test_errbacks_are_called_after_the_failure_is_stored(room: CanvasRoom, kind: str) -> None:
    handle = room.fail.apply_async((), link_error=getattr(room, kind).s())
    with pytest.raises(ValueError, match="boom"):
        handle.get(timeout=PATIENCE)
    wait_until(lambda: room.count(kind), kind, PATIENCE)
    ((value, times),) = room.count(kind).items()
    assert (value[0], times) == (handle.id, 1)
    if kind == "errback":
        assert value[1] == "ValueError('boom')"
    elif room.task_app.config.result_backend != "rpc://":
        assert value[1] == states.FAILURE


# -- chains -------------------------------------------------------------------------------


def test_a_chain_gives_each_the_result_of_the_one_before(room: CanvasRoom) -> None:
    handle = chain(room.add.s(1, 2), room.again.s(), room.add.s(4)).delay()
    assert handle.get(timeout=PATIENCE) == 7
    assert handle.parent.get(timeout=PATIENCE) == 3
    assert handle.parent.parent.get(timeout=PATIENCE) == 3
    assert handle.parent.parent.parent is None


def test_a_failed_step_fails_all_that_come_later(room: CanvasRoom) -> None:
    steps = room.add.s(1, 1) | room.fail.s() | room.add.s(1) | room.add.s(2)
    handle = steps.apply_async(link_error=room.errback.s())
    with pytest.raises(ValueError, match="boom"):
        handle.get(timeout=PATIENCE)
    wait_until(lambda: room.count("errback"), "the errback", PATIENCE)
    failed = handle.parent.parent
    assert room.count("errback") == {(failed.id, "ValueError('boom', 2)"): 1}
    assert failed.parent.get(timeout=PATIENCE) == 2
    assert handle.parent.get(timeout=PATIENCE, propagate=False).args == ("boom", 2)


def test_an_expired_step_ends_the_chain(room: CanvasRoom) -> None:
    handle = chain(room.add.s(1, 1), room.add.s(1).set(expires=-0.0), room.add.s(1)).delay()
    with pytest.raises(TaskRevokedError, match="expired"):
        handle.get(timeout=PATIENCE)


def test_a_long_chain_runs(room: CanvasRoom) -> None:
    handle = chain(room.add.s(0, 1), *(room.add.s(1) for _ in range(60))).delay()
    assert handle.get(timeout=PATIENCE) == 61


# -- groups -------------------------------------------------------------------------------


def test_a_group_gives_a_list(room: CanvasRoom) -> None:
    handle = group(room.add.s(i, i) for i in range(20)).delay()
    assert handle.get(timeout=PATIENCE) == [2 * i for i in range(20)]
    assert handle.successful()
    assert handle.completed_count() == 20


@without_rpc
def test_a_group_is_found_again_by_its_id(room: CanvasRoom) -> None:
    handle = group(room.add.s(1, 1), room.fail.s()).delay()
    handle.save()
    again = room.task_worker.GroupResult(handle.id)
    assert again == handle
    assert again.get(timeout=PATIENCE, propagate=False)[0] == 2
    with pytest.raises(ValueError, match="boom"):
        again.get(timeout=PATIENCE)
    handle.delete()
    assert room.task_worker.GroupResult(handle.id) is None


# -- chords -------------------------------------------------------------------------------


@without_rpc
def test_a_chord_gives_its_body_the_results_in_order(room: CanvasRoom) -> None:
    handle = chord([room.ident.s(i) for i in range(20)])(room.ident.s())
    assert handle.get(timeout=PATIENCE) == list(range(20))
    assert isinstance(handle.parent, GroupResult)
    assert handle.parent.get(timeout=PATIENCE) == list(range(20))


#: What is put together, and what comes of it.
FITTING: dict[str, tuple[Callable[[CanvasRoom], Any], Any]] = {
    "group in a chain": (
        lambda r: chain(r.add.s(1, 1), group(r.add.s(1), r.add.s(2)), r.xsum.s(), r.add.s(5)),
        12,
    ),
    "group as body": (
        lambda r: group(r.add.s(1, 1), r.add.s(2, 2)) | group(r.ident.s(), r.xsum.s()),
        [[2, 4], 6],
    ),
    "group in a group": (
        lambda r: group(group(r.add.s(1, 1), r.add.s(2, 2)), r.add.s(3, 3)) | r.ident.s(),
        [2, 4, 6],
    ),
    "chord in a header": (
        lambda r: chord([r.ident.s(1), chord([r.ident.s(2)], r.xsum.s())], r.ident.s()),
        [1, 2],
    ),
    "header that ends in a group": (
        lambda r: chord([r.add.s(1, 1) | group(r.add.s(1), r.add.s(2)), r.ident.s(9)], r.ident.s()),
        [[3, 4], 9],
    ),
    "header of chains": (
        lambda r: chord([r.ident.s(1) | r.add.s(1), r.ident.s(2) | r.add.s(2)], r.ident.s()),
        [2, 4],
    ),
    "empty header": (lambda r: chord([], r.ident.s()), []),
    "chain as body": (
        lambda r: chord([r.ident.s(1)], r.ident.s() | r.xsum.s() | r.add.s(1)),
        2,
    ),
    "two chords": (
        lambda r: (
            group(r.ident.s(1), r.ident.s(2))
            | r.xsum.s()
            | group(r.add.s(1), r.add.s(2))
            | r.xsum.s()
        ),
        9,
    ),
    "chord as body": (
        lambda r: chord(
            [r.ident.s(1), r.ident.s(2)], chord([r.xsum.s(), r.ident.s()], r.ident.s())
        ),
        [3, [1, 2]],
    ),
    "chunks": (
        lambda r: r.add.chunks([(i, i) for i in range(5)], 2) | r.ident.s(),
        [[0, 2], [4, 6], [8]],
    ),
    "starmap": (lambda r: r.add.starmap([(1, 2), (3, 4)]) | r.xsum.s(), 10),
}


@without_rpc
@pytest.mark.parametrize("what", FITTING)
def test_what_is_put_together_fits(room: CanvasRoom, what: str) -> None:
    make, expected = FITTING[what]
    assert make(room).delay().get(timeout=PATIENCE) == expected


@without_rpc
def test_a_header_whose_results_are_ignored_is_counted(room: CanvasRoom) -> None:
    handle = chord([room.silent.s(i) for i in range(3)])(room.ident.s())
    assert handle.get(timeout=PATIENCE) == [0, 1, 2]


@without_rpc
def test_a_retried_task_of_a_header_is_counted_once(room: CanvasRoom) -> None:
    handle = chord([room.again.s(i) for i in range(3)])(room.ident.s())
    assert handle.get(timeout=PATIENCE) == [0, 1, 2]


@without_rpc
def test_a_failed_header_fails_the_body_and_what_follows(room: CanvasRoom) -> None:
    body = room.xsum.s().on_error(room.errback.s())
    handle = (chord([room.add.s(1, 1), room.fail.s(7)], body) | room.add.s(1)).delay()
    with pytest.raises(ValueError, match="boom"):
        handle.get(timeout=PATIENCE)  # the error of the header comes first
    wait_until(lambda: room.count("errback"), "the errback", PATIENCE)
    ended = handle.parent
    error = ended.get(timeout=PATIENCE, propagate=False)
    assert isinstance(error, ChordError)
    failed = ended.parent[1]
    assert str(error) == f"Dependency {failed.id} raised ValueError('boom', 7)"
    assert isinstance(handle.get(timeout=PATIENCE, propagate=False), ChordError)
    ((called, times),) = room.count("errback").items()
    assert (called[0], times) == (ended.id, 1)
    assert not room.count("xsum")


@without_rpc
def test_a_failed_header_fails_each_task_of_a_group_as_body(room: CanvasRoom) -> None:
    handle = chord([room.fail.s()])(group(room.ident.s(), room.xsum.s()))
    for member in handle:
        with pytest.raises(ValueError, match="boom"):
            member.get(timeout=PATIENCE)


@without_rpc
def test_a_chord_that_fails_in_a_header_fails_the_outer_one(room: CanvasRoom) -> None:
    inner = chord([room.fail.s()], room.xsum.s())
    handle = chord([room.ident.s(1), inner], room.ident.s()).delay()
    with pytest.raises(ChordError):
        handle.get(timeout=PATIENCE, follow_parents=False)


@without_rpc
def test_the_body_runs_once_when_all_end_at_once_and_each_is_delivered_twice(
    room: CanvasRoom,
) -> None:
    with room.working():  # a second worker
        planner = Planner(room.task_app)
        handle = chord([room.meet.s(i) for i in range(6)], room.xsum.s()).plan(planner)
        twice = Plan(planner.plan.messages * 2, planner.plan.chords)
        room.task_app.carry_out(twice)
        room.gate.set()
        assert handle.get(timeout=PATIENCE) == 15
        room.add.delay(1, 1).get(timeout=PATIENCE)
        assert wait_until(lambda: room.task_app.publisher.queue_size(room.queue) == 0, "", PATIENCE)
    assert room.count("xsum") == {handle.id: 1}


@pytest.mark.only_on("rpc")
def test_a_chord_without_a_store_is_refused_where_it_is_sent(room: CanvasRoom) -> None:
    with pytest.raises(
        ChordNotSupportedError, match=r"rpc keeps no groups .* TASKER_RESULT_BACKEND"
    ):
        chord([room.add.s(1, 1)])(room.xsum.s())
    handle = chain(room.ident.s(1), group(room.add.s(1), room.add.s(2)), room.xsum.s()).delay()
    with pytest.raises(ChordNotSupportedError):
        handle.parent.parent.get(timeout=PATIENCE)


# -- replaced -----------------------------------------------------------------------------


@without_rpc
@pytest.mark.parametrize(
    ("name", "expected"),
    [("replaced", 6), ("replaced_by_chain", 16), ("replaced_by_group", [6, 7])],
)
def test_what_replaces_a_task_takes_its_place(room: CanvasRoom, name: str, expected: Any) -> None:
    task = getattr(room, name)
    assert task.delay(5).get(timeout=PATIENCE) == expected
    assert (
        chain(room.ident.s(5), task.s(), room.ident.s()).delay().get(timeout=PATIENCE) == expected
    )
    handle = chord([task.s(5), room.ident.s(1)])(room.ident.s())
    assert handle.get(timeout=PATIENCE) == [expected, 1]


@without_rpc
def test_a_task_is_added_to_a_running_chord(room: CanvasRoom) -> None:
    handle = chord([room.joined.s(1), room.ident.s(2)])(room.xsum.s())
    assert handle.get(timeout=PATIENCE) == 1 + 101 + 2
