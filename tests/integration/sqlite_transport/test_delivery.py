"""Claiming, settling and redelivering on SQLite."""

from __future__ import annotations

import logging
import threading
from typing import Any

import kombu
import pytest

from flask_taskworker import clock, failpoints
from flask_taskworker.exceptions import InvalidOptionError, MessageTooLargeError
from flask_taskworker.transports.sql import dead_letters
from flask_taskworker.transports.sql.doorbell import RESULTS


@pytest.fixture(autouse=True)
def _no_failpoints() -> Any:
    yield
    failpoints.disarm()


def test_messages_come_in_the_order_they_were_sent(broker, receiver):
    broker.publish(*range(10))
    assert receiver().drain() == list(range(10))


def test_the_most_urgent_comes_first(broker, receiver):
    producer = kombu.Producer(broker.channel())
    for priority in (0, 9, 5, 9, 99, -3):
        producer.publish(priority, exchange="", routing_key="q", priority=priority)
    assert receiver().drain() == [9, 9, 99, 5, 0, -3]


def test_body_headers_and_properties_arrive_unchanged(broker, receiver):
    body = bytes(range(256))
    broker.publish(
        body,
        content_type="application/octet-stream",
        content_encoding="binary",
        headers={"text": "äöü\u2603", "list": [1, None], "nested": {"a": 1.5}},
        correlation_id="c-1",
        reply_to="r",
        priority=3,
    )
    one = receiver()
    one.drain()
    message = one.messages[0]
    assert message.body == body
    assert message.headers == {"text": "äöü\u2603", "list": [1, None], "nested": {"a": 1.5}}
    assert (message.properties["correlation_id"], message.properties["reply_to"]) == ("c-1", "r")
    assert message.properties["delivery_count"] == 1
    assert message.delivery_info == {
        "exchange": "", "routing_key": "q", "redelivered": False, "priority": 3,
    }  # fmt: skip


@pytest.mark.parametrize("size", [0, 1, 1_000_000])
def test_bodies_of_any_size(broker, receiver, size):
    broker.publish(b"x" * size, content_type="application/data", content_encoding="binary")
    one = receiver()
    one.drain()
    assert len(one.messages[0].body) == size


def test_a_message_above_the_limit_is_refused_before_anything_is_written(broker):
    producer = kombu.Producer(broker.channel(max_message_bytes=2000))
    with pytest.raises(MessageTooLargeError, match="max_message_bytes=2000"):
        producer.publish(b"x" * 2001, exchange="", routing_key="q", content_encoding="binary")
    assert broker.count() == 0


def test_a_queue_with_a_hostile_name_is_a_queue_like_any_other(broker, receiver):
    for name in ("a'b\"c; DROP TABLE taskworker_message", "naïve ☃", "%s ? :x {y}", "x" * 255):
        broker.publish(name, queue=name)
        assert receiver(name).drain() == [name]


@pytest.mark.parametrize("name", ["x" * 256, "a\0b", " a", "\ud800"])
def test_a_name_no_database_can_keep_is_refused(broker, name):
    with pytest.raises(ValueError, match="queue"):
        broker.publish(1, queue=name)


def test_an_acknowledged_message_is_deleted(broker, receiver):
    broker.publish(1, 2)
    one = receiver()
    one.drain()
    one.messages[0].ack()
    one.channel.flush()
    assert broker.count() == 1


def test_acknowledgements_wait_for_the_next_claim_to_carry_them(broker, receiver):
    broker.publish(1, 2)
    one = receiver(prefetch=1, transport_options={"ack_delay": 60})
    one.connection.drain_events(timeout=0)
    one.messages[0].ack()
    assert broker.count() == 2
    one.connection.drain_events(timeout=0)
    assert broker.count() == 1


def test_multiple_acknowledges_everything_up_to_the_tag(broker, receiver):
    broker.publish(1, 2, 3)
    one = receiver()
    one.drain()
    one.channel.basic_ack(one.messages[1].delivery_tag, multiple=True)
    one.channel.flush()
    assert broker.count() == 1


def test_prefetch_limits_what_is_in_hand_and_can_change_any_time(broker, receiver):
    broker.publish(*range(10))
    one = receiver(prefetch=2)
    assert one.drain() == [0, 1]
    one.channel.basic_qos(0, 5, False)
    assert one.drain() == [2, 3, 4]
    one.messages[0].ack()
    assert one.drain() == [5]


def test_two_consumers_share_without_overlap(broker, receiver):
    broker.publish(*range(20))
    one, two = receiver(prefetch=5), receiver(prefetch=5)
    assert sorted(one.drain() + two.drain()) == list(range(10))


def test_several_queues_are_served_in_turn(broker, receiver):
    broker.publish(*["a"] * 20, queue="a")
    broker.publish(*["b"] * 20, queue="b")
    one = receiver("a", "b", prefetch=10)
    assert sorted(one.drain()) == ["a"] * 5 + ["b"] * 5


def test_a_requeued_message_comes_back_at_its_place_and_counts(broker, receiver):
    broker.publish(1, 2)
    one = receiver(prefetch=1)
    one.drain()
    one.messages[0].requeue()
    assert one.drain() == [1]
    assert one.messages[1].delivery_info["redelivered"] is True
    assert one.messages[1].properties["delivery_count"] == 2


def test_a_delivery_that_does_not_count_leaves_no_trace(broker, receiver):
    broker.publish(1)
    one = receiver()
    one.drain()
    one.channel.requeue(one.messages[0].delivery_tag, count_delivery=False)
    one.channel.flush()
    assert one.drain() == [1]
    assert one.messages[1].delivery_info["redelivered"] is False


def test_a_delayed_requeue_waits(broker, receiver):
    broker.publish(1)
    one = receiver()
    one.drain()
    one.channel.requeue(one.messages[0].delivery_tag, delay=0.05)
    one.channel.flush()
    assert one.drain() == []
    one.connection.drain_events(timeout=5)
    assert one.bodies() == [1, 1]


def test_a_rejected_message_is_gone(broker, receiver):
    broker.publish(1)
    one = receiver()
    one.drain()
    one.messages[0].reject()
    one.channel.flush()
    assert broker.count() == 0


def test_recover_delivers_everything_unsettled_again(broker, receiver):
    broker.publish(1, 2)
    one = receiver()
    one.drain()
    one.channel.basic_recover(requeue=True)
    assert one.drain() == [1, 2]


def test_closing_gives_back_uncounted_what_is_unsettled(broker, receiver):
    broker.publish(1, 2, 3)
    one = receiver()
    one.drain()
    one.messages[0].ack()
    one.connection.release()
    two = receiver()
    assert two.drain() == [2, 3]
    assert {message.properties["delivery_count"] for message in two.messages} == {1}


def test_a_callback_that_raises_does_not_lose_the_rest_of_the_claim(broker):
    broker.publish(1, 2, 3)
    got: list[Any] = []

    def callback(message: Any) -> None:
        got.append(message.decode())
        if len(got) == 1:
            raise RuntimeError("callback")

    connection = broker.connection()
    channel = connection.channel()
    consumer = kombu.Consumer(channel, [kombu.Queue("q")], on_message=callback, auto_declare=False)
    consumer.consume()
    with pytest.raises(RuntimeError, match="callback"):
        connection.drain_events(timeout=0)
    connection.drain_events(timeout=0)
    assert got == [1, 2, 3]


def test_cancelling_gives_back_what_was_claimed_but_not_delivered(broker, receiver):
    broker.publish(1, 2, 3)
    connection = broker.connection()
    channel = connection.channel()

    def callback(message: Any) -> None:
        message.ack()
        raise RuntimeError("stop")

    consumer = kombu.Consumer(channel, [kombu.Queue("q")], on_message=callback, auto_declare=False)
    consumer.consume()
    with pytest.raises(RuntimeError, match="stop"):
        connection.drain_events(timeout=0)
    consumer.cancel()
    channel.flush()
    assert receiver().drain() == [2, 3]


def test_a_consumer_without_acknowledgement_takes_messages_for_good(broker, receiver):
    broker.publish(1, 2)
    one = receiver(no_ack=True)
    assert one.drain() == [1, 2]
    assert broker.count() == 0


def test_basic_get_returns_one_message_or_none(broker):
    broker.publish(1)
    channel = broker.channel()
    message = channel.basic_get("q")
    assert message.decode() == 1
    assert channel.basic_get("q") is None
    message.ack()
    channel.flush()
    assert broker.count() == 0


def test_acknowledgements_from_other_threads_end_the_wait_and_are_written(broker, receiver):
    broker.publish(*range(50))
    one = receiver()
    one.drain()
    threads = [threading.Thread(target=message.ack) for message in one.messages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one.channel.flush()
    assert broker.count() == 0


def test_a_delayed_message_is_delivered_when_due_and_not_before(broker, receiver, monkeypatch):
    now = clock.wall()
    broker.publish("later", eta_at=now + 3600)
    broker.publish("past", eta_at=now - 3600)
    one = receiver()
    assert one.drain() == ["past"]
    monkeypatch.setattr(clock, "wall", lambda: now + 3601)
    one.connection.transport.wait(one.connection, 5)
    assert one.drain() == ["later"]


@pytest.mark.parametrize("eta", ["soon", float("nan"), float("inf"), [1]])
def test_an_eta_that_is_no_time_is_refused(broker, eta):
    with pytest.raises((InvalidOptionError, ValueError), match="eta_at"):
        broker.publish(1, eta_at=eta)


def test_a_message_that_is_never_settled_becomes_a_dead_letter(broker, receiver, caplog):
    broker.publish("poison")
    for _ in range(2):
        one = receiver(transport_options={"max_deliveries": 2})
        assert one.drain() == ["poison"]
        one.messages[0].requeue()
        one.channel.flush()
    assert receiver(transport_options={"max_deliveries": 2}).drain() == []
    (letter,) = dead_letters.list(broker.database)
    assert letter.queue == "q"
    assert "2 times" in letter.reason


def test_a_dead_letter_keeps_its_reason_and_can_be_replayed(broker, receiver):
    broker.publish("a", headers={"task": "x"})
    one = receiver()
    one.drain()
    one.channel.dead_letter(one.messages[0].delivery_tag, "no such task")
    one.channel.flush()
    assert one.drain() == []
    (letter,) = dead_letters.list(broker.database, "q")
    assert (letter.reason, letter.headers["task"]) == ("no such task", "x")
    assert dead_letters.replay(broker.database, [letter.id]) == 1
    assert one.drain() == ["a"]
    assert one.messages[-1].properties["delivery_count"] == 1


def test_dead_letters_can_be_deleted(broker, receiver):
    broker.publish("a", "b")
    one = receiver()
    one.drain()
    for message in one.messages:
        one.channel.dead_letter(message.delivery_tag, "r")
    one.channel.flush()
    assert dead_letters.delete(broker.database, queue="other") == 0
    assert dead_letters.delete(broker.database) == 2
    assert dead_letters.list(broker.database) == ()


def test_a_row_edited_into_nonsense_becomes_a_dead_letter(broker, receiver, caplog):
    broker.publish(1, 2, 3)
    held = broker.database.connect()
    held.execute("UPDATE taskworker_message SET meta = '{not json' WHERE id = 1")
    held.execute("UPDATE taskworker_message SET meta = '[]' WHERE id = 2")
    held.close()
    assert receiver().drain() == [3]
    assert len(dead_letters.list(broker.database)) == 2


# -- fencing and results in the same transaction ------------------------------------------


def _take_away(broker) -> None:
    held = broker.database.connect()
    held.execute("UPDATE taskworker_message SET owner = 0 WHERE owner > 0")
    held.close()


def _results(broker) -> list[Any]:
    held = broker.database.connect()
    try:
        return [row[0] for row in held.execute("SELECT x FROM results ORDER BY x").fetchall()]
    finally:
        held.close()


@pytest.fixture
def results(broker) -> None:
    held = broker.database.connect()
    held.execute("CREATE TABLE results (x INTEGER PRIMARY KEY)")
    held.close()


INSERT = "INSERT INTO results (x) VALUES (?)"


@pytest.mark.usefixtures("results")
def test_result_and_acknowledgement_are_one_transaction(broker, receiver):
    broker.publish(1, 2, 3)
    one = receiver()
    one.drain()
    for number, message in enumerate(one.messages):
        one.channel.settle_with(message.delivery_tag, [(INSERT, (number,))], ring=RESULTS)
    failpoints.arm("before_ack", "raise")
    with pytest.raises(failpoints.FailpointError):
        one.channel.flush()
    assert (broker.count(), _results(broker)) == (3, [])
    one.channel.flush()
    assert (broker.count(), _results(broker)) == (0, [0, 1, 2])


@pytest.mark.usefixtures("results")
def test_results_are_written_with_the_next_claim(broker, receiver):
    broker.publish(1, 2)
    one = receiver(prefetch=1, transport_options={"ack_delay": 60})
    one.connection.drain_events(timeout=0)
    one.channel.settle_with(one.messages[0].delivery_tag, [(INSERT, (7,))])
    one.connection.drain_events(timeout=0)
    assert (broker.count(), _results(broker)) == (1, [7])


@pytest.mark.usefixtures("results")
def test_the_result_of_a_message_that_was_taken_away_is_refused(broker, receiver, caplog):
    broker.publish(1, 2)
    one = receiver()
    one.drain()
    held = broker.database.connect()
    held.execute("UPDATE taskworker_message SET owner = 0 WHERE id = 1")
    held.close()
    lost: list[int] = []
    one.channel.on_lost_lease = lost.append
    for number, message in enumerate(one.messages):
        one.channel.settle_with(message.delivery_tag, [(INSERT, (number,))])
    with caplog.at_level(logging.WARNING):
        one.channel.flush()
    assert _results(broker) == [1]
    assert broker.count() == 1
    assert (one.channel.lost_leases, lost) == (1, [1])
    assert "taken away" in caplog.text


@pytest.mark.usefixtures("results")
def test_a_refused_settlement_does_not_stop_the_claim_that_carries_it(broker, receiver):
    broker.publish(1, 2)
    one = receiver(prefetch=1, transport_options={"ack_delay": 60})
    one.connection.drain_events(timeout=0)
    _take_away(broker)
    one.channel.settle_with(one.messages[0].delivery_tag, [(INSERT, (7,))])
    one.connection.drain_events(timeout=0)
    assert one.bodies() == [1, 1]
    assert (one.channel.lost_leases, _results(broker)) == (1, [])


@pytest.mark.usefixtures("results")
def test_a_result_statement_that_cannot_run_hurts_only_its_own_message(broker, receiver, caplog):
    broker.publish(1, 2)
    one = receiver()
    one.drain()
    one.channel.settle_with(one.messages[0].delivery_tag, [("INSERT INTO nowhere VALUES (1)", ())])
    one.channel.settle_with(one.messages[1].delivery_tag, [(INSERT, (2,))])
    one.channel.flush()
    assert _results(broker) == [2]
    assert one.drain() == [1]


def test_an_acknowledgement_after_a_lost_lease_is_refused(broker, receiver):
    broker.publish(1)
    one, two = receiver(), receiver()
    one.drain()
    _take_away(broker)
    assert two.drain() == [1]
    one.messages[0].ack()
    one.channel.flush()
    assert broker.count() == 1
    assert one.channel.lost_leases == 1
    two.messages[0].ack()
    two.channel.flush()
    assert broker.count() == 0


def test_a_late_settlement_spares_the_message_that_got_the_id_of_a_lost_one(broker, receiver):
    broker.publish("old")
    one = receiver()
    one.drain()
    # A peer took the message away and finished it; this consumer was frozen and knows nothing.
    held = broker.database.connect()
    held.execute("DELETE FROM taskworker_message")
    held.close()
    broker.publish("new")
    assert one.drain() == ["new"]
    assert one.channel.lost_leases == 1
    one.messages[0].ack()
    one.channel.flush()
    assert broker.count() == 1
    one.messages[1].ack()
    one.channel.flush()
    assert broker.count() == 0
    assert one.channel.lost_leases == 1


def test_a_batch_is_stored_as_a_whole_or_not_at_all(broker, receiver):
    producer = kombu.Producer(broker.channel())
    if not hasattr(producer, "batch"):
        pytest.skip("this kombu has no Producer.batch")

    def fail() -> None:
        with producer.batch(max_size=1000):
            producer.publish(0, exchange="", routing_key="q")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert broker.count() == 0
    with producer.batch(max_size=10):
        for number in range(25):
            producer.publish(number, exchange="", routing_key="q")
        assert broker.count() == 20
    assert receiver().drain() == list(range(25))


@pytest.mark.parametrize("settle", ["ack", "requeue"])
def test_settling_a_message_of_a_deleted_queue_touches_no_other(
    broker: Any, receiver: Any, settle: str
) -> None:
    broker.publish("old")
    one = receiver()
    one.drain()
    other = broker.channel()
    other.queue_delete("q")
    broker.publish("new")
    two = receiver()
    two.drain()
    getattr(one.messages[0], settle)()
    one.channel.flush()
    broker.database.janitor._free_orphans(other.held())
    two.messages[0].requeue()
    two.channel.flush()
    assert receiver().drain() == ["new"]
    assert broker.count() == 1
