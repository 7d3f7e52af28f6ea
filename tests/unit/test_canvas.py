"""Signatures, and what is made of them, before anything is sent."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

from flask_taskworker import Signature, Task, chain, chord, group, signature, states
from flask_taskworker.canvas import Chain, Chord, Group, maybe_signature
from flask_taskworker.exceptions import (
    ChordError,
    InvalidOptionError,
    InvalidSignatureError,
    NotInitialisedError,
    TaskArgumentError,
    UnknownOptionError,
)
from flask_taskworker.message import Payload
from flask_taskworker.worker.delivery import Settlement
from flask_taskworker.worker.executor import Executor
from support import AppRoom, deliver, make_task_app


@pytest.fixture
def add(room: AppRoom) -> Task[..., Any]:
    return room.task_worker.define_task(name="add")(lambda x, y=0: x + y)


# -- signatures ---------------------------------------------------------------------------


def test_a_signature_is_plain_data_with_six_keys(add: Task[..., Any]) -> None:
    made = add.s(1, y=2).set(queue="mail")
    assert json.loads(json.dumps(made)) == {
        "task": "add",
        "args": [1],
        "kwargs": {"y": 2},
        "options": {"queue": "mail"},
        "subtask_type": None,
        "immutable": False,
    }


@pytest.mark.parametrize("how", ["json", "pickle", "deepcopy", "clone"])
def test_a_signature_survives_copying(add: Task[..., Any], how: str) -> None:
    whole = chain(add.s(1), group(add.s(2), add.s(3)), add.s(4)).set(link=add.s(9))
    ways = {
        "json": lambda: signature(json.loads(json.dumps(whole))),
        "pickle": lambda: pickle.loads(pickle.dumps(whole)),
        "deepcopy": lambda: copy.deepcopy(whole),
        "clone": whole.clone,
    }
    other = ways[how]()
    assert json.dumps(other) == json.dumps(whole)
    assert type(other) is type(whole)
    other.tasks[0].args = (7,)
    assert whole.tasks[0].args == (1,)


def test_the_arguments_of_the_call_come_first(room: AppRoom, add: Task[..., Any]) -> None:
    add.s(2).delay(10)
    add.s(y=2).delay(1)
    add.si(2).apply_async((10,), queue="mail")
    payloads = [message.payload[:2] for message, _ in room.publisher.published]
    assert payloads == [((10, 2), {}), ((1,), {"y": 2}), ((2,), {})]
    assert [queue for _, queue in room.publisher.published][2] == "mail"


def test_options_of_the_call_win(room: AppRoom, add: Task[..., Any]) -> None:
    add.s(1).set(priority=3, shadow="a").apply_async(priority=4)
    ((message, _),) = room.publisher.published
    assert (message.priority, message.shadow) == (4, "a")


def test_a_direct_call_runs_inline(add: Task[..., Any]) -> None:
    assert add.s(1)(2) == 3


def test_wrong_arguments_are_refused_where_it_is_sent(add: Task[..., Any]) -> None:
    with pytest.raises(TaskArgumentError, match="too many positional"):
        add.s(1, 2).delay(3)


def test_a_misspelt_option_is_refused_where_it_is_set(add: Task[..., Any]) -> None:
    with pytest.raises(UnknownOptionError, match="Did you mean 'countdown'"):
        add.s(1).set(countdwn=3)
    with pytest.raises(UnknownOptionError, match="queu"):
        add.s(1).apply_async(queu="mail")
    with pytest.raises(InvalidOptionError, match="link"):
        add.apply_async((1,), link=add)  # type: ignore[arg-type]


def test_links_are_collected_once(add: Task[..., Any]) -> None:
    made = add.s(1)
    assert made.link(add.s(2)) == add.s(2)
    made.link(add.s(2))
    assert made.on_error(add.s(3)) is made
    assert made.options == {"link": [add.s(2)], "link_error": [add.s(3)]}


def test_a_name_needs_an_app(room: AppRoom) -> None:
    with pytest.raises(NotInitialisedError, match="'elsewhere' knows no app"):
        signature("elsewhere").delay()
    room.task_worker.signature("elsewhere", (1,)).delay()
    signature("elsewhere", app=room.task_worker).delay()
    assert [message.task for message, _ in room.publisher.published] == ["elsewhere"] * 2


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (5, "not even a mapping"),
        ({}, "names no task"),
        ({"task": 5}, "names no task"),
        ({"task": "a", "args": 5}, "has args 5, not a list"),
        ({"task": "a", "kwargs": []}, r"has kwargs \[\], not a dict"),
        ({"task": "a", "options": "x"}, "has options 'x', not a dict"),
        ({"task": "celery.chain", "subtask_type": "chain"}, "has no list of tasks"),
        ({"task": "a", "subtask_type": "group", "kwargs": {"tasks": [5]}}, "no signature"),
        ({"task": "celery.chord", "subtask_type": "chord"}, "has no header"),
    ],
)  # fmt: skip
def test_what_is_no_signature_is_refused_with_a_reason(fields: Any, text: str) -> None:
    with pytest.raises(InvalidSignatureError, match=text):
        Signature.from_dict(fields)


def test_missing_keys_have_defaults() -> None:
    assert Signature.from_dict({"task": "a"}) == {
        "task": "a", "args": [], "kwargs": {}, "options": {}, "subtask_type": None,
        "immutable": False,
    }  # fmt: skip
    assert maybe_signature(None) is None


# -- putting together ---------------------------------------------------------------------


def shape(made: Any) -> Any:
    """What is in what."""
    if isinstance(made, Chord):
        return ("chord", [shape(task) for task in made.tasks], shape(made.body))
    if isinstance(made, (Chain, Group)):
        return (type(made).__name__.lower(), [shape(task) for task in made.tasks])
    return made.args[0]


def test_what_stands_in_line_is_a_chain_and_a_group_before_a_task_is_a_chord(
    add: Task[..., Any],
) -> None:
    a, b, c, d = (add.s(number) for number in range(4))
    pair = group(c, d)
    cases: list[tuple[Any, Any]] = [
        (a | b, ("chain", [0, 1])),
        (a | b | c, ("chain", [0, 1, 2])),
        ((a | b) | (c | d), ("chain", [0, 1, 2, 3])),
        (chain(a, chain(b, c)), ("chain", [0, 1, 2])),
        (chain([a, b]), ("chain", [0, 1])),
        (chain(x for x in (a, b)), ("chain", [0, 1])),
        (pair | a, ("chord", [2, 3], 0)),
        (chain(pair, a), ("chord", [2, 3], 0)),
        (pair | a | b, ("chain", [("chord", [2, 3], 0), 1])),
        (a | pair, ("chain", [0, ("group", [2, 3])])),
        (a | pair | b, ("chain", [0, ("chord", [2, 3], 1)])),
        (a | group(b), ("chain", [0, 1])),
        (chain(group(a), b), ("chain", [0, 1])),
        (group(a) | b, ("chord", [0], 1)),
        (pair | group(a, b), ("chord", [2, 3], ("group", [0, 1]))),
        (a | group(), ("chain", [0])),
        (chord(pair, a) | b, ("chain", [("chord", [2, 3], 0), 1])),
    ]
    for made, expected in cases:
        assert shape(made) == expected


def test_what_was_put_together_is_not_changed(add: Task[..., Any]) -> None:
    parts = [add.s(1), add.s(2), group(add.s(3), add.s(4)), add.s(5)]
    before = json.dumps(parts)
    chain(*parts).set(link=add.s(9)).delay()
    assert json.dumps(parts) == before


def test_each_sending_has_ids_of_its_own(room: AppRoom, add: Task[..., Any]) -> None:
    whole = add.s(1) | group(add.s(2), add.s(3)) | add.s(4)
    assert whole.delay().id != whole.delay().id


def test_frozen_ids_are_those_that_are_sent(room: AppRoom, add: Task[..., Any]) -> None:
    whole = chord([add.s(1), add.s(2)], add.s())
    frozen = whole.freeze()
    sent = whole.delay()
    assert sent.id == frozen.id
    assert sent.parent == frozen.parent
    assert [message.id for message, _ in room.publisher.published] == [
        handle.id for handle in frozen.parent
    ]


def test_a_group_takes_no_link(add: Task[..., Any]) -> None:
    with pytest.raises(TaskArgumentError, match="a group takes no link"):
        group(add.s(1), add.s(2)).apply_async(link=add.s())


def test_a_task_that_was_not_made_a_signature_is_refused(add: Task[..., Any]) -> None:
    with pytest.raises(TaskArgumentError, match=r"write task\.s"):
        chain(add, add)
    with pytest.raises(TaskArgumentError, match="has no body"):
        chord([add.s(1)]).delay()
    with pytest.raises(TaskArgumentError, match="at least 1"):
        add.chunks([(1,)], 0)


def test_nothing_comes_of_nothing(room: AppRoom, add: Task[..., Any]) -> None:
    assert chain()() is None
    assert group(app=room.task_worker).delay().get(timeout=0) == []
    assert room.publisher.published == []


def test_built_in_tasks_are_found_but_not_listed(room: AppRoom) -> None:
    registry = room.task_app.registry
    assert "celery.accumulate" in registry
    assert registry["celery.chord_unlock"].name == "celery.chord_unlock"
    assert list(registry) == []
    assert len(registry) == 0


# -- what a worker makes of bad messages ----------------------------------------------------


def run(room: AppRoom, task: Task[..., Any], **payload: Any) -> tuple[Any, Any]:
    """Run a message with this embedded; return settlement and record."""
    delivery = deliver(task, 1)
    embedded = delivery.message.payload._replace(**payload)
    assert isinstance(embedded, Payload)
    delivery.message = delivery.message.copy(payload=embedded)
    outcome = Executor(room.task_app, "w@test").run(delivery)
    return outcome.settlement, room.task_app.backend.fetch(delivery.message.id)


@pytest.mark.parametrize(
    "payload",
    [
        {"callbacks": [{"task": "add", "args": 5}]},
        {"chain": [{"task": "celery.chord", "subtask_type": "chord", "kwargs": {}}]},
        {"chain": [{"task": "add", "options": {"eta": "soon"}}]},
        {"callbacks": [{"task": "add", "options": {"expires": [1]}}]},
    ],
)
def test_a_malformed_signature_is_a_failure_with_its_reason(
    room: AppRoom, add: Task[..., Any], payload: dict[str, Any]
) -> None:
    settlement, record = run(room, add, **payload)
    assert settlement is Settlement.ACKNOWLEDGE
    assert record.status == states.FAILURE
    assert record.result["exc_type"] == "InvalidTaskError"
    assert room.publisher.published == []


def test_a_result_that_cannot_be_kept_is_not_passed_on(room: AppRoom) -> None:
    odd = room.task_worker.define_task(name="odd")(lambda x: {1, 2})
    _, record = run(room, odd, callbacks=[{"task": "add", "immutable": True}])
    assert record.result["exc_type"] == "EncodeError"
    assert room.publisher.published == []


def test_a_malformed_errback_does_not_hide_the_others(room: AppRoom) -> None:
    fail = room.task_worker.define_task(name="fail")(lambda x: 1 / 0)
    settlement, record = run(room, fail, errbacks=[{"task": "a", "args": 5}, {"task": "b"}])
    assert settlement is Settlement.ACKNOWLEDGE
    assert record.status == states.FAILURE
    assert [message.task for message, _ in room.publisher.published] == ["b"]


def test_an_inline_errback_that_raises_changes_nothing(
    room: AppRoom, caplog: pytest.LogCaptureFixture
) -> None:
    fail = room.task_worker.define_task(name="fail")(lambda x: 1 / 0)
    broken = room.task_worker.define_task(name="broken")(lambda request, exc, tb: 1 / 0)
    settlement, record = run(room, fail, errbacks=[broken.s()])
    assert (settlement, record.status) == (Settlement.ACKNOWLEDGE, states.FAILURE)
    assert "errback broken() of task fail" in caplog.text


def test_the_broker_away_puts_the_task_back(room: AppRoom, add: Task[..., Any]) -> None:
    room.publisher.error = ConnectionError("away")
    delivery = deliver(add, 1)
    embedded = delivery.message.payload._replace(callbacks=[add.s()])
    delivery.message = delivery.message.copy(payload=embedded)
    executor = Executor(room.task_app, "w@test")
    executor.close()
    outcome = executor.run(delivery)
    assert outcome.settlement is Settlement.REQUEUE
    assert outcome.reason == "what comes next could not be stored: ConnectionError: away"
    assert room.task_app.backend.fetch(delivery.message.id) is None


# -- eagerly ------------------------------------------------------------------------------


def test_a_canvas_runs_eagerly() -> None:
    room = make_task_app(TASKER_ALWAYS_EAGER=True)
    add = room.task_worker.define_task(name="add")(lambda x, y=0: x + y)
    total = room.task_worker.define_task(name="total")(sum)
    fail = room.task_worker.define_task(name="fail")(lambda *args: 1 / 0)
    assert chain(add.s(1, 1), group(add.s(1), add.s(2)), total.s()).delay().get(timeout=0) == 7
    assert chain(add.s(0, 1), *(add.s(1) for _ in range(500))).delay().get(timeout=0) == 501
    assert group(add.s(i) for i in range(3)).delay().get(timeout=0) == [0, 1, 2]
    failed = chord([add.s(1), fail.s()])(total.s())
    with pytest.raises(ZeroDivisionError):
        failed.get(timeout=0)
    assert isinstance(failed.result, ChordError)
    assert room.publisher.published == []


def test_a_failure_is_raised_at_once_if_that_is_asked_for() -> None:
    room = make_task_app(TASKER_ALWAYS_EAGER=True, TASKER_EAGER_PROPAGATES=True)
    fail = room.task_worker.define_task(name="fail")(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        chain(fail.s(), fail.s()).delay()
