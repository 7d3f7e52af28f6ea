"""What any kombu program may expect, asked of our transport and of kombu's own two best.

The same tests run on the SQL transport over each database, on RabbitMQ and on Redis, through
kombu's public API alone. Where the three differ, the test reads the answer from this table, so
that a change on any side shows up as a failure:

===========================  =====================  =====================  =====================
                             sql                    amqp (RabbitMQ)        redis
===========================  =====================  =====================  =====================
order of priorities          9 first                9 first, on a queue    0 first, in four
                                                    declared for it        steps
place after a requeue        its old one            its old one            the end
place after a recover        its old one            its old one            the front
redelivered after a requeue  yes                    yes                    yes
redelivered after a close    no: nobody was given   yes                    yes
                             a chance to work
reject and requeue count     in ``delivery_count``  not                    not
size of a queue counts       ready messages         ready messages         ready messages
consumers in the size        never counted          counted                never counted
fanout to a queue without a  kept in the queue      kept in the queue      lost
consumer
purging takes                ready and delayed      ready                  ready
``Producer.batch()``         one transaction        sends one by one       one round trip
an empty queue               exists                 exists                 does not exist
deleting a queue without a   deletes it             deletes it             does nothing
binding
a queue whose two bindings   once                   once                   once for each
fit gets a message
===========================  =====================  =====================  =====================
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import kombu
import pytest
from kombu import Exchange, Queue
from kombu.pidbox import Mailbox
from sqlalchemy.engine import make_url

import flask_taskworker.transports  # noqa: F401 - registers the transport
from flask_taskworker.transports.sql.engine import database_for

#: How long to listen before it is believed that nothing more comes.
SILENCE = 0.25
PATIENCE = 20.0


class Habits(NamedTuple):
    """A column of the table above, as far as a program can notice."""

    most_urgent: int
    requeue_place: str
    recover_place: str
    redelivered_after_close: bool
    counts_consumers: bool
    fanout_is_kept: bool
    batch_is_atomic: bool
    empty_queue_exists: bool


HABITS = {
    "sql": Habits(9, "old", "old", False, False, True, True, True),
    "amqp": Habits(9, "old if possible", "old", True, True, True, False, True),
    "redis": Habits(0, "end", "front", True, False, False, False, False),
    "our-redis": Habits(0, "end", "old", False, False, False, False, False),
    "our-amqp": Habits(9, "old if possible", "old", True, True, True, False, True),
}

#: Our own transports for brokers that kombu has one for.
OURS = {
    "our-redis": "flask_taskworker.transports.redis:Transport",
    "our-amqp": "flask_taskworker.transports.amqp:Transport",
}

OPTIONS: dict[str, dict[str, Any]] = {
    "our-redis": {"lease": 2},
    "our-amqp": {"confirm_publish": True},
}


class Side:
    """One transport: connections that end with the test, and names of its own."""

    def __init__(self, kind: str, url: str, prefix: str, options: dict[str, Any]) -> None:
        self.kind = kind
        self.url = url
        self.options = options
        self.prefix = prefix
        self.habits = HABITS[kind]
        self._connections: list[kombu.Connection] = []
        self._processes: list[subprocess.Popen[str]] = []
        self.channel = self.connection().channel()

    def name(self, name: str) -> str:
        """A name in this broker that no other test uses."""
        return f"{self.prefix}.{name}"

    def connection(self) -> kombu.Connection:
        connection = kombu.Connection(
            self.url, transport=OURS.get(self.kind), transport_options=self.options
        )
        self._connections.append(connection)
        return connection

    def queue(self, name: str = "q", *args: Any, **kwargs: Any) -> Queue:
        """A declared queue."""
        if self.kind.endswith("amqp"):
            kwargs.setdefault("max_priority", 9)
        kwargs.setdefault("routing_key", self.name(name))
        queue = Queue(self.name(name), *args, **kwargs)(self.connection().channel())
        queue.declare()
        return queue

    def publish(self, *bodies: Any, queue: str = "q", **options: Any) -> None:
        producer = kombu.Producer(self.channel)
        for body in bodies:
            producer.publish(body, exchange="", routing_key=self.name(queue), **options)

    def receiver(self, *queues: str, prefetch: int = 0, **options: Any) -> Receiver:
        names = [self.name(name) for name in queues or ("q",)]
        return Receiver(self.connection(), names, prefetch, options)

    def size(self, queue: str = "q") -> int:
        try:
            found = self.channel.queue_declare(self.name(queue), passive=True)
        except self.channel.connection.client.channel_errors:
            assert not self.habits.empty_queue_exists
            return 0
        return int(found.message_count)

    def spawn(self, code: str) -> subprocess.Popen[str]:
        setup = (
            "import kombu, sys, socket\nimport flask_taskworker.transports\n"
            f"connection = kombu.Connection({self.url!r}, transport={OURS.get(self.kind)!r}, "
            f"transport_options={self.options!r})\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", setup + code], stdout=subprocess.PIPE, text=True
        )
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        for connection in self._connections:
            connection.release()
        if self.kind == "sql":
            database = database_for(self.url, self.options)
            held = database.connect()
            for table in reversed(database.dialect.names):
                held.execute(f"DROP TABLE IF EXISTS {table}")
            held.close()
            database.dispose()


class Receiver:
    """A consumer that keeps what it gets and acknowledges nothing by itself."""

    def __init__(
        self, connection: kombu.Connection, names: list[str], prefetch: int, options: Any
    ) -> None:
        self.connection = connection
        self.channel = connection.channel()
        self.messages: list[Any] = []
        self._told = 0
        self.consumer = kombu.Consumer(
            self.channel, [Queue(name) for name in names], on_message=self.messages.append,
            auto_declare=False, prefetch_count=prefetch or None, **options,
        )  # fmt: skip
        self.consumer.consume()

    def get(self, count: int) -> list[Any]:
        """The bodies of the next ``count`` messages."""
        wanted = self._told + count
        deadline = time.monotonic() + PATIENCE
        while len(self.messages) < wanted:
            assert time.monotonic() < deadline, str([m.payload for m in self.messages])
            with contextlib.suppress(socket.timeout):
                self.connection.drain_events(timeout=1)
        self._told = wanted
        return [message.payload for message in self.messages[wanted - count : wanted]]

    def silent(self) -> bool:
        """Whether nothing comes but what was told already."""
        # What is committed to a database is there; over a wire it may take a moment.
        timeout = 0.05 if hasattr(self.channel, "database") else SILENCE
        with contextlib.suppress(socket.timeout):
            while True:
                self.connection.drain_events(timeout=timeout)
        return len(self.messages) == self._told

    def settle(self) -> None:
        """Have the broker know what was settled."""
        self.silent()


SIDES = [
    "sqlite",
    pytest.param("psycopg", marks=pytest.mark.services),
    pytest.param("psycopg2", marks=pytest.mark.services),
    pytest.param("pymysql", marks=pytest.mark.services),
    pytest.param("amqp", marks=pytest.mark.services),
    pytest.param("redis", marks=pytest.mark.services),
    pytest.param("our-amqp", marks=pytest.mark.services),
    pytest.param("our-redis", marks=pytest.mark.services),
]


@pytest.fixture(params=SIDES)
def side(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[Side]:
    driver = request.param
    options: dict[str, Any] = {"table_prefix": f"{unique}_", "durability": "normal"}
    kind = "sql"
    if driver.removeprefix("our-") in ("amqp", "redis"):
        kind, options = driver, OPTIONS.get(driver, {})
        url = request.getfixturevalue(f"{driver.removeprefix('our-')}_url")
    elif driver == "sqlite":
        url = f"taskworker+sqlite:///{tmp_path}/queue.db"
    elif driver == "pymysql":
        url = "taskworker+" + request.getfixturevalue("mysql_url")
    else:
        pytest.importorskip(driver)
        given = make_url(request.getfixturevalue("postgresql_url"))
        url = "taskworker+" + given.set(drivername=f"postgresql+{driver}").render_as_string(
            hide_password=False
        )
    side = Side(kind, url, unique, options)
    yield side
    side.close()


def test_a_message_arrives_with_body_headers_and_properties(side: Side) -> None:
    side.queue()
    side.publish(
        {"ü": ["☃", None, 1.5]}, headers={"id": "a'b"}, correlation_id="c-1", reply_to="r",
        content_encoding="utf-8",
    )  # fmt: skip
    one = side.receiver()
    assert one.get(1) == [{"ü": ["☃", None, 1.5]}]
    message = one.messages[0]
    assert message.headers["id"] == "a'b"
    assert message.properties["correlation_id"] == "c-1"
    assert message.properties["reply_to"] == "r"
    assert message.content_type == "application/json"
    assert message.content_encoding == "utf-8"
    assert message.delivery_info["routing_key"] == side.name("q")
    assert message.delivery_info["exchange"] == ""
    assert not message.delivery_info.get("redelivered")


def test_bytes_of_any_value_and_of_none_arrive(side: Side) -> None:
    side.queue()
    for body in (b"", bytes(range(256)), b"\0" * 100_000):
        side.publish(body, content_type="application/data", content_encoding="binary")
    one = side.receiver()
    while len(one.messages) < 3:
        one.connection.drain_events(timeout=PATIENCE)
    assert [bytes(m.body or b"") for m in one.messages] == [b"", bytes(range(256)), b"\0" * 100_000]


def test_messages_come_in_the_order_they_were_sent(side: Side) -> None:
    side.queue()
    side.publish(*range(50))
    assert side.receiver().get(50) == list(range(50))


def test_the_most_urgent_comes_first(side: Side) -> None:
    side.queue()
    for priority in (0, 9, 3, 6):
        side.publish(priority, priority=priority)
    expected = sorted((0, 9, 3, 6), reverse=side.habits.most_urgent == 9)
    assert side.receiver(prefetch=1).get(1) == expected[:1]
    one = side.receiver(prefetch=4)
    assert one.get(3) == expected[1:]


def test_what_is_acknowledged_does_not_come_again(side: Side) -> None:
    side.queue()
    side.publish(1, 2)
    one = side.receiver()
    one.get(2)
    one.messages[0].ack()
    one.messages[1].ack()
    one.settle()
    one.connection.release()
    assert side.receiver().silent()
    assert side.size() == 0


def test_multiple_acknowledges_all_up_to_it(side: Side) -> None:
    side.queue()
    side.publish(1, 2, 3)
    one = side.receiver()
    one.get(3)
    one.messages[1].ack(multiple=True)
    one.settle()
    one.connection.release()
    assert side.receiver().get(1) == [3]


def test_a_second_settlement_is_refused_by_kombu(side: Side) -> None:
    side.queue()
    side.publish(1)
    one = side.receiver()
    one.get(1)
    one.messages[0].ack()
    with pytest.raises(one.messages[0].MessageStateError):
        one.messages[0].reject()


def test_a_rejected_message_is_gone(side: Side) -> None:
    side.queue()
    side.publish(1)
    one = side.receiver()
    one.get(1)
    one.messages[0].reject()
    assert one.silent()
    one.connection.release()
    assert side.receiver().silent()


def test_a_requeued_message_comes_back_marked(side: Side) -> None:
    side.queue()
    side.publish(1, 2, 3)
    one = side.receiver(prefetch=1)
    assert one.get(1) == [1]
    one.messages[0].requeue()
    expected = {
        "old": [[1, 2, 3]],
        "front": [[1, 2, 3]],
        "end": [[2, 3, 1]],
        # RabbitMQ promises the old place only if it has not sent the next one by then.
        "old if possible": [[1, 2, 3], [2, 1, 3], [2, 3, 1]],
    }[side.habits.requeue_place]
    got = []
    for _ in range(3):
        got += one.get(1)
        one.messages[-1].ack()
    assert got in expected
    again = next(message for message in one.messages[1:] if message.payload == 1)
    assert again.delivery_info["redelivered"] is True


def test_recover_delivers_everything_unsettled_again(side: Side) -> None:
    side.queue()
    side.publish(1, 2)
    one = side.receiver(prefetch=2)
    one.get(2)
    side.publish(3)
    one.channel.basic_recover(requeue=True)
    assert sorted(one.get(2)) == [1, 2]
    assert [message.delivery_info["redelivered"] for message in one.messages[2:]] == [True] * 2
    for message in one.messages[2:]:
        message.ack()
    assert one.get(1) == [3]


def test_what_a_closed_connection_held_comes_back(side: Side) -> None:
    side.queue()
    side.publish(1, 2)
    one = side.receiver()
    one.get(2)
    one.connection.release()
    two = side.receiver()
    assert sorted(two.get(2)) == [1, 2]
    assert {bool(message.delivery_info.get("redelivered")) for message in two.messages} == {
        side.habits.redelivered_after_close
    }


@pytest.mark.not_on("redis")  # it gives back after its visibility timeout, an hour
def test_what_a_killed_process_held_comes_back_marked(side: Side) -> None:
    side.queue()
    side.publish(1, 2)
    holder = side.spawn(
        f"queue = kombu.Queue({side.name('q')!r})\n"
        "got = []\n"
        "with kombu.Consumer(connection, [queue], on_message=got.append, auto_declare=False):\n"
        "    while len(got) < 2: connection.drain_events(timeout=20)\n"
        "    print('holding', flush=True)\n"
        "    sys.stdin.read()\n"
        "    connection.drain_events()\n"
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "holding\n"
    os.kill(holder.pid, signal.SIGKILL)
    one = side.receiver()
    assert sorted(one.get(2)) == [1, 2]
    assert [message.delivery_info["redelivered"] for message in one.messages] == [True, True]


def test_no_more_than_the_prefetch_count_is_in_hand(side: Side) -> None:
    side.queue()
    side.publish(*range(6))
    one = side.receiver(prefetch=2)
    assert one.get(2) == [0, 1]
    assert one.silent()
    one.messages[0].ack()
    assert one.get(1) == [2]
    assert one.silent()
    two = side.receiver(prefetch=10)
    assert two.get(3) == [3, 4, 5]


def test_the_prefetch_count_may_change_while_consuming(side: Side) -> None:
    side.queue()
    side.publish(*range(5))
    one = side.receiver(prefetch=1)
    one.get(1)
    one.consumer.qos(prefetch_count=3)
    if side.kind.endswith("amqp"):  # there the count of a consumer is that of its start
        one.consumer.cancel()
        one.consumer.consume()
    assert one.get(2) == [1, 2]


def test_without_acknowledgement_messages_are_gone_once_delivered(side: Side) -> None:
    side.queue()
    side.publish(1, 2)
    one = side.receiver(no_ack=True)
    assert one.get(2) == [1, 2]
    one.settle()
    one.connection.release()
    assert side.receiver().silent()


def test_consumers_share_and_each_message_goes_to_one(side: Side) -> None:
    side.queue()
    receivers = [side.receiver(prefetch=5), side.receiver(prefetch=5)]
    side.publish(*range(10))
    got = [body for receiver in receivers for body in receiver.get(5)]
    assert sorted(got) == list(range(10))


def test_one_consumer_may_read_several_queues(side: Side) -> None:
    side.queue("a")
    side.queue("b")
    side.publish(*["a"] * 5, queue="a")
    side.publish(*["b"] * 5, queue="b")
    assert sorted(side.receiver("a", "b").get(10)) == ["a"] * 5 + ["b"] * 5


def test_a_cancelled_consumer_gets_nothing_more(side: Side) -> None:
    side.queue()
    one = side.receiver()
    side.publish(1)
    one.get(1)
    one.consumer.cancel()
    side.publish(2)
    two = side.receiver()
    assert two.get(1) == [2]
    one.messages[0].ack()


def test_getting_single_messages(side: Side) -> None:
    queue = side.queue()
    assert queue.get() is None
    side.publish(1, 2)
    first = _eventually(queue.get)
    assert first.payload == 1
    first.ack()
    assert _eventually(lambda: queue.get(no_ack=True)).payload == 2
    assert queue.get() is None


def _eventually(condition: Callable[[], Any]) -> Any:
    """The first true value; RabbitMQ routes a moment after the publish."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline
    return value


def test_declaring_tells_how_many_messages_are_ready(side: Side) -> None:
    side.queue()
    side.publish(*range(5))
    _eventually(lambda: side.size() == 5)
    one = side.receiver(prefetch=2)
    one.get(2)
    assert side.size() == 3
    found = side.channel.queue_declare(side.name("q"), passive=True)
    assert found.consumer_count == (1 if side.habits.counts_consumers else 0)
    assert found.queue == side.name("q")


def test_purging_takes_what_is_ready_and_leaves_what_is_in_hand(side: Side) -> None:
    queue = side.queue()
    side.publish(*range(5))
    one = side.receiver(prefetch=2)
    one.get(2)
    assert _eventually(lambda: side.size() == 3)
    assert queue.purge() == 3
    assert side.size() == 0
    one.messages[0].ack()
    one.messages[1].requeue()
    assert one.get(1) == [1]


def test_a_missing_queue_is_told_to_who_asks_for_it(side: Side) -> None:
    connection = side.connection()
    channel = connection.channel()
    with pytest.raises(connection.channel_errors, match=r"(?i)not.found"):
        channel.queue_declare(side.name("missing"), passive=True)


def test_a_deleted_queue_is_gone_with_its_messages(side: Side) -> None:
    jobs = Exchange(side.name("jobs"), type="direct")
    queue = side.queue("q", jobs)
    side.publish(1)
    _eventually(side.size)
    queue.delete()
    side.queue()
    assert side.size() == 0


def test_a_direct_exchange_routes_by_key_also_for_other_connections(side: Side) -> None:
    jobs = Exchange(side.name("jobs"), type="direct")
    side.queue("a", jobs, routing_key="a")
    side.queue("b", jobs, routing_key="b")
    producer = kombu.Producer(side.connection().channel(), exchange=jobs)
    producer.publish(1, routing_key="a")
    producer.publish(2, routing_key="b")
    assert side.receiver("a").get(1) == [1]
    assert side.receiver("b").get(1) == [2]


def test_a_topic_exchange_routes_by_pattern(side: Side) -> None:
    logs = Exchange(side.name("logs"), type="topic")
    side.queue("all", logs, routing_key="#")
    side.queue("one", logs, routing_key="app.*")
    side.queue("deep", logs, routing_key="app.#.end")
    producer = kombu.Producer(side.connection().channel(), exchange=logs)
    for key in ("app.x", "app.x.y.end", "other"):
        producer.publish(key, routing_key=key)
    assert side.receiver("all").get(3) == ["app.x", "app.x.y.end", "other"]
    assert side.receiver("one").get(1) == ["app.x"]
    assert side.receiver("deep").get(1) == ["app.x.y.end"]


@pytest.mark.not_on("redis", "our-redis")  # it delivers once for each binding that fits
def test_a_queue_bound_twice_to_an_exchange_gets_a_message_once(side: Side) -> None:
    logs = Exchange(side.name("logs"), type="topic")
    channel = side.connection().channel()
    queue = side.queue("all", logs, routing_key="#")
    queue.bind_to(logs.name, routing_key="app.*")
    kombu.Producer(channel, exchange=logs).publish(1, routing_key="app.x")
    one = side.receiver("all")
    assert one.get(1) == [1]
    assert one.silent()


def test_a_fanout_exchange_reaches_every_bound_queue(side: Side) -> None:
    news = Exchange(side.name("news"), type="fanout")
    queues = [side.queue(name, news, routing_key="") for name in ("a", "b")]
    receivers = []
    for queue in queues:
        connection = side.connection()
        got: list[Any] = []
        consumer = kombu.Consumer(
            connection.channel(), [Queue(queue.name, news, routing_key="")],
            on_message=lambda message, got=got: (got.append(message.payload), message.ack()),
            auto_declare=False,
        )  # fmt: skip
        news(consumer.channel).declare()
        consumer.consume()
        receivers.append((connection, got))

    if not side.habits.fanout_is_kept:
        for connection, _ in receivers:  # a subscription begins with the first look
            with contextlib.suppress(socket.timeout):
                connection.drain_events(timeout=SILENCE)
    kombu.Producer(side.connection().channel(), exchange=news).publish("hear", routing_key="")
    for connection, got in receivers:
        deadline = time.monotonic() + PATIENCE
        while not got:
            assert time.monotonic() < deadline
            with contextlib.suppress(socket.timeout):
                connection.drain_events(timeout=1)
        assert got == ["hear"]


def test_fanout_to_a_queue_that_nobody_reads_yet(side: Side) -> None:
    news = Exchange(side.name("news"), type="fanout")
    side.queue("a", news, routing_key="")
    kombu.Producer(side.connection().channel(), exchange=news).publish("hear", routing_key="")
    one = side.receiver("a")
    if side.habits.fanout_is_kept:
        assert one.get(1) == ["hear"]
    else:
        assert one.silent()


@pytest.mark.not_on("redis", "our-redis")  # kombu's virtual transports cannot unbind there
def test_an_unbound_queue_gets_nothing_more(side: Side) -> None:
    jobs = Exchange(side.name("jobs"), type="direct")
    queue = side.queue("a", jobs, routing_key="a")
    side.queue("b", jobs, routing_key="a")
    producer = kombu.Producer(side.connection().channel(), exchange=jobs)
    producer.publish(1, routing_key="a")
    queue.unbind_from(jobs, routing_key="a")
    producer.publish(2, routing_key="a")
    one = side.receiver("a")
    assert one.get(1) == [1]
    assert one.silent()
    assert side.receiver("b").get(2) == [1, 2]


def test_a_message_for_an_exchange_without_a_fitting_queue(side: Side) -> None:
    jobs = Exchange(side.name("jobs"), type="direct")
    side.queue("a", jobs, routing_key="a")
    connection = side.connection()
    producer = kombu.Producer(connection.channel(), exchange=jobs)
    producer.publish(1, routing_key="nobody")
    producer.publish(2, routing_key="a")
    one = side.receiver("a")
    assert one.get(1) == [2]
    assert one.silent()


def test_remote_control_asks_another_process_and_gets_its_answer(side: Side) -> None:
    name = side.prefix
    node = side.spawn(
        "from kombu.pidbox import Mailbox\n"
        f"mailbox = Mailbox({name!r}, type='fanout')(connection)\n"
        "node = mailbox.Node('w1', channel=connection.channel())\n"
        "node.handlers['ping'] = lambda state, **kw: 'pong'\n"
        "node.listen()\n"
        "try: connection.drain_events(timeout=0.2)\n"
        "except socket.timeout: pass\n"
        "print('ready', flush=True)\n"
        "while True: connection.drain_events()\n"
    )
    assert node.stdout is not None
    assert node.stdout.readline() == "ready\n"
    mailbox = Mailbox(name, type="fanout")(side.connection())
    assert mailbox.call(["w1"], "ping", timeout=5) == [{"w1": "pong"}]


def test_a_batch_is_delivered_in_order(side: Side) -> None:
    side.queue()
    producer = kombu.Producer(side.channel)
    if not hasattr(producer, "batch"):
        pytest.skip("this kombu has no Producer.batch")
    with producer.batch(max_size=10):
        for number in range(25):
            producer.publish(number, exchange="", routing_key=side.name("q"))
    assert side.receiver().get(25) == list(range(25))


def test_a_batch_that_fails_sends_nothing_where_it_is_collected(side: Side) -> None:
    side.queue()
    producer = kombu.Producer(side.channel)
    if not hasattr(producer, "batch"):
        pytest.skip("this kombu has no Producer.batch")
    with pytest.raises(ZeroDivisionError), producer.batch(max_size=10):
        producer.publish(1, exchange="", routing_key=side.name("q"))
        raise ZeroDivisionError
    one = side.receiver()
    if side.kind.endswith("amqp"):
        assert one.get(1) == [1]
    else:
        assert one.silent()


def test_a_publish_wakes_a_consumer_that_waits(side: Side) -> None:
    side.queue()
    one = side.receiver()
    one.silent()
    timer = threading.Timer(0.2, side.publish, [1])
    timer.start()
    started = time.monotonic()
    one.connection.drain_events(timeout=PATIENCE)
    timer.join()
    assert one.messages[0].payload == 1
    assert time.monotonic() - started < 5


def test_nothing_to_do_is_a_timeout(side: Side) -> None:
    side.queue()
    one = side.receiver()
    started = time.monotonic()
    with pytest.raises(socket.timeout):
        one.connection.drain_events(timeout=0.3)
    assert time.monotonic() - started < 5


def test_what_is_sent_with_compression_and_serializers_is_read_again(side: Side) -> None:
    side.queue()
    side.publish({"x": "y" * 1000}, compression="zlib")
    side.publish({"n": 1}, serializer="yaml")
    one = side.receiver(accept=["json", "yaml"])
    assert one.get(2) == [{"x": "y" * 1000}, {"n": 1}]


def test_a_simple_queue_works(side: Side) -> None:
    with contextlib.closing(side.connection().SimpleQueue(side.name("simple"))) as simple:
        assert simple.queue is not None
        simple.put({"a": 1})
        message = simple.get(timeout=PATIENCE)
        assert message.payload == {"a": 1}
        message.ack()
        with pytest.raises(simple.Empty):
            simple.get(timeout=SILENCE)
