"""Tasks: called here and now, sent with checked arguments, aware of the run they are in."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from flask_taskworker import Request, Task, current_request
from flask_taskworker.exceptions import (
    EncodeError,
    InvalidOptionError,
    NotInitialisedError,
    TaskArgumentError,
    TaskDefinitionError,
    UnknownOptionError,
)
from flask_taskworker.message import Payload, TaskMessage
from flask_taskworker.task import running
from support import AppRoom, FakeClock, make_task_app


def last(room: AppRoom) -> TaskMessage:
    return room.publisher.published[-1][0]


@pytest.fixture
def add(room: AppRoom) -> Any:
    @room.task_worker.define_task
    def add(x: int, y: int) -> int:
        """Add two numbers."""
        return x + y

    return add


@pytest.fixture
def mail(room: AppRoom) -> Any:
    @room.task_worker.define_task
    def mail(**kwargs: Any) -> dict[str, Any]:
        return kwargs

    return mail


# -- here and now -------------------------------------------------------------------------


def test_a_plain_call_runs_the_function_here(add: Any, room: AppRoom) -> None:
    assert add(1, 2) == 3
    assert add(x=1, y=2) == 3
    assert room.publisher.published == []


def test_a_plain_call_raises_what_the_function_raises(room: AppRoom) -> None:
    @room.task_worker.define_task
    def broken() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        broken()


def test_a_bound_task_gets_itself(room: AppRoom) -> None:
    @room.task_worker.define_task(bind=True)
    def who(self: Task[..., Any], x: int) -> Any:
        return self, x, self.request.called_directly

    assert who(5) == (who, 5, True)


def test_a_task_looks_like_its_function(add: Any) -> None:
    assert add.__name__ == "add"
    assert add.__doc__ == "Add two numbers."
    assert add.__module__ == __name__
    assert list(inspect.signature(add).parameters) == ["x", "y"]
    assert repr(add) == f"<Task {__name__}.add>"


def test_something_that_cannot_be_called_is_no_task() -> None:
    with pytest.raises(TaskDefinitionError, match=r"needs a function, not 'mail'\. Options go by"):
        Task("mail", lambda: None)  # type: ignore[arg-type,return-value]


def test_options_are_checked_where_the_task_is_defined(room: AppRoom) -> None:
    with pytest.raises(UnknownOptionError, match="Did you mean 'queue'"):
        room.task_worker.define_task(queu="mail")(print)  # type: ignore[call-overload]
    with pytest.raises(InvalidOptionError, match="priority=99"):

        @room.task_worker.define_task(priority=99)
        def urgent() -> None: ...

    assert len(room.task_worker.registry) == 0


# -- sending ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["apply", "delay"])
def test_apply_and_delay_queue_the_call(way: str, add: Any, room: AppRoom) -> None:
    handle = getattr(add, way)(1, y=2)
    message, queue = room.publisher.published[0]
    assert message.task == add.name
    assert message.payload == Payload((1,), {"y": 2})
    assert queue == room.task_app.config.default_queue
    assert handle.id == message.id == message.root_id
    assert len(room.publisher.published) == 1


def test_each_call_has_an_id_of_its_own(add: Any) -> None:
    ids = {add.delay(1, 2).id for _ in range(20)}
    assert len(ids) == 20
    for task_id in ids:
        read = uuid.UUID(task_id)
        assert str(read) == task_id
        assert (read.version, read.variant) == (4, uuid.RFC_4122)


def test_apply_takes_one_mapping_as_the_payload(mail: Any, room: AppRoom) -> None:
    mail.apply({"to": "a@example.org", "n": 1})
    assert last(room).payload == Payload((), {"to": "a@example.org", "n": 1})
    mail.options(countdown=5).apply({"to": "b@example.org"})
    assert last(room).payload == Payload((), {"to": "b@example.org"})


def test_apply_leaves_a_mapping_alone_where_it_can_be_an_argument(room: AppRoom) -> None:
    @room.task_worker.define_task
    def store(record: Mapping[str, Any]) -> None: ...

    store.apply({"a": 1})
    assert last(room).payload == Payload(({"a": 1},), {})


def test_only_apply_and_only_a_single_mapping_is_a_payload(mail: Any) -> None:
    for call in (
        lambda: mail.delay({"to": "a"}),
        lambda: mail.apply({"to": "a"}, {"n": 1}),
        lambda: mail.apply({"to": "a"}, n=1),
        lambda: mail.apply([("to", "a")]),
        lambda: mail.apply({1: 2}),
    ):
        with pytest.raises(TaskArgumentError):
            call()


def test_arguments_that_do_not_fit_are_refused_before_anything_is_queued(
    add: Any, room: AppRoom
) -> None:
    for call in (
        lambda: add.delay(1),
        lambda: add.apply(1, 2, 3),
        lambda: add.apply_async((1,), {"z": 2}),
        lambda: add.options(countdown=1).delay(),
    ):
        with pytest.raises(TaskArgumentError, match=r"test_task\.add\(x: 'int', y: 'int'\): "):
            call()
    assert room.publisher.published == []


def test_arguments_that_cannot_be_serialized_are_refused(add: Any, room: AppRoom) -> None:
    with pytest.raises(EncodeError, match=r"argument 'y' of task .*add' cannot be serialized"):
        add.delay(1, y=object())
    assert room.publisher.published == []


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ("ab", None, r"args is 'ab', not a list or tuple.*write apply_async\(args=\['ab'\]\)"),
        (5, None, "args is 5, not a list or tuple"),
        ({"x": 1}, None, "args is {'x': 1}, not"),
        (None, [1], r"kwargs is \[1\], not a mapping"),
    ],
)
def test_apply_async_wants_a_list_and_a_mapping(
    args: Any, kwargs: Any, words: str, add: Any
) -> None:
    with pytest.raises(TaskArgumentError, match=words):
        add.apply_async(args, kwargs)


def test_apply_async_writes_its_options_into_the_message(
    add: Any, room: AppRoom, clock: FakeClock
) -> None:
    handle = add.apply_async(
        [1],
        {"y": 2},
        countdown=10,
        expires=timedelta(minutes=1),
        task_id="my-id",
        queue="sums",
        priority=7,
        headers={"x-trace": "abc"},
        serializer="json",
        compression="gzip",
        ignore_result=True,
        shadow="alias",
        retry=False,
        retry_policy={"max_retries": 1},
    )
    message, queue = room.publisher.published[0]
    assert handle.id == message.id == "my-id"
    assert queue == "sums"
    assert message.payload == Payload([1], {"y": 2})
    assert message.eta == clock.at(10)
    assert message.expires == clock.at(60)
    assert message.priority == 7
    assert message.headers == {"x-trace": "abc"}
    assert message.ignore_result is True
    assert message.shadow == "alias"
    options = room.publisher.options[0]
    assert options["serializer"] == "json"
    assert options["compression"] == "gzip"
    assert options["retry"] is False
    assert options["retry_policy"] == {"max_retries": 1}


def test_times_may_be_moments(add: Any, room: AppRoom, clock: FakeClock) -> None:
    add.apply_async((1, 2), eta=clock.at(60), expires=clock.at(120))
    assert (last(room).eta, last(room).expires) == (clock.at(60), clock.at(120))
    add.apply_async((1, 2), countdown=0)
    assert last(room).eta is None
    assert last(room).priority == 0


def test_the_options_of_a_task_are_the_defaults_of_its_calls(
    room: AppRoom, clock: FakeClock
) -> None:
    @room.task_worker.define_task(
        queue="reports", priority=3, expires=60, ignore_result=True, compression="gzip"
    )
    def report() -> None: ...

    report.delay()
    message, queue = room.publisher.published[0]
    assert (queue, message.priority, message.ignore_result) == ("reports", 3, True)
    assert message.expires == clock.at(60)
    assert room.publisher.options[0]["compression"] == "gzip"

    report.apply_async(queue="other", priority=0, expires=5, ignore_result=False, compression=None)
    message, queue = room.publisher.published[1]
    assert (queue, message.priority, message.ignore_result) == ("other", 0, False)
    assert message.expires == clock.at(5)
    assert room.publisher.options[1]["compression"] is None


def test_options_keep_the_call_and_can_be_used_again(add: Any, room: AppRoom) -> None:
    urgent = add.options(priority=9, queue="fast")
    urgent.delay(1, 2)
    urgent.apply(3, y=4)
    assert [message.payload for message, _ in room.publisher.published] == [
        Payload((1, 2), {}),
        Payload((3,), {"y": 4}),
    ]
    assert {(m.priority, queue) for m, queue in room.publisher.published} == {(9, "fast")}
    with pytest.raises(UnknownOptionError, match="Did you mean 'countdown'"):
        add.options(countdwn=5)


@pytest.mark.parametrize("value", [datetime(2026, 1, 1), "soon"])
def test_a_wrong_option_queues_nothing(value: Any, add: Any, room: AppRoom) -> None:
    with pytest.raises(InvalidOptionError):
        add.apply_async((1, 2), eta=value)
    assert room.publisher.published == []


def test_results_may_be_switched_off_for_all() -> None:
    room = make_task_app(TASKER_IGNORE_RESULT=True)

    @room.task_worker.define_task
    def quiet() -> None: ...

    @room.task_worker.define_task(ignore_result=False)
    def loud() -> None: ...

    quiet.delay()
    loud.delay()
    assert [message.ignore_result for message, _ in room.publisher.published] == [True, False]


def test_a_handle_is_found_again_by_its_id(add: Any) -> None:
    sent = add.delay(1, 2)
    assert add.AsyncResult(sent.id) == sent
    assert add.AsyncResult(sent.id).state == "PENDING"


# -- inside a run -------------------------------------------------------------------------


def test_outside_a_run_the_request_says_so(add: Any) -> None:
    assert add.request == current_request() == Request()
    assert add.request.called_directly
    assert add.request.id is None


def test_inside_a_run_the_request_is_that_run(add: Any) -> None:
    with running(Request(id="outer", called_directly=False)):
        with running(Request(id="inner", called_directly=False)):
            assert add.request.id == "inner"
        assert current_request().id == "outer"
    assert current_request().id is None


def test_a_call_from_inside_a_run_names_its_parent_and_its_root(add: Any, room: AppRoom) -> None:
    with running(Request(id="parent", root_id="root", called_directly=False)):
        child = add.delay(1, 2)
    assert (last(room).parent_id, last(room).root_id) == ("parent", "root")
    assert child.id == last(room).id not in {"parent", "root"}


def test_retry_needs_a_run(add: Any) -> None:
    with pytest.raises(NotInitialisedError, match=r"add\.retry\(\) only works while a worker runs"):
        add.retry()
    with pytest.raises(KeyError):
        add.retry(KeyError("the cause"))


def test_an_aware_time_of_another_zone_means_the_same_moment(add: Any, room: AppRoom) -> None:
    there = datetime.now(timezone(timedelta(hours=9))) + timedelta(minutes=5)
    add.apply_async((1, 2), eta=there)
    assert last(room).eta == there
