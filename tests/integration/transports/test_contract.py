"""What the SQL transport promises, on every database."""

from __future__ import annotations

import threading
from typing import Any

import kombu
import pytest
from kombu import Exchange, Queue
from kombu.pidbox import Mailbox

from flask_taskworker.transports.sql import dead_letters


def test_order_priority_and_content(broker):
    broker.publish("low", priority=0)
    broker.publish({"ü": "☃" * 10, "n": None}, priority=9, headers={"id": "a'\\\"%s?"})
    one = broker.receiver()
    assert one.drain() == [{"ü": "☃" * 10, "n": None}, "low"]
    assert one.messages[0].headers == {"id": "a'\\\"%s?"}
    assert one.messages[0].delivery_info["priority"] == 9


@pytest.mark.parametrize("body", [b"", bytes(range(256)) * 4, b"x" * 2_000_000])
def test_any_bytes_arrive(broker, body):
    broker.publish(body, content_type="application/data", content_encoding="binary")
    one = broker.receiver()
    one.drain()
    assert one.messages[0].body == body


def test_names_that_need_quoting(broker):
    for name in (
        "a'b\"c`; DROP TABLE x --",
        "naïve ☃ 🙂",
        "%s %(x)s ? :x {y}",
        "é" * 255,
        "A",
        "a",
    ):
        broker.publish(name, queue=name)
    assert broker.receiver("A").drain() == ["A"]
    for name in ("a'b\"c`; DROP TABLE x --", "naïve ☃ 🙂", "%s %(x)s ? :x {y}", "é" * 255, "a"):
        assert broker.receiver(name).drain() == [name]


def test_prefetch_acknowledge_requeue_and_reject(broker):
    broker.publish(*range(6))
    one = broker.receiver(prefetch=3)
    assert one.drain() == [0, 1, 2]
    one.messages[0].ack()
    one.messages[1].requeue()
    one.messages[2].reject()
    assert one.drain() == [1, 3, 4]
    assert one.messages[3].delivery_info["redelivered"] is True
    one.ack()
    assert one.drain() == [5]
    one.ack()
    assert broker.count() == 0


def test_claims_carry_acknowledgements(broker):
    broker.publish(*range(100))
    one = broker.receiver(prefetch=7, ack_delay=60)
    while one.drain():
        for message in one.messages:
            if not message.acknowledged:
                message.ack()
    one.channel.flush()
    assert broker.count() == 0
    assert [message.decode() for message in one.messages] == list(range(100))


def test_what_is_closed_unsettled_comes_back(broker):
    broker.publish(1, 2)
    one = broker.receiver()
    one.drain()
    one.connection.release()
    two = broker.receiver()
    assert two.drain() == [1, 2]
    assert two.messages[0].properties["delivery_count"] == 1


def test_several_queues_and_consumers_that_take_for_good(broker):
    broker.publish(*["a"] * 10, queue="a")
    broker.publish(*["b"] * 10, queue="b")
    one = broker.receiver("a", "b", prefetch=4)
    assert sorted(one.drain()) == ["a", "a", "b", "b"]
    connection = broker.connection()
    got: list[Any] = []
    kombu.Consumer(
        connection.channel(), [Queue("a")], on_message=got.append, no_ack=True, auto_declare=False
    ).consume()
    while len(got) < 8:
        connection.drain_events(timeout=5)
    assert broker.count() == 12


def test_delayed_messages_become_due(broker):
    broker.connection().channel().held()  # creating the tables may take a while
    now = broker.database.now()
    broker.publish("hour", eta_at=now + 3600)
    broker.publish("soon", eta_at=now + 3)
    broker.publish("now", eta_at=now - 5)
    one = broker.receiver()
    assert one.drain() == ["now"]
    assert one.wait_for(2) == ["now", "soon"]
    assert one.drain() == []


def test_a_delayed_requeue_and_an_uncounted_one(broker):
    broker.publish(1)
    one = broker.receiver()
    one.drain()
    one.channel.requeue(one.messages[0].delivery_tag, delay=0.2, count_delivery=False)
    assert one.wait_for(2) == [1, 1]
    assert one.messages[1].properties["delivery_count"] == 1


def test_dead_letters_are_kept_replayed_and_deleted(broker):
    broker.publish("a", "b")
    one = broker.receiver()
    one.drain()
    for message in one.messages:
        one.channel.dead_letter(message.delivery_tag, "naïve ☃")
    one.channel.flush()
    letters = dead_letters.list(broker.database, "q")
    assert [letter.reason for letter in letters] == ["naïve ☃"] * 2
    assert [letter.id for letter in dead_letters.list(broker.database, after=letters[0].id)] == [
        letters[1].id
    ]
    assert dead_letters.replay(broker.database, [letters[0].id]) == 1
    assert dead_letters.delete(broker.database, queue="q") == 1
    assert one.drain() == ["a"]


def test_too_many_deliveries_make_a_dead_letter(broker):
    broker.publish(1)
    for _ in range(2):
        one = broker.receiver(max_deliveries=2)
        one.drain()
        one.messages[0].requeue()
        one.channel.flush()
    assert broker.receiver(max_deliveries=2).drain() == []
    assert len(dead_letters.list(broker.database)) == 1


def test_results_commit_with_the_acknowledgement_or_not_at_all(broker, unique):
    broker.publish(1, 2, 3)
    one = broker.receiver()
    one.drain()
    broker.execute(f"CREATE TABLE {unique}_results (x INTEGER PRIMARY KEY)")
    insert = broker.database.dialect.sql(f"INSERT INTO {unique}_results (x) VALUES (?)")
    broker.execute("UPDATE {message} SET owner = 0 WHERE prio = 9 AND id = ?", _first_id(broker))
    for number, message in enumerate(one.messages):
        one.channel.settle_with(message.delivery_tag, [(insert, (number,))])
    one.channel.flush()
    rows = broker.execute(f"SELECT x FROM {unique}_results ORDER BY x")
    broker.execute(f"DROP TABLE {unique}_results")
    assert [row[0] for row in rows] == [1, 2]
    assert one.channel.lost_leases == 1
    assert broker.count() == 1


def _first_id(broker) -> int:
    return int(broker.execute("SELECT min(id) FROM {message}")[0][0])


def test_a_lost_acknowledgement_is_reported_when_a_claim_carries_it(broker):
    broker.publish(1, 2)
    one = broker.receiver(prefetch=1, ack_delay=60)
    one.connection.drain_events(timeout=0)
    broker.execute("DELETE FROM {message} WHERE owner > 0")
    one.messages[0].ack()
    one.connection.drain_events(timeout=0)
    assert one.channel.lost_leases == 1
    assert one.messages[1].decode() == 2


def test_exchanges_route_for_every_process(broker):
    news, logs = Exchange("news", type="fanout"), Exchange("logs", type="topic")
    jobs = Exchange("jobs", type="direct")
    channel = broker.connection().channel()
    for queue in (
        Queue("a", news), Queue("b", news), Queue("a", logs, "x.#"), Queue("b", jobs, "k"),
    ):  # fmt: skip
        queue(channel).declare()
    producer = kombu.Producer(broker.connection().channel())
    producer.publish(1, exchange="news", routing_key="")
    producer.publish(2, exchange="logs", routing_key="x.y.z")
    producer.publish(3, exchange="jobs", routing_key="k")
    assert broker.receiver("a").drain() == [1, 2]
    assert broker.receiver("b").drain() == [1, 3]


def test_a_batch_is_stored_in_order(broker):
    producer = kombu.Producer(broker.connection().channel())
    if not hasattr(producer, "batch"):
        pytest.skip("this kombu has no Producer.batch")
    with producer.batch(max_size=100):
        for number in range(250):
            producer.publish(number, exchange="", routing_key="q")
    assert broker.receiver().drain() == list(range(250))


def test_deleting_pausing_and_expiring_queues(broker):
    channel = broker.connection().channel()
    Queue("short", expires=0.01)(channel).declare()
    broker.publish(1)
    channel.pause_queue("q")
    one = broker.receiver()
    assert one.drain() == []
    channel.pause_queue("q", False)
    assert one.drain() == [1]
    channel.queue_delete("q")
    one.messages[0].ack()
    one.channel.flush()
    assert broker.count() == 0
    broker.publish(2)
    assert one.drain() == [2]
    held = broker.database.connect()
    threading.Event().wait(0.02)
    broker.database.janitor.expire_queues(held)
    held.close()
    assert not channel._has_queue("short")


def test_a_publish_in_the_callers_transaction(broker):
    import sqlalchemy as sa

    one = broker.receiver()
    channel = broker.connection().channel()
    channel.held().close()
    engine = sa.create_engine(broker.url.removeprefix("taskworker+"))
    with engine.connect() as connection:
        for body, finish in ((b"no", connection.rollback), (b"yes", connection.commit)):
            message = channel.prepare_message(
                body, content_type="application/data", content_encoding="binary"
            )
            channel.publish_in(connection, message, "q")
            assert one.drain() == []
            finish()
    engine.dispose()
    channel.wake_consumers()
    assert one.drain() == [b"yes"]


def test_remote_control_works_between_processes(broker):
    node = broker.spawn(
        "from kombu.pidbox import Mailbox\n"
        "mailbox = Mailbox('test', type='fanout')(connection)\n"
        "node = mailbox.Node('w1', channel=connection.channel())\n"
        "node.handlers['ping'] = lambda state, **kw: 'pong'\n"
        "node.listen()\n"
        "print('ready', flush=True)\n"
        "while True: connection.drain_events()\n"
    )
    assert node.stdout.readline() == "ready\n"
    mailbox = Mailbox("test", type="fanout")(broker.connection())
    assert mailbox.call(["w1"], "ping", timeout=5) == [{"w1": "pong"}]
