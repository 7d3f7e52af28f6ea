"""Whatever is wrong outside: a clear error, in time, and nothing is lost by it."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask import Flask

from flask_taskworker import (
    BackgroundTaskWorker,
    BrokerUnavailableError,
    ConfigurationError,
    states,
)
from flask_taskworker.config import ConfigurationWarning
from flask_taskworker.exceptions import (
    EncodeError,
    InvalidOptionError,
    TaskArgumentError,
    UnknownOptionError,
)
from flask_taskworker.transports.sql import dead_letters
from flask_taskworker.transports.sql.engine import database_for
from flask_taskworker.worker.supervisor import Worker
from support.app_folder import AppFolder
from support.processes import PATIENCE
from support.room import Room
from support.sockets import Forwarder, MuteServer, closed_port
from support.waiting import wait_until


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    """An app on a SQLite file."""
    room = Room({}, tmp_path, "celery")
    yield room
    room.close()


def letters(room: Room) -> Any:
    return dead_letters.list(database_for(room.config.broker_url))


# -- configuration and calls ------------------------------------------------------------------


def test_all_faults_of_the_configuration_are_told_at_once(tmp_path: Path) -> None:
    app = Flask("wrong", instance_path=str(tmp_path))
    app.config.update(
        TASKER_ENGINE="rabbit",
        TASKER_DRIVER="oracel",
        TASKER_LOOP_INTERVAL=-1,
        TASKER_CONCURRENCY="many",
        TASKER_RESULT_BACKEND="mongodb://user:geheim@host/db",
        TASKER_ACCEPT_CONTENT="json",
        TASKER_QUEUE="mail",
    )
    with (
        pytest.warns(ConfigurationWarning, match="TASKER_QUEUE is not a setting"),
        pytest.raises(ConfigurationError) as caught,
    ):
        BackgroundTaskWorker(app)
    told = "\n".join(caught.value.problems)
    for key in ("ENGINE", "DRIVER", "LOOP_INTERVAL", "CONCURRENCY", "RESULT_BACKEND"):
        assert f"TASKER_{key} = " in told
    assert str(caught.value).count("\n  - ") == len(caught.value.problems) >= 5
    assert "geheim" not in str(caught.value)
    assert "taskworker" not in app.extensions
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_do_not_fit_are_refused_at_the_call(room: Room) -> None:
    for call in (
        lambda: room.add.delay(),
        lambda: room.add.delay(1, 2, 3),
        lambda: room.add.delay(1, c=2),
        lambda: room.add.apply(b=1),
        lambda: room.add.apply_async((1, 2, 3)),
        lambda: room.add.apply_async((1,), {"a": 1}),
        lambda: room.add.apply_async("12"),
        lambda: room.add.apply_async((), ["a"]),
    ):
        with pytest.raises(TaskArgumentError, match="add") as caught:
            call()
        assert isinstance(caught.value, TypeError)
    assert room.task_app.publisher.queue_size(room.queue) == 0


def test_unknown_options_are_refused_with_a_suggestion(room: Room) -> None:
    with pytest.raises(UnknownOptionError, match=r"'countdwn'\. Did you mean 'countdown'\?"):
        room.add.apply_async((1,), countdwn=5)
    with pytest.raises(UnknownOptionError, match=r"'max_retry'\. Did you mean 'max_retries'\?"):
        room.task_worker.define_task(max_retry=5)(len)
    with pytest.raises(InvalidOptionError, match="priority=10"):
        room.add.apply_async((1,), priority=10)
    assert room.task_app.publisher.queue_size(room.queue) == 0


def test_an_argument_that_cannot_be_serialized_is_named_at_the_call(room: Room) -> None:
    for arguments, keywords, named in (
        ([object()], {}, "argument 1 of task 'note'"),
        ([], {"value": {1, 2}.__iter__()}, "argument 'value' of task 'note'"),
        ([[{"deep": lambda: None}]], {}, "argument 1"),
    ):
        with pytest.raises(EncodeError, match=named):
            room.note.apply_async(arguments, keywords)
    assert room.task_app.publisher.queue_size(room.queue) == 0
    room.note.delay("goes on")
    assert room.task_app.publisher.queue_size(room.queue) == 1


# -- a broker that is away, or says nothing ---------------------------------------------------


@pytest.fixture(params=["redis", "amqp", "postgresql", "mysql"])
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["refuses", "is mute"])
def bad_broker(request: pytest.FixtureRequest, scheme: str) -> Iterator[str]:
    """The address of a broker that does not do its work."""
    if request.param == "refuses":
        yield f"{scheme}://127.0.0.1:{closed_port()}/0"
        return
    with MuteServer() as server:
        yield f"{scheme}://127.0.0.1:{server.port}/0"


def tasks_on(broker: str, folder: Path, **more: Any) -> Room:
    settings = {"TASKER_BROKER_URL": broker, "TASKER_RESULT_BACKEND": "disabled"}
    return Room(settings | more, folder, "celery")


def test_sending_without_a_broker_ends_in_time(bad_broker: str, tmp_path: Path) -> None:
    room = tasks_on(bad_broker, tmp_path)
    threads = set(threading.enumerate())
    began = time.monotonic()
    with pytest.raises(BrokerUnavailableError, match=r"127\.0\.0\.1") as caught:
        room.add.delay(1)
    assert time.monotonic() - began <= 5.0
    assert isinstance(caught.value, ConnectionError)
    del caught
    room.close()
    wait_until(lambda: set(threading.enumerate()) <= threads, "no thread is left", PATIENCE)


def test_failed_attempts_leave_no_connection_open(scheme: str, tmp_path: Path) -> None:
    with MuteServer() as server:
        settings = {"TASKER_PUBLISH_TIMEOUT": 0.4}
        room = tasks_on(f"{scheme}://127.0.0.1:{server.port}/0", tmp_path, **settings)
        open_files = []
        for _ in range(4):
            with pytest.raises(BrokerUnavailableError):
                room.add.delay(1)
            gc.collect()
            open_files.append(len(os.listdir("/proc/self/fd")) - server.connections)
        assert server.connections >= 4
        assert open_files[-1] <= open_files[0], "the first one may open what is kept"
        room.close()


@pytest.mark.services
@pytest.mark.parametrize("scheme", ["redis", "amqp", "mysql", "postgresql"])
def test_sending_ends_in_time_when_the_broker_falls_silent(
    scheme: str, request: pytest.FixtureRequest, tmp_path: Path, unique: str
) -> None:
    url = request.getfixturevalue(f"{scheme}_url")
    server = urlsplit(url)
    port = server.port or {"redis": 6379, "amqp": 5672, "mysql": 3306, "postgresql": 5432}[scheme]
    with Forwarder(server.hostname or "127.0.0.1", port) as forwarder:
        forwarder.open()
        address = server.netloc.rpartition("@")[0] + f"@127.0.0.1:{forwarder.port}"
        broker = server._replace(netloc=address.removeprefix("@")).geturl()
        room = Room(
            {"TASKER_BROKER_URL": broker, "TASKER_RESULT_BACKEND": "disabled"}, tmp_path, unique
        )
        room.note.delay("arrives")
        forwarder.freeze()
        for _ in range(2):  # over the open connection, then over a new one
            began = time.monotonic()
            with pytest.raises(BrokerUnavailableError, match=str(forwarder.port)):
                room.note.delay("stays here")
            assert time.monotonic() - began <= 5.0
        room.close()


@pytest.mark.parametrize("wrong", ["login", "virtual host"])
def test_a_broker_that_refuses_us_is_not_taken_for_one_that_is_down(
    wrong: str, amqp_url: str, tmp_path: Path
) -> None:
    url = urlsplit(amqp_url)
    if wrong == "login":
        url = url._replace(netloc=f"nobody:hush@{url.netloc.rpartition('@')[2]}")
    else:
        url = url._replace(path="/nowhere")
    room = tasks_on(url.geturl(), tmp_path)
    with pytest.raises(BrokerUnavailableError, match="check TASKER_BROKER_URL") as caught:
        room.add.delay(1)
    assert "hush" not in str(caught.value)
    assert "Is it running" not in str(caught.value)
    room.close()


def test_many_requests_without_a_broker_all_end_in_time(bad_broker: str, tmp_path: Path) -> None:
    room = tasks_on(bad_broker, tmp_path, TASKER_PUBLISH_TIMEOUT=2)
    answers: list[tuple[float, BaseException | None]] = []

    def request() -> None:
        began = time.monotonic()
        error: BaseException | None = None
        try:
            room.add.delay(1)
        except BaseException as exc:
            error = exc
        answers.append((time.monotonic() - began, error))

    before = set(threading.enumerate())
    requests = [threading.Thread(target=request) for _ in range(30)]
    for thread in requests:
        thread.start()
    for thread in requests:
        thread.join(PATIENCE)
    assert len(answers) == 30
    assert {type(error) for _, error in answers} == {BrokerUnavailableError}
    assert max(seconds for seconds, _ in answers) <= 3.0
    wait_until(lambda: set(threading.enumerate()) <= before, "no thread is left", PATIENCE)
    room.close()


def test_a_worker_without_a_broker_waits_and_can_be_stopped(
    bad_broker: str, tmp_path: Path
) -> None:
    folder = AppFolder(tmp_path, APP)
    try:
        worker = folder.worker(
            "-q", FLASK_TASKER_BROKER_URL=bad_broker, FLASK_TASKER_RESULT_BACKEND="disabled"
        )
        worker.wait_for("no connection to the broker", 20)
        began = time.monotonic()
        assert worker.stop(signal.SIGTERM) == 0, worker.output
        assert time.monotonic() - began <= 5.0
        assert "Traceback" not in worker.output
    finally:
        folder.close()


@pytest.mark.services
def test_a_worker_begins_when_its_broker_appears(
    scheme: str, request: pytest.FixtureRequest, tmp_path: Path, unique: str
) -> None:
    url = request.getfixturevalue(f"{scheme}_url")
    server = urlsplit(url)
    with Forwarder(server.hostname or "127.0.0.1", server.port or 0) as forwarder:
        late = url.replace(f":{server.port}", f":{forwarder.port}")
        settings = {"TASKER_RESULT_BACKEND": "disabled"}
        sender = Room({"TASKER_BROKER_URL": url, **settings}, tmp_path, unique)
        room = Room({"TASKER_BROKER_URL": late, **settings}, tmp_path, unique)
        sender.note.delay("waits")
        process = Worker(room.task_app)
        thread = threading.Thread(target=process.run)
        thread.start()
        try:
            assert not process.ready.wait(1.0)
            forwarder.open()
            opened = time.monotonic()
            room.wait_for_starts("note", 1)
            assert time.monotonic() - opened <= 7.0  # the longest pause, and the task
        finally:
            process.stop(1)
            thread.join(PATIENCE)
            sender.close()
            room.close()


# -- folders and files ------------------------------------------------------------------------

APP = """
    task_worker = BackgroundTaskWorker(app)

    @task_worker.define_task
    def work(name="work", seconds=0.0):
        ledger.write("start", name)
        time.sleep(seconds)
        ledger.write("end", name)

    def try_to_send():
        try:
            work.delay()
        except BrokerUnavailableError as error:
            print(error)
            raise SystemExit(3)
"""
SEND = "import lab; lab.try_to_send()"
#: Runs a program without root's right to write everywhere.
AS_ANYBODY = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.prctl(24, capability, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[AppFolder]:
    folder = AppFolder(tmp_path, APP)
    yield folder
    folder.close()


def both_refuse(folder: AppFolder, *named: str, prefix: tuple[str, ...] = (), **env: str) -> None:
    """Sender and worker end in time with an error that names these texts."""
    began = time.monotonic()
    sender = folder.python(*prefix, "-c", SEND, **env)
    worker = folder.python(*prefix, "-m", "flask_taskworker", "-A", "lab", "worker", "-q", **env)
    assert sender.wait() == 3, sender.output
    assert worker.wait() == 2, worker.output
    assert time.monotonic() - began < 10
    for output in (sender.output, worker.output):
        assert [text for text in named if text not in output] == [], output
        assert "Traceback" not in output


def test_a_missing_instance_folder_is_made(tmp_path: Path) -> None:
    room = Room({}, tmp_path / "deep" / "instance", "celery")
    room.note.delay("first")
    room.burst()
    assert room.starts("note") == ["first"]
    assert (tmp_path / "deep" / "instance" / "taskworker.db").exists()
    room.close()


def test_a_folder_that_is_a_file_is_named(folder: AppFolder) -> None:
    (folder.cwd / "taken").write_text("a file")
    path = f"{folder.cwd}/taken/queue.db"
    both_refuse(folder, path, FLASK_TASKER_DATABASE_URI=f"sqlite:///{path}")
    assert (folder.cwd / "taken").read_text() == "a file"


def test_a_folder_that_is_missing_is_named(folder: AppFolder) -> None:
    path = f"{folder.cwd}/nowhere/queue.db"
    both_refuse(folder, path, "does not exist", FLASK_TASKER_DATABASE_URI=f"sqlite:///{path}")


def test_a_read_only_folder_is_named(folder: AppFolder) -> None:
    locked = folder.cwd / "locked"
    locked.mkdir(mode=0o555)
    path = f"{locked}/queue.db"
    prefix = ("-c", AS_ANYBODY) if os.geteuid() == 0 else ()
    both_refuse(folder, path, "writ", prefix=prefix, FLASK_TASKER_DATABASE_URI=f"sqlite:///{path}")
    assert list(locked.iterdir()) == []


def test_a_read_only_file_is_named(folder: AppFolder) -> None:
    folder.send("work.delay()")  # makes it
    folder.let_go()
    path = folder.cwd / "taskworker.db"
    path.chmod(0o444)
    before = path.read_bytes()
    prefix = ("-c", AS_ANYBODY) if os.geteuid() == 0 else ()
    both_refuse(folder, str(path), "writ", prefix=prefix)
    assert path.read_bytes() == before
    path.chmod(0o644)
    folder.burst()
    assert folder.steps("end") == ["work"], "what was sent before is still there"


def damage_nothing_left(data: bytes) -> bytes:
    return b"This is a letter, not a database.\n" * 300


def damage_header(data: bytes) -> bytes:
    return random.Random(7).randbytes(512) + data[512:]


def damage_first_page(data: bytes) -> bytes:
    return data[:100] + random.Random(7).randbytes(3996) + data[4096:]


def damage_half(data: bytes) -> bytes:
    return data[: len(data) // 2 + 100]


DAMAGES = [damage_nothing_left, damage_header, damage_first_page, damage_half]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_database_is_refused_and_left_as_it_is(folder: AppFolder, damage: Any) -> None:
    folder.send(*["work.delay()"] * 50)
    folder.let_go()
    path = folder.cwd / "taskworker.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    both_refuse(folder, str(path))
    assert path.read_bytes() == damaged
    assert folder.steps("start") == []
    # A queue in another file is not concerned.
    elsewhere = {"FLASK_TASKER_DATABASE_URI": f"sqlite:///{folder.cwd / 'other.db'}"}
    folder.send("work.delay()", **elsewhere)
    folder.burst(**elsewhere)
    assert folder.steps("end") == ["work"]


def test_an_empty_file_becomes_a_database(folder: AppFolder) -> None:
    (folder.cwd / "taskworker.db").touch()
    folder.send("work.delay()")
    folder.burst()
    assert folder.steps("end") == ["work"]


# -- a database that the app itself has locked ------------------------------------------------


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the write lock, as a long transaction of the app does."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def test_sending_to_a_locked_database_ends_in_time_and_tells_the_file(tmp_path: Path) -> None:
    room = Room({"TASKER_PUBLISH_TIMEOUT": 1}, tmp_path, "celery")
    room.note.delay("before")
    with locked(tmp_path / "taskworker.db"):
        began = time.monotonic()
        with pytest.raises(BrokerUnavailableError, match=r"taskworker\.db was locked"):
            room.note.delay("refused")
        assert 0.9 <= time.monotonic() - began <= 5.0
    room.note.delay("after")
    room.burst()
    assert room.starts("note") == ["before", "after"], "what was refused was not queued"
    room.close()


def test_with_the_settings_as_they_are_a_locked_database_holds_nobody_longer(room: Room) -> None:
    room.note.delay("before")
    with locked(Path(room.config.database_uri.removeprefix("sqlite:///"))):
        began = time.monotonic()
        with pytest.raises(BrokerUnavailableError):
            room.note.delay("refused")
        assert time.monotonic() - began <= 5.0


def test_a_lock_that_is_short_is_waited_for(room: Room, tmp_path: Path) -> None:
    room.note.delay("before")
    with locked(tmp_path / "taskworker.db"):
        sender = threading.Thread(target=lambda: room.note.delay("waits"))
        sender.start()
        sender.join(0.3)
        assert sender.is_alive()
    sender.join(PATIENCE)
    room.burst()
    assert room.starts("note") == ["before", "waits"]


def test_a_worker_outlives_a_lock_longer_than_its_patience(tmp_path: Path) -> None:
    room = Room({"TASKER_TRANSPORT_OPTIONS": {"busy_timeout": 0.3}}, tmp_path, "celery")
    handles = [room.wait.delay(number) for number in range(3)]
    with room.worker():
        room.wait_for_starts("wait", 3)
        with locked(tmp_path / "taskworker.db"):
            room.gate.set()  # they end, and cannot be settled
            released = time.monotonic() + 1.5
            wait_until(lambda: time.monotonic() > released, "the lock was held", 5)
        assert [handle.get(timeout=PATIENCE) for handle in handles] == [0, 1, 2]
        assert room.add.delay(1).get(timeout=PATIENCE) == 1
    assert sorted(room.starts("wait")) == [0, 1, 2], "each ran once"
    room.close()


# -- messages ---------------------------------------------------------------------------------

GOOD = {"lang": "py", "task": "add", "id": "good"}
BODY = "[[1], {}, {}]"
MALFORMED: dict[str, tuple[str | bytes, dict[str, Any]]] = {
    "empty body": ("", GOOD),
    "no JSON": ("{", GOOD),
    "a number": ("5", GOOD),
    "null": ("null", GOOD),
    "a text": ('"text"', GOOD),
    "two parts": ("[[], {}]", GOOD),
    "args a text": ('["ab", {}, {}]', GOOD),
    "args a number": ("[1, {}, {}]", GOOD),
    "kwargs a list with items": ("[[], [1], {}]", GOOD),
    "embed a text": ('[[1], {}, "e"]', GOOD),
    "callbacks a number": ('[[1], {}, {"callbacks": 5}]', GOOD),
    "chain a text": ('[[1], {}, {"chain": "abc"}]', GOOD),
    "callback without a task": ('[[1], {}, {"callbacks": [{}]}]', GOOD),
    "id missing": (BODY, {"lang": "py", "task": "add"}),
    "id a mapping": (BODY, GOOD | {"id": {"a": 1}}),
    "id of a megabyte": (BODY, GOOD | {"id": "x" * 1_000_000}),
    "id with a line break": (BODY, GOOD | {"id": "a\nb"}),
    "task a number": (BODY, GOOD | {"task": 5}),
    "task empty": (BODY, GOOD | {"task": ""}),
    "eta junk": (BODY, GOOD | {"eta": "tomorrow"}),
    "eta a number": (BODY, GOOD | {"eta": 5}),
    "eta in the year 9999": (BODY, GOOD | {"eta": "9999-12-31T23:59:59+00:00"}),
    "expires junk": (BODY, GOOD | {"expires": "never"}),
    "retries a text": (BODY, GOOD | {"retries": "x"}),
    "timelimit a number": (BODY, GOOD | {"timelimit": 5}),
    "timelimit of texts": (BODY, GOOD | {"timelimit": ["a", "b"]}),
    "unknown compression": (BODY, GOOD | {"compression": "application/x-nonsense"}),
    "wrong compression": (BODY, GOOD | {"compression": "application/x-gzip"}),
    "no headers": ('{"hello": 1}', {}),
    "nesting": ("[" * 100_000 + "]" * 100_000, GOOD),
    "lone surrogate": ('[["\\ud800"], 5, {}]', GOOD),
    "bytes": (b"\xff\xfe\x00", GOOD),
}


def test_no_malformed_message_stops_a_worker_or_is_lost(room: Room) -> None:
    for number, (body, headers) in enumerate(MALFORMED.values()):
        own = {"id": f"bad-{number}"} if headers.get("id") == "good" else {}
        room.send_raw(body, headers=headers | own)
    with room.worker() as worker:
        assert room.add.delay(7).get(timeout=PATIENCE) == 7
        wait_until(lambda: len(letters(room)) >= len(MALFORMED), "all are parked", PATIENCE)
        assert worker.ready.is_set()
        for number, (_, headers) in enumerate(MALFORMED.values()):
            if headers.get("id") == "good":
                handle = room.task_worker.AsyncResult(f"bad-{number}")
                wait_until(handle.ready, f"the sender of bad-{number} is told", PATIENCE)
                assert handle.state == states.FAILURE
    parked = letters(room)
    assert len(parked) == len(MALFORMED)
    assert [letter for letter in parked if not letter.reason] == []
    assert room.starts("add") == [7]
    assert room.task_app.publisher.queue_size(room.queue) == 0


@pytest.mark.parametrize(
    "envelope", ["no JSON at all", "[]", "5", "{}", '{"body": 5}', '{"headers": [], "body": null}']
)
def test_a_broken_row_in_the_table_does_not_stop_the_worker(room: Room, envelope: str) -> None:
    room.note.delay("broken")
    connection = database_for(room.config.broker_url).connect()
    try:
        connection.execute("UPDATE taskworker_message SET meta = ?", (envelope,))
    finally:
        connection.close()
    with room.worker():
        assert room.add.delay(7).get(timeout=PATIENCE) == 7
        wait_until(lambda: letters(room), "it is parked", PATIENCE)
    assert room.starts("note") == []


@pytest.mark.services
@pytest.mark.parametrize("junk", ["no JSON", "{}"])
def test_a_broken_envelope_in_redis_does_not_stop_the_worker(
    redis_url: str, tmp_path: Path, unique: str, junk: str
) -> None:
    import redis

    room = Room({"TASKER_BROKER_URL": redis_url}, tmp_path, unique)
    with redis.Redis.from_url(redis_url) as client:
        client.lpush(unique, junk)
    with room.worker():
        assert room.add.delay(7).get(timeout=PATIENCE) == 7
    room.close()


# -- tasks that end badly ---------------------------------------------------------------------


class Unpicklable(Exception):
    def __init__(self, lock: Any, *, required: str) -> None:
        super().__init__(lock)
        self.required = required

    def __reduce__(self) -> Any:
        raise TypeError("not me")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Bare(BaseException):
    """No Exception at all."""


class NoArguments(Exception):
    @property
    def args(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no arguments")


def raise_in_circle() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    raise first


def recurse(depth: int = 0) -> int:
    return recurse(depth + 1) + 1


def raise_dynamic() -> None:
    raise type("Made\0Up", (Exception,), {"__module__": None})("x")


def raises(error: BaseException) -> Any:
    def task() -> None:
        raise error

    return task


NASTY: dict[str, Any] = {
    "unpicklable": raises(Unpicklable(threading.Lock(), required="yes")),
    "unprintable": raises(Unprintable()),
    "no arguments": raises(NoArguments()),
    "BaseException": raises(Bare("bare")),
    "SystemExit": lambda: sys.exit(3),
    "SystemExit with an object": raises(SystemExit(object())),
    "KeyboardInterrupt": raises(KeyboardInterrupt()),
    "GeneratorExit": raises(GeneratorExit()),
    "MemoryError": raises(MemoryError()),
    "StopIteration": raises(StopIteration(1)),
    "circular cause": raise_in_circle,
    "recursion": recurse,
    "NUL": raises(ValueError("a\0b")),
    "lone surrogate": raises(ValueError("\ud800")),
    "a megabyte": raises(ValueError("x" * 1_000_000)),
    "made up": raise_dynamic,
}


@pytest.mark.parametrize("nasty", NASTY)
def test_a_task_that_raises_anything_fails_and_the_worker_goes_on(room: Room, nasty: str) -> None:
    task = room.task_worker.define_task(name="nasty")(NASTY[nasty])
    with room.worker(concurrency=1):
        handle = task.delay()
        with pytest.raises(Exception):  # noqa: B017, PT011 - of whatever class
            handle.get(timeout=PATIENCE)
        assert handle.state == states.FAILURE
        assert len(handle.traceback) <= 70_000
        assert room.add.delay(7).get(timeout=PATIENCE) == 7
    assert room.task_app.publisher.queue_size(room.queue) == 0
    assert list(letters(room)) == []


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_exit_in_a_task_does_not_end_the_worker(folder: AppFolder, pool: str) -> None:
    folder.write(
        APP,
        """
        import sys

        @task_worker.define_task
        def leave():
            ledger.write("start", "leave")
            sys.exit(4)
        """,
    )
    worker = folder.ready_worker("-q", "-P", pool)
    folder.send("leave.delay()", "work.delay('after')")
    folder.wait_for_steps("start", 2)
    folder.wait_for_steps("end", 1)
    assert worker.running
    assert worker.stop() == 0
    assert sorted(folder.steps("start")) == ["after", "leave"]
    assert folder.query("SELECT status FROM taskworker_result ORDER BY status") == [
        ("FAILURE",),
        ("SUCCESS",),
    ]


@pytest.mark.parametrize(
    "value",
    [object(), {1: threading.Lock()}, float, b"\xff"],
    ids=["object", "lock", "class", "bytes"],
)
def test_a_result_that_is_no_plain_data_fails_the_task(room: Room, value: Any) -> None:
    ran = []

    @room.task_worker.define_task(name="returns")
    def returns() -> Any:
        ran.append(1)
        return value

    with room.worker():
        handle = returns.delay()
        if isinstance(value, bytes):  # kombu's JSON knows a way
            assert handle.get(timeout=PATIENCE) == value
        else:
            with pytest.raises(EncodeError, match="cannot be serialized") as caught:
                handle.get(timeout=PATIENCE)
            assert len(str(caught.value)) < 2000
        assert room.add.delay(7).get(timeout=PATIENCE) == 7
    assert ran == [1], "it is not run again"


def test_an_error_in_a_teardown_function_stops_nothing(room: Room) -> None:
    @room.app.teardown_appcontext
    def broken(error: BaseException | None) -> None:
        if room.starts("note"):
            raise RuntimeError("teardown")

    with room.worker():
        assert room.note.delay("x").get(timeout=PATIENCE) == "x"
        assert room.add.delay(7).get(timeout=PATIENCE) == 7
