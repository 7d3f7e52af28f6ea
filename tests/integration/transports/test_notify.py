"""PostgreSQL wakes sleeping consumers on whichever host they are; the doorbell is off here."""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import kombu
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from flask_taskworker.transports.sql import listener
from flask_taskworker.transports.sql.codec import encode
from flask_taskworker.transports.sql.engine import Database, database_for
from flask_taskworker.transports.sql.routing import put
from flask_taskworker.transports.sql.waiting import _readable

pytestmark = [pytest.mark.services]

#: So long that whoever is not woken fails the test.
_FALLBACK = 60.0
_RACES = 10_000


@pytest.fixture(params=["psycopg", "psycopg2"])
def url(request: pytest.FixtureRequest, postgresql_url: str) -> str:
    pytest.importorskip(request.param)
    given = make_url(postgresql_url).set(drivername=f"postgresql+{request.param}")
    return given.render_as_string(hide_password=False)


@pytest.fixture
def options(unique: str) -> dict[str, Any]:
    return {
        "table_prefix": f"{unique}_",
        "durability": "normal",
        "doorbell": False,
        "fallback_interval": _FALLBACK,
    }


@pytest.fixture
def database(url: str, options: dict[str, Any]) -> Iterator[Database]:
    database = database_for(url, options)
    yield database
    held = database.connect()
    for table in reversed(database.dialect.names):
        held.execute(f"DROP TABLE IF EXISTS {table}")
    held.close()
    database.dispose()


@pytest.fixture
def connect(url: str, options: dict[str, Any], database: Database) -> Iterator[Any]:
    """Make a connection; its options can be changed."""
    opened: list[kombu.Connection] = []

    def make(at: str = url, **changed: Any) -> kombu.Connection:
        connection = kombu.Connection(f"taskworker+{at}", transport_options={**options, **changed})
        opened.append(connection)
        return connection

    yield make
    for connection in opened:
        connection.release()


class Sleeping:
    """A consumer that drains in a thread and notes when each message came."""

    def __init__(self, connection: kombu.Connection, ack: bool = True, prefetch: int = 0) -> None:
        self.came: list[tuple[Any, float]] = []
        self.messages: list[Any] = []
        self._ack = ack
        self._end = threading.Event()
        self._wake, self._waker = socket.socketpair()
        self._arrival = threading.Condition()
        self._connection = connection
        self._prefetch = prefetch
        self.transport = connection.transport
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Sleeping:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end.set()
        self._waker.send(b"!")
        self._thread.join(10)
        self._wake.close()
        self._waker.close()
        assert not self._thread.is_alive()

    def wait_for(self, count: int, timeout: float = 20) -> list[Any]:
        with self._arrival:
            assert self._arrival.wait_for(lambda: len(self.came) >= count, timeout)
        return [body for body, _ in self.came]

    def _run(self) -> None:
        channel = self._connection.channel()
        queue = kombu.Queue("q")
        with kombu.Consumer(channel, [queue], on_message=self._take, prefetch_count=self._prefetch):
            while not self._end.is_set():
                with contextlib.suppress(TimeoutError):
                    self._connection.drain_events(timeout=0)
                self.transport.wait(None, 5.0, self._wake.fileno())
        channel.close()

    def _take(self, message: Any) -> None:
        with self._arrival:
            self.came.append((message.decode(), time.monotonic()))
            self.messages.append(message)
            self._arrival.notify_all()
        if self._ack:
            message.ack()


def sleepers(database: Database, held: Any) -> int:
    """How many consumers hold the lock that says "I sleep"."""
    key = database.dialect._wake_key  # type: ignore[attr-defined]
    cursor = held.execute(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 2 "
        f"AND classid = {key % 2**32} AND mode = 'ShareLock' AND granted"
    )
    return int(cursor.fetchone()[0])


def until(condition: Callable[[], object], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def armed(database: Database) -> Iterator[Callable[[int], None]]:
    """Wait until so many consumers sleep."""
    held = database.connect()

    def wait(count: int = 1) -> None:
        until(lambda: sleepers(database, held) == count)

    yield wait
    held.close()


def publish(connection: kombu.Connection, *bodies: Any) -> None:
    producer = kombu.Producer(connection.default_channel)
    for body in bodies:
        producer.publish(body, exchange="", routing_key="q")


CONSUMER = """
import sys, time, kombu
import flask_taskworker.transports
url, prefix, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
connection = kombu.Connection(url, transport_options={
    "table_prefix": prefix, "doorbell": False, "fallback_interval": 60.0})
late = []
def take(message):
    late.append(time.monotonic() - message.decode())
    message.ack()
    print(late[-1], flush=True)
with kombu.Consumer(connection.channel(), [kombu.Queue("q")], on_message=take):
    while len(late) < count:
        connection.drain_events(timeout=30)
"""


def test_another_process_is_woken_within_milliseconds(
    url: str, options: dict[str, Any], connect: Any, armed: Any, spawn: Any
) -> None:
    process = spawn(CONSUMER, f"taskworker+{url}", options["table_prefix"], "20")
    connection = connect()
    late = []
    for _ in range(20):
        armed()
        publish(connection, time.monotonic())
        late.append(float(process.stdout.readline()))
    # The janitor would find it after a quarter of a second on average.
    assert statistics.median(late) < 0.05


@pytest.fixture
def spawn() -> Iterator[Any]:
    import subprocess
    import sys

    processes = []

    def start(code: str, *arguments: str) -> Any:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_no_wake_up_is_lost_however_close_publishing_and_arming_come(database: Database) -> None:
    """Arm, look, sleep, against a publish at a random moment of that; nothing else wakes."""
    dialect = database.dialect
    witness, sleeper, publisher = (database.connect() for _ in range(3))
    row = encode(
        {"body": b"x", "properties": {}, "headers": {}, "content-type": "", "content-encoding": ""},
        "", "q", 0.0, 1000,
    )  # fmt: skip
    put(publisher, "q", row)
    dialect.listen(sleeper, witness, "token", broadcasts=False)
    turn = threading.Semaphore(0)
    rng = random.Random(5)
    asked = 0  # how often the sleeper had to be woken: else nothing was tried

    def publish_in_turn() -> None:
        for _ in range(_RACES):
            turn.acquire()
            end = time.perf_counter() + rng.random() * 0.0006
            while time.perf_counter() < end:
                pass
            put(publisher, "q", row)

    def there() -> bool:
        cursor = witness.execute(dialect.sql("DELETE FROM {message} WHERE owner = 0"))
        return int(cursor.rowcount) > 0

    assert there()
    thread = threading.Thread(target=publish_in_turn)
    thread.start()
    descriptor = dialect.socket_of(sleeper.raw)
    assert descriptor is not None
    try:
        for race in range(_RACES):
            turn.release()
            sleeper.heard()
            dialect.arm(sleeper)
            while not there():
                asked += 1
                assert _readable([descriptor], 5.0), f"race {race}: nobody woke the sleeper"
                sleeper.heard()
            dialect.disarm(sleeper)
    finally:
        turn.release(_RACES)
        thread.join()
        for connection in (witness, sleeper, publisher):
            connection.close()
    assert asked > _RACES * 0.02


def test_nobody_notifies_while_nobody_sleeps(database: Database, connect: Any) -> None:
    ears, witness = database.connect(), database.connect()
    database.dialect.listen(ears, witness, "token", broadcasts=False)
    until(lambda: "token" in ears.heard())
    publish(connect(), 1, 2, 3)
    witness.execute("SELECT 1")
    assert ears.heard() == []
    database.dialect.arm(ears)
    publish(connect(), 4)
    until(ears.heard)
    database.dialect.disarm(ears)
    publish(connect(), 5)
    assert ears.heard() == []
    ears.close()
    witness.close()


def test_all_sleepers_are_woken_and_one_gets_the_message(connect: Any, armed: Any) -> None:
    with Sleeping(connect()) as one, Sleeping(connect()) as two:
        for number in range(10):
            armed(2)
            begin = time.monotonic()
            publish(connect(), number)
            until(lambda wanted=number + 1: len(one.came) + len(two.came) == wanted)
            assert time.monotonic() - begin < 5
    assert sorted(body for body, _ in one.came + two.came) == list(range(10))


def test_a_batch_wakes_once(database: Database, connect: Any, armed: Any) -> None:
    ears, witness = database.connect(), database.connect()
    database.dialect.listen(ears, witness, "token", broadcasts=False)
    until(lambda: "token" in ears.heard())
    database.dialect.arm(ears)
    producer = kombu.Producer(connect().default_channel)
    with producer.batch(100):
        for number in range(50):
            producer.publish(number, exchange="", routing_key="q")
    heard: list[str] = []
    until(lambda: heard.extend(ears.heard()) or heard)
    assert len(heard) == 1
    ears.close()
    witness.close()


def test_the_callers_transaction_wakes_with_its_commit_and_delays_nobodys_sleep(
    url: str, connect: Any, armed: Any
) -> None:
    engine = create_engine(url)
    channel = connect().default_channel
    channel.queue_declare("q")
    message = channel.prepare_message(b"1", content_type="application/json",
                                      content_encoding="utf-8")  # fmt: skip
    with engine.connect() as own:
        own.execute(text("SELECT 1"))
        channel.publish_in(own, message, "q")
        with Sleeping(connect()) as sleeping:
            armed()  # although the transaction is open
            own.commit()
            sleeping.wait_for(1, timeout=5)
            armed()
            channel.publish_in(own, message, "q")
            own.rollback()
            publish(connect(), 2)
            assert sleeping.wait_for(2) == [1, 2]
    engine.dispose()


def test_a_message_that_is_put_back_wakes(connect: Any, armed: Any) -> None:
    publish(connect(), "again")
    first = connect()
    channel = first.channel()
    message = channel.basic_get("q")
    with Sleeping(connect()) as sleeping:
        armed()
        channel.basic_reject(message.delivery_tag, requeue=True)
        channel.flush()
        assert sleeping.wait_for(1, timeout=5) == ["again"]


def test_who_cannot_take_a_message_is_not_woken(
    database: Database, connect: Any, armed: Any
) -> None:
    with Sleeping(connect(), ack=False, prefetch=1) as sleeping:
        armed()
        publish(connect(), 1)
        sleeping.wait_for(1)
        armed(0)
        publish(connect(), 2)
        sleeping.messages[0].ack()  # from this thread: interrupts the sleep
        assert sleeping.wait_for(2) == [1, 2]


def test_a_lost_connection_is_replaced(database: Database, connect: Any, armed: Any) -> None:
    held = database.connect()
    with Sleeping(connect()) as sleeping:
        armed()
        key = database.dialect._wake_key  # type: ignore[attr-defined]
        held.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' "
            f"AND objid = 2 AND classid = {key % 2**32}"
        )
        armed(0)
        publish(connect(), 1)
        sleeping.wait_for(1)
        armed()
        begin = time.monotonic()
        publish(connect(), 2)
        sleeping.wait_for(2)
        assert time.monotonic() - begin < 5
    held.close()


def test_without_notify_no_connection_listens(url: str, connect: Any, options: Any) -> None:
    connection = connect(notify=False)
    with Sleeping(connection) as sleeping:
        publish(connection.clone(), 1)
        sleeping.wait_for(1)
        assert sleeping.transport._sleeper._listener.fileno() is None
    database = database_for(url, {**options, "notify": False})
    assert "pg_notify" not in database.dialect.insert_message
    database.dispose()


def test_a_forked_child_leaves_its_parents_ears_alone(database: Database, connect: Any) -> None:
    ears, witness = listener.Listener(), database.connect()
    until(lambda: ears.arm(database, witness))
    inherited = ears._connection
    assert inherited is not None
    inherited.abandon()  # as a fork does in the child
    ears.woken()
    ears.disarm()
    assert ears.fileno() is None
    ears.close()
    assert sleepers(database, witness) == 1  # still asleep, in the parent
    inherited.raw.close()
    witness.close()


class DeafeningProxy:
    """Passes everything on but notifications, like a proxy that pools connections."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self.swallowed = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._open: list[socket.socket] = [self._listening]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for opened in self._open:
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
            opened.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listening.accept()[0]
                server = socket.create_connection(self._target)
                self._open += [client, server]
                threading.Thread(target=self._up, args=(client, server), daemon=True).start()
                threading.Thread(target=self._down, args=(server, client), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
            server.shutdown(socket.SHUT_RDWR)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError), server.makefile("rb") as answers:
            while len(head := answers.read(5)) == 5:
                body = answers.read(int.from_bytes(head[1:], "big") - 4)
                if head[:1] == b"A":
                    self.swallowed += 1
                else:
                    client.sendall(head + body)
            client.shutdown(socket.SHUT_RDWR)


def test_a_proxy_that_swallows_notifications_is_noticed(
    url: str,
    connect: Any,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(listener, "PATIENCE", 0.1)
    given = make_url(url)
    proxy = DeafeningProxy(given.host or "127.0.0.1", given.port or 5432)
    through = given.set(host="127.0.0.1", port=proxy.port).update_query_dict(
        {"sslmode": "disable", "gssencmode": "disable"}
    )
    at = through.render_as_string(hide_password=False)
    held = database.connect()
    with caplog.at_level(logging.WARNING), Sleeping(connect(at)) as sleeping:
        until(lambda: "notifications" in caplog.text)
        for number in range(3):
            publish(connect(), number)
            sleeping.wait_for(number + 1)
        assert sleepers(database, held) == 0
        assert proxy.swallowed
    assert caplog.text.count("notifications from") == 1
    held.close()
    database_for(at, {**connect(at).transport_options}).dispose()
    proxy.close()
