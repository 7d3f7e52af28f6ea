"""Exchanges, bindings, queues and remote control."""

from __future__ import annotations

import contextlib
import threading

import kombu
import pytest
from kombu import Exchange, Queue
from kombu.exceptions import ChannelError
from kombu.pidbox import Mailbox

from flask_taskworker import clock
from flask_taskworker.transports import Capabilities, capabilities_of
from flask_taskworker.transports.sql.routing import topic_matches


def _declare(broker, *queues: Queue):
    channel = broker.channel()
    for queue in queues:
        queue(channel).declare()
    return channel


def test_a_binding_made_by_one_connection_routes_for_another(broker, receiver):
    exchange = Exchange("jobs", type="direct")
    _declare(broker, Queue("a", exchange, routing_key="red"), Queue("b", exchange, "blue"))
    kombu.Producer(broker.channel()).publish(1, exchange="jobs", routing_key="red")
    assert (receiver("a").drain(), receiver("b").drain()) == ([1], [])


def test_fanout_reaches_every_bound_queue(broker, receiver):
    exchange = Exchange("news", type="fanout")
    _declare(broker, *(Queue(name, exchange) for name in "abc"))
    kombu.Producer(broker.channel()).publish(1, exchange="news", routing_key="")
    assert [receiver(name).drain() for name in "abc"] == [[1], [1], [1]]


def test_topic_patterns_route(broker, receiver):
    exchange = Exchange("t", type="topic")
    _declare(broker, Queue("a", exchange, "log.*"), Queue("b", exchange, "log.#"))
    producer = kombu.Producer(broker.channel())
    producer.publish(1, exchange="t", routing_key="log.x")
    producer.publish(2, exchange="t", routing_key="log.x.y")
    assert (receiver("a").drain(), receiver("b").drain()) == ([1], [1, 2])


@pytest.mark.parametrize(
    ("pattern", "key", "fits"),
    [
        ("#", "", True), ("#", "a.b", True), ("*", "a", True), ("*", "a.b", False),
        ("a.#.z", "a.z", True), ("a.#.z", "a.b.c.z", True), ("a.*.z", "a.z", False),
        ("a.b", "a.b", True), ("a+b", "aab", False), ("#.#.#.#.b", "a." * 30 + "a", False),
    ],
)  # fmt: skip
def test_topic_rule(pattern, key, fits):
    words = tuple(key.split(".")) if key else ()
    assert topic_matches(tuple(pattern.split(".")), words) is fits


def test_an_unbound_queue_gets_nothing_more(broker, receiver):
    queue = Queue("a", Exchange("jobs", type="direct"), routing_key="k")
    channel = _declare(broker, queue)
    queue(channel).unbind_from(queue.exchange, routing_key="k")
    kombu.Producer(channel).publish(1, exchange="jobs", routing_key="k")
    assert receiver("a").drain() == []


def test_a_batch_follows_exchanges_too(broker, receiver):
    exchange = Exchange("news", type="fanout")
    channel = _declare(broker, *(Queue(name, exchange) for name in "ab"))
    producer = kombu.Producer(channel)
    if not hasattr(producer, "batch"):
        pytest.skip("this kombu has no Producer.batch")
    with producer.batch():
        producer.publish(1, exchange="", routing_key="a")
        producer.publish(2, exchange="news", routing_key="")
        producer.publish(3, exchange="", routing_key="a")
    assert (receiver("a").drain(), receiver("b").drain()) == ([1, 2, 3], [2])


def test_the_size_of_a_queue_is_told_and_purging_empties_it(broker):
    broker.publish(1, 2, 3)
    channel = broker.channel()
    assert channel.queue_declare("q").message_count == 3
    assert channel.queue_purge("q") == 3
    assert channel.queue_declare("q", passive=True).message_count == 0


def test_a_passive_declaration_of_a_missing_queue_fails(broker):
    with pytest.raises(ChannelError, match="nowhere"):
        broker.channel().queue_declare("nowhere", passive=True)


def test_a_deleted_queue_takes_its_messages_and_bindings_along(broker, receiver):
    exchange = Exchange("jobs", type="direct")
    channel = _declare(broker, Queue("a", exchange, "k"))
    broker.publish(1, queue="a")
    channel.queue_delete("a")
    assert broker.count() == 0
    assert channel.list_bindings() == []


def test_a_publisher_notices_that_its_queue_was_deleted_and_made_anew(broker, receiver):
    producer = kombu.Producer(broker.channel())
    producer.publish(1, exchange="", routing_key="q")
    held = broker.database.connect()  # as another process would do it
    held.execute("DELETE FROM taskworker_message")
    held.execute("DELETE FROM taskworker_queue")
    held.close()
    one = receiver()
    producer.publish(2, exchange="", routing_key="q")
    assert one.drain() == [2]


def test_a_paused_queue_hands_nothing_out_until_resumed(broker, receiver):
    broker.publish(1)
    one = receiver()
    channel = broker.channel()
    channel.pause_queue("q")
    assert one.drain() == []
    channel.pause_queue("q", False)
    assert one.drain() == [1]


def test_an_unused_queue_expires_and_one_in_use_does_not(broker, receiver, monkeypatch):
    channel = _declare(broker, Queue("idle", expires=10), Queue("busy", expires=10))
    Queue("busy", no_declare=True)(channel).consume("tag", lambda message: None)
    now, ticks = clock.wall(), clock.monotonic()
    monkeypatch.setattr(clock, "wall", lambda: now + 11)
    monkeypatch.setattr(clock, "monotonic", lambda: ticks + 11)
    broker.database.keeper.beat()
    held = broker.database.connect()
    broker.database.janitor.expire_queues(held)
    held.close()
    assert not channel._has_queue("idle")
    assert channel._has_queue("busy")


def test_an_exclusive_queue_goes_with_its_consumer(broker):
    queue = Queue("mine", exclusive=True, auto_delete=True)
    channel = _declare(broker, queue)
    consumer = kombu.Consumer(channel, [queue], on_message=lambda message: None)
    consumer.consume()
    broker.publish(1, queue="mine")
    consumer.cancel()
    assert not channel._has_queue("mine")


def test_remote_control_reaches_another_connection(broker):
    mailbox = Mailbox("test", type="fanout", accept=["json"])
    stop = threading.Event()

    def serve() -> None:
        connection = broker.connection()
        node = mailbox(connection).Node("worker1", state=None, channel=connection.channel())
        node.handlers["ping"] = lambda state, **kw: "pong"
        node.listen()
        ready.set()
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=0.05)
        connection.release()

    ready = threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait(5)
    try:
        replies = mailbox(broker.connection()).call(["worker1"], "ping", timeout=3)
    finally:
        stop.set()
        thread.join()
    assert replies == [{"worker1": "pong"}]


def test_capabilities(broker):
    assert capabilities_of(broker.connection()) == Capabilities(
        delayed=True, delayed_requeue=True, dead_letter=True, lists_dead_letters=True,
        atomic_settle=True, buffers=True, leased=True,
        cheap_prefetch=True, wake=True, fanout=True, pause=True, queue_states=True,
    )  # fmt: skip
    assert capabilities_of(kombu.Connection("redis://")).cheap_prefetch
    assert not capabilities_of(kombu.Connection("amqp://")).cheap_prefetch
    assert not capabilities_of(kombu.Connection("memory://")).delayed
