"""What every result backend promises, on each of them; and Redis shared with Celery."""

from __future__ import annotations

import math
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from flask_taskworker import AsyncResult, TaskFailedError, TaskRevokedError, states
from flask_taskworker.backends import create_backend
from flask_taskworker.backends.base import ResultBackend, TaskRecord
from flask_taskworker.backends.encoding import encode_exception, format_traceback
from flask_taskworker.config import Config
from flask_taskworker.exceptions import EncodeError, ResultTimeoutError
from flask_taskworker.publisher import Publisher
from support.celery_client import celery_client
from support.waiting import wait_until

PATIENCE = 20.0
services = pytest.mark.services

BACKENDS: dict[str, Callable[[pytest.FixtureRequest], dict[str, Any]]] = {
    "sqlite": lambda request: {"TASKER_RESULT_BACKEND": "sqlite:///results.db"},
    "postgresql": lambda request: {
        "TASKER_RESULT_BACKEND": request.getfixturevalue("postgresql_url")
    },
    "mysql": lambda request: {"TASKER_RESULT_BACKEND": request.getfixturevalue("mysql_url")},
    "redis": lambda request: {"TASKER_RESULT_BACKEND": request.getfixturevalue("redis_url")},
    "rpc": lambda request: {"TASKER_BROKER_URL": request.getfixturevalue("amqp_url")},
    "memory": lambda request: {"TASKER_ENGINE": "memory"},
}
LOCAL = ("sqlite", "memory")
DATABASES = ("sqlite", "postgresql", "mysql")


def parameters(*names: str) -> list[Any]:
    return [
        pytest.param(name, id=name, marks=[] if name in LOCAL else [services]) for name in names
    ]


class Store:
    """A backend, as the sender of tasks and as a worker sees it."""

    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        self.config = Config.from_mapping(settings, debug=False, instance_path=str(folder))
        self._publisher = Publisher(self.config)
        self._made: list[ResultBackend] = []
        self.backend = self.another()
        queue = self.backend.reply_queue()
        self._reply_to = queue.name if queue is not None else None
        self.backend.fetch("opens the connection")
        #: Where a worker stores: another object where results leave the process anyway.
        self.worker = self.backend if settings.get("TASKER_ENGINE") == "memory" else self.another()

    def another(self) -> ResultBackend:
        """The backend of another process, as it were."""
        backend = create_backend(self.config, self._publisher.reply)
        self._made.append(backend)
        return backend

    def put(self, status: str, result: Any = None, task_id: str = "", **fields: Any) -> str:
        """Store a record as a worker does; return the id."""
        task_id = task_id or str(uuid.uuid4())
        if isinstance(result, BaseException):
            fields.setdefault("traceback", format_traceback(result))
            result = encode_exception(result)
        record = TaskRecord(task_id, status, result, reply_to=self._reply_to, **fields)
        self.worker.store(record)
        return task_id

    def record(self, task_id: str) -> TaskRecord:
        """The record, once the sender has it."""
        return wait_until(lambda: self.backend.fetch(task_id), "the record", PATIENCE)

    def settled(self, task_id: str, status: str) -> TaskRecord:
        """The record once its state is this, which messages may take a moment for."""

        def reached() -> TaskRecord | None:
            record = self.backend.fetch(task_id)
            return record if record is not None and record.status == status else None

        return wait_until(reached, status, PATIENCE)

    def arrived(self) -> None:
        """Whatever was stored so far has reached the sender."""
        self.record(self.put(states.SUCCESS))

    def handle(self, task_id: str) -> AsyncResult[Any]:
        return AsyncResult(task_id, self.backend)

    def close(self) -> None:
        for backend in self._made:
            backend.close()
        self._publisher.close()


@pytest.fixture(params=parameters(*BACKENDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    made: list[Store] = []

    def make(**settings: Any) -> Store:
        made.append(Store({**BACKENDS[kind](request), **settings}, tmp_path))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(make: Any) -> Store:
    return make()


# -- keeping ----------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was_stored(store: Store) -> None:
    before = datetime.now(timezone.utc)
    value = {"ä": [1, 2.5, None, True, "\u2028"], "big": 2**60}
    task_id = store.put(states.SUCCESS, value, group_id="g1", parent_id="p1")
    record = store.record(task_id)
    assert (record.task_id, record.status, record.result) == (task_id, states.SUCCESS, value)
    assert (record.group_id, record.parent_id) == ("g1", "p1")
    assert record.traceback is None
    assert record.date_done is not None
    slack = timedelta(seconds=1)
    assert before - slack <= record.date_done <= datetime.now(timezone.utc) + slack


def test_nothing_is_known_about_a_task_that_stored_nothing(store: Store) -> None:
    assert store.backend.fetch("nobody") is None
    handle = store.handle("nobody")
    assert (handle.state, handle.result, handle.ready()) == (states.PENDING, None, False)


def test_the_states_on_the_way_are_seen(store: Store) -> None:
    task_id = store.put(states.STARTED, {"pid": 1})
    assert store.settled(task_id, states.STARTED).result == {"pid": 1}
    store.put(states.RETRY, ValueError("once more"), task_id)
    assert store.settled(task_id, states.RETRY).date_done is None
    assert not store.handle(task_id).ready()
    store.put(states.SUCCESS, 7, task_id)
    assert store.settled(task_id, states.SUCCESS).result == 7
    assert store.handle(task_id).get(timeout=PATIENCE) == 7


@pytest.mark.parametrize("late", [states.FAILURE, states.REVOKED, states.RETRY, states.STARTED])
def test_a_success_is_never_replaced(store: Store, late: str) -> None:
    task_id = store.put(states.SUCCESS, "done")
    store.record(task_id)
    store.put(late, ValueError("the second delivery"), task_id)
    store.arrived()
    record = store.record(task_id)
    assert (record.status, record.result) == (states.SUCCESS, "done")


@pytest.mark.parametrize("late", [states.RETRY, states.STARTED])
def test_a_state_on_the_way_does_not_undo_a_failure(store: Store, late: str) -> None:
    task_id = store.put(states.FAILURE, ValueError("the last run"))
    store.record(task_id)
    store.put(late, ValueError("an earlier run, stored late"), task_id)
    store.arrived()
    with pytest.raises(ValueError, match="the last run"):
        store.handle(task_id).get(timeout=PATIENCE)


def test_a_failed_task_that_is_run_again_may_succeed(store: Store) -> None:
    task_id = store.put(states.FAILURE, ValueError("first"))
    store.record(task_id)
    store.put(states.SUCCESS, "second", task_id)
    assert store.settled(task_id, states.SUCCESS).result == "second"


def test_forget_deletes_the_record(store: Store) -> None:
    task_id = store.put(states.SUCCESS, 1)
    store.record(task_id)
    handle = store.handle(task_id)
    assert handle.get(timeout=PATIENCE) == 1
    handle.forget()
    assert store.backend.fetch(task_id) is None
    assert handle.state == states.PENDING
    handle.forget()  # nothing there: nothing happens


def test_a_result_that_is_no_plain_data_is_refused_and_nothing_stored(store: Store) -> None:
    with pytest.raises(EncodeError, match="cannot be serialized"):
        store.put(states.SUCCESS, object(), "refused")
    store.arrived()
    assert store.backend.fetch("refused") is None


@pytest.mark.parametrize("kind", parameters(*DATABASES, "memory"))
def test_expired_results_are_cleaned_up(make: Any) -> None:
    store = make(TASKER_RESULT_EXPIRES=3600)
    while store.worker.cleanup():
        pass
    now = datetime.now(timezone.utc)
    old = [store.put(states.SUCCESS, n, date_done=now - timedelta(seconds=3700)) for n in range(5)]
    fresh = store.put(states.SUCCESS, "fresh", date_done=now - timedelta(seconds=3500))
    running = store.put(states.STARTED, {"pid": 1})
    assert store.worker.cleanup() == 5
    assert store.worker.cleanup() == 0
    assert [store.backend.fetch(task_id) for task_id in old] == [None] * 5
    assert store.record(fresh).result == "fresh"
    assert store.record(running).status == states.STARTED


@pytest.mark.parametrize("kind", parameters(*DATABASES, "memory"))
@pytest.mark.parametrize("never", [None, 0])
def test_results_that_never_expire_are_kept(make: Any, never: int | None) -> None:
    store = make(TASKER_RESULT_EXPIRES=never)
    ancient = datetime(2001, 1, 1, tzinfo=timezone.utc)
    task_id = store.put(states.SUCCESS, 1, date_done=ancient)
    assert store.worker.cleanup() == 0
    assert store.record(task_id).result == 1
    store.backend.forget(task_id)


@pytest.mark.parametrize("kind", parameters("redis"))
@pytest.mark.parametrize(("expires", "lowest", "highest"), [(60, 50_000, 60_000), (None, -1, -1)])
def test_redis_lets_a_result_expire_by_itself(
    make: Any, redis_url: str, expires: int | None, lowest: int, highest: int
) -> None:
    import redis

    store = make(TASKER_RESULT_EXPIRES=expires)
    task_id = store.put(states.SUCCESS, 1)
    with redis.Redis.from_url(redis_url) as client:
        assert lowest <= client.pttl(f"celery-task-meta-{task_id}") <= highest


# -- exceptions -------------------------------------------------------------------------------


class Unlucky(Exception):
    """A class that the reading process knows."""


class Demanding(Exception):
    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"{code}: {reason}")


@pytest.mark.parametrize(
    "error",
    [ValueError("text", 7), Unlucky("alas"), KeyError("key"), TaskRevokedError("expired")],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_is_raised_again(store: Store, error: Exception) -> None:
    task_id = store.put(states.FAILURE, error)
    with pytest.raises(type(error)) as caught:
        store.handle(task_id).get(timeout=PATIENCE)
    assert type(caught.value) is type(error)
    assert caught.value.args == error.args
    handle = store.handle(task_id)
    assert type(handle.get(timeout=PATIENCE, propagate=False)) is type(error)
    assert handle.failed()


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ({"exc_type": "Gone", "exc_message": ["a"], "exc_module": "nowhere"}, "Gone"),
        ({"exc_type": "system", "exc_message": ["true"], "exc_module": "os"}, "system"),
        ({"exc_type": "SystemExit", "exc_message": [3], "exc_module": "builtins"}, "SystemExit"),
        (encode_exception(Demanding(3, reason="why")), "Demanding"),
    ],
    ids=["unknown class", "no exception", "SystemExit", "a constructor that wants more"],
)
def test_an_exception_that_cannot_be_rebuilt_is_told_of(
    store: Store, stored: dict[str, Any], name: str
) -> None:
    task_id = store.put(states.FAILURE, stored)
    with pytest.raises((TaskFailedError, Demanding)) as caught:
        store.handle(task_id).get(timeout=PATIENCE)
    assert name in f"{type(caught.value).__name__} {caught.value}"


def test_the_workers_traceback_is_kept(store: Store) -> None:
    try:
        raise Unlucky("alas")
    except Unlucky as error:
        task_id = store.put(states.FAILURE, error)
    store.record(task_id)
    assert "test_the_workers_traceback_is_kept" in (store.handle(task_id).traceback or "")


# -- waiting ----------------------------------------------------------------------------------


def test_waiting_ends_as_soon_as_the_result_is_stored(store: Store) -> None:
    task_ids = [str(uuid.uuid4()) for _ in range(5)]
    delays = []
    for task_id in task_ids:
        woken: list[float] = []

        def wait(task_id: str = task_id, woken: list[float] = woken) -> None:
            store.backend.wait(task_id, PATIENCE)
            woken.append(time.monotonic())

        waiter = threading.Thread(target=wait)
        waiter.start()
        waiter.join(0.15)  # it sleeps by now; if not, the test is only easier
        assert waiter.is_alive()
        began = time.monotonic()
        store.put(states.SUCCESS, 1, task_id)
        waiter.join(PATIENCE)
        delays.append(woken[0] - began)
    assert sorted(delays)[2] < 0.25


def test_waiting_goes_on_until_the_state_is_final(store: Store) -> None:
    task_id = store.put(states.STARTED, {"pid": 1})
    got: list[TaskRecord] = []
    waiter = threading.Thread(target=lambda: got.append(store.backend.wait(task_id, PATIENCE)))
    waiter.start()
    store.put(states.RETRY, ValueError("again"), task_id)
    store.arrived()
    assert got == []
    store.put(states.SUCCESS, "end", task_id)
    waiter.join(PATIENCE)
    assert got[0].result == "end"


@pytest.mark.parametrize("timeout", [0, 0.3])
def test_waiting_ends_in_time(store: Store, timeout: float) -> None:
    began = time.monotonic()
    with pytest.raises(ResultTimeoutError, match="nobody"):
        store.handle("nobody").get(timeout=timeout)
    assert timeout - 0.05 <= time.monotonic() - began < timeout + 1.5


def test_each_of_many_waiters_gets_its_own_result(store: Store) -> None:
    task_ids = [str(uuid.uuid4()) for _ in range(15)]
    got: dict[tuple[str, int], Any] = {}

    def wait(task_id: str, nth: int) -> None:
        got[task_id, nth] = store.backend.wait(task_id, PATIENCE).result

    waiters = [
        threading.Thread(target=wait, args=(task_id, nth)) for task_id in task_ids for nth in (1, 2)
    ]
    for waiter in waiters:
        waiter.start()
    for number, task_id in enumerate(task_ids):
        store.put(states.SUCCESS, number, task_id)
    for waiter in waiters:
        waiter.join(PATIENCE)
    assert got == {(task_id, nth): n for n, task_id in enumerate(task_ids) for nth in (1, 2)}


@pytest.mark.parametrize("kind", parameters("sqlite", "postgresql", "mysql", "redis"))
def test_another_process_reads_the_result_again_and_again(store: Store) -> None:
    task_id = store.put(states.SUCCESS, [1])
    for _ in range(2):
        assert store.another().fetch(task_id).result == [1]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", parameters("sqlite", "postgresql", "mysql", "redis", "memory"))
def test_many_writers_at_once_lose_nothing(store: Store) -> None:
    shared = str(uuid.uuid4())
    errors: list[BaseException] = []

    def write(writer: int) -> None:
        try:
            for number in range(20):
                store.put(states.SUCCESS, number, f"{shared}-{writer}-{number}")
                store.put(states.FAILURE if writer else states.SUCCESS, None, shared)
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(PATIENCE)
    assert errors == []
    for writer in range(6):
        for number in range(20):
            assert store.record(f"{shared}-{writer}-{number}").result == number
    assert store.record(shared).status == states.SUCCESS


@pytest.mark.parametrize("kind", parameters("rpc"))
def test_an_answer_for_another_process_is_not_taken(store: Store) -> None:
    other = create_backend(store.config, lambda queue, wire: None)
    queue = other.reply_queue()
    try:
        other.fetch("opens the connection")
        record = TaskRecord("theirs", states.SUCCESS, 1, reply_to=queue.name)
        store.worker.store(record)
        assert other.wait("theirs", PATIENCE).result == 1
        store.arrived()
        assert store.backend.fetch("theirs") is None
    finally:
        other.close()


@pytest.mark.parametrize("kind", parameters("rpc"))
def test_a_lost_connection_is_closed_and_replaced(store: Store) -> None:
    store.arrived()
    lost = store.backend._connection.connection.sock  # type: ignore[attr-defined]
    lost.shutdown(socket.SHUT_RDWR)
    assert store.backend.fetch("nobody") is None
    assert lost.fileno() == -1, "not left to the garbage collector"

    def answered() -> TaskRecord | None:  # answers are lost until the new queue is there
        return store.backend.fetch(store.put(states.SUCCESS, task_id="again"))

    wait_until(answered, "an answer over a new connection", PATIENCE)


# -- with Celery ------------------------------------------------------------------------------


def redis_and_celery(test: Any) -> Any:
    """A test of both; Celery's own use of Redis is not up to date."""
    test = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")(test)
    return pytest.mark.parametrize("kind", parameters("redis"))(test)


@pytest.fixture
def celery_app(redis_url: str) -> Iterator[Any]:
    pytest.importorskip("celery")
    with celery_client("memory://", redis_url, "celery") as app:
        yield app


@redis_and_celery
def test_celery_reads_our_success(store: Store, celery_app: Any) -> None:
    task_id = store.put(states.SUCCESS, {"n": [1, "ä"]}, parent_id="p")
    result = celery_app.AsyncResult(task_id)
    assert result.get(timeout=PATIENCE) == {"n": [1, "ä"]}
    assert result.state == "SUCCESS"
    assert abs((result.date_done - datetime.now(timezone.utc)).total_seconds()) < 60


@redis_and_celery
def test_celery_raises_our_failure(store: Store, celery_app: Any) -> None:
    task_id = store.put(states.FAILURE, LookupError("no such thing", 7))
    result = celery_app.AsyncResult(task_id)
    with pytest.raises(LookupError) as caught:
        result.get(timeout=PATIENCE)
    assert caught.value.args == ("no such thing", 7)
    assert "LookupError" in result.traceback


@redis_and_celery
def test_celery_knows_our_revocation(store: Store, celery_app: Any) -> None:
    from celery.exceptions import TaskRevokedError as CelerysError

    task_id = store.put(states.REVOKED, TaskRevokedError("expired"))
    with pytest.raises(CelerysError, match="expired"):
        celery_app.AsyncResult(task_id).get(timeout=PATIENCE)


@redis_and_celery
def test_celery_that_waits_is_woken_by_our_result(store: Store, celery_app: Any) -> None:
    task_id = str(uuid.uuid4())
    got: list[Any] = []
    result = celery_app.AsyncResult(task_id)
    waiter = threading.Thread(target=lambda: got.append(result.get(timeout=PATIENCE)))
    waiter.start()
    waiter.join(0.2)
    store.put(states.SUCCESS, "woken", task_id)
    waiter.join(PATIENCE)
    assert got == ["woken"]


@redis_and_celery
def test_we_read_what_celery_stored(store: Store, celery_app: Any) -> None:
    task_id = str(uuid.uuid4())
    celery_app.backend.mark_as_started(task_id, pid=1)
    assert store.record(task_id).status == states.STARTED
    got: list[Any] = []
    handle = store.handle(task_id)
    waiter = threading.Thread(target=lambda: got.append(handle.get(timeout=PATIENCE)))
    waiter.start()
    waiter.join(0.2)
    celery_app.backend.mark_as_done(task_id, {"n": [1, "ä"]})
    waiter.join(PATIENCE)
    assert got == [{"n": [1, "ä"]}]
    assert handle.date_done is not None
    assert math.isclose(handle.date_done.timestamp(), time.time(), abs_tol=60)


@redis_and_celery
def test_we_raise_what_celery_stored(store: Store, celery_app: Any) -> None:
    task_id = str(uuid.uuid4())
    celery_app.backend.mark_as_failure(
        task_id, LookupError("no such thing", 7), traceback="Traceback: their frames"
    )
    with pytest.raises(LookupError) as caught:
        store.handle(task_id).get(timeout=PATIENCE)
    assert caught.value.args == ("no such thing", 7)
    assert store.handle(task_id).traceback == "Traceback: their frames"


@redis_and_celery
def test_celery_does_not_replace_our_success_nor_we_celerys(store: Store, celery_app: Any) -> None:
    ours = store.put(states.SUCCESS, "ours")
    celery_app.backend.mark_as_failure(ours, ValueError("late"))
    assert store.record(ours).result == "ours"
    theirs = str(uuid.uuid4())
    celery_app.backend.mark_as_done(theirs, "theirs")
    store.put(states.FAILURE, ValueError("late"), theirs)
    assert celery_app.AsyncResult(theirs).get(timeout=PATIENCE) == "theirs"
