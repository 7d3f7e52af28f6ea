"""Settling: the last step of each message, after what must not be lost is stored."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from flask_taskworker import AsyncResult, clock, failpoints, states
from flask_taskworker.backends.base import TaskRecord
from flask_taskworker.exceptions import BrokerUnavailableError, InvalidMessageError
from flask_taskworker.failpoints import FailpointError
from flask_taskworker.message import Unreadable, WireMessage, parse
from flask_taskworker.transports import Capabilities
from flask_taskworker.worker.delivery import Delivery, Outcome, Settlement, Unsettled
from flask_taskworker.worker.settling import Settler
from support import AppRoom, deliver, received

PLAIN = Capabilities()
ABLE = Capabilities(dead_letter=True, atomic_settle=True, buffers=True, leased=True)


class Channel:
    """What a transport of ours offers; keeps what it is asked to do."""

    no_ack_consumers: set[str] | None = None

    def __init__(self) -> None:
        self.log: list[Any] = []

    def dead_letter(self, tag: str, reason: str) -> None:
        self.log.append(("dead_letter", tag, reason))

    def settle_with(self, tag: str, statements: Any, ring: Any, messages: Any = ()) -> None:
        assert not messages
        self.log.append(("settle_with", tag, statements, ring))

    def requeue(self, tag: str, delay: float = 0.0, count_delivery: bool = True) -> None:
        self.log.append(("requeue", tag, delay, count_delivery))

    def flush(self) -> None:
        self.log.append(("flush",))

    # kombu's messages settle themselves through these
    def basic_ack(self, tag: str, multiple: bool = False) -> None:
        self.log.append(("ack", tag))

    def basic_reject(self, tag: str, requeue: bool) -> None:
        self.log.append(("requeue" if requeue else "reject", tag))


@pytest.fixture
def channel() -> Channel:
    return Channel()


def held(channel: Channel, **fields: Any) -> Delivery:
    delivery = deliver("t", **fields)
    delivery.raw.channel, delivery.raw.delivery_tag = channel, "tag-1"
    return delivery


def settler(room: AppRoom, channel: Channel, capabilities: Capabilities = PLAIN) -> Settler:
    return Settler(room.task_app, channel, capabilities, Unsettled())


def test_a_finished_message_is_acknowledged(room: AppRoom, channel: Channel) -> None:
    settler(room, channel).settle(held(channel), Outcome(Settlement.ACKNOWLEDGE))
    assert channel.log == [("ack", "tag-1")]


def test_a_result_is_stored_in_the_transaction_that_acknowledges(
    room: AppRoom, channel: Channel
) -> None:
    delivery = held(channel)
    record = TaskRecord(delivery.message.id, states.SUCCESS, 5)
    outcome = Outcome(Settlement.ACKNOWLEDGE, record, ("INSERT", ["a"]))
    settler(room, channel, ABLE).settle(delivery, outcome)
    ((what, tag, statements, _),) = channel.log
    assert (what, tag, statements) == ("settle_with", "tag-1", [("INSERT", ["a"])])


@pytest.mark.parametrize("capabilities", [PLAIN, ABLE])
def test_a_message_is_put_back(capabilities: Capabilities, room: AppRoom, channel: Channel) -> None:
    settler(room, channel, capabilities).settle(held(channel), Outcome(Settlement.REQUEUE))
    assert [entry[:2] for entry in channel.log] == [("requeue", "tag-1")]


def test_what_did_not_start_does_not_count_as_delivered(room: AppRoom, channel: Channel) -> None:
    settler(room, channel, ABLE).give_back(held(channel))
    assert channel.log == [("requeue", "tag-1", 0.0, False)]


def test_a_broker_that_delays_what_it_has_handed_out_keeps_the_message(
    room: AppRoom, channel: Channel
) -> None:
    settler(room, channel, Capabilities(delayed_requeue=True)).delay(held(channel), 60.0)
    assert channel.log == [("requeue", "tag-1", 60.0, False)]
    assert room.publisher.sent == []


def test_a_broker_that_delays_only_what_is_published_gets_a_copy(
    room: AppRoom, channel: Channel
) -> None:
    delivery = held(channel, id="my-id")
    settler(room, channel, Capabilities(delayed=True)).delay(delivery, 60.0)
    ((queue, wire),) = room.publisher.sent
    assert queue == delivery.queue
    assert wire.headers["id"] == "my-id"
    assert 50 < wire.properties["eta_at"] - clock.wall() <= 60
    assert channel.log == [("ack", "tag-1")]


def test_what_is_settled_is_in_nobody_s_hands(room: AppRoom, channel: Channel) -> None:
    unsettled = Unsettled()
    settler = Settler(room.task_app, channel, Capabilities(delayed_requeue=True), unsettled)
    deliveries = [held(channel) for _ in range(3)]
    for delivery in deliveries:
        unsettled.add(delivery)
    settler.settle(deliveries[0], Outcome(Settlement.ACKNOWLEDGE))
    settler.give_back(deliveries[1])
    assert unsettled.snapshot() == [deliveries[2]]
    settler.delay(deliveries[2], 60.0)
    assert len(unsettled) == 0


def test_a_broker_that_cannot_uncount_gets_it_back_all_the_same(
    room: AppRoom, channel: Channel
) -> None:
    settler(room, channel).give_back(held(channel))
    assert channel.log == [("requeue", "tag-1")]


def test_a_dead_letter_stays_with_the_broker_that_keeps_them(
    room: AppRoom, channel: Channel
) -> None:
    delivery = held(channel)
    record = TaskRecord(delivery.message.id, states.FAILURE, "boom")
    outcome = Outcome(Settlement.DEAD_LETTER, record, reason="no such task")
    settler(room, channel, ABLE).settle(delivery, outcome)
    assert channel.log == [("dead_letter", "tag-1", "no such task")]
    assert room.task_app.result(delivery.message.id).state == states.FAILURE
    assert room.publisher.sent == []


def test_elsewhere_a_dead_letter_is_published_and_then_acknowledged(
    room: AppRoom, channel: Channel
) -> None:
    delivery = held(channel, kwargs={"x": 1}, headers={"x-trace": "t"})
    settler(room, channel).settle(delivery, Outcome(Settlement.DEAD_LETTER, reason="no such task"))
    ((queue, wire),) = room.publisher.sent
    assert queue == "celery.dead"
    assert wire.headers["x-dead-letter-reason"] == "no such task"
    assert wire.headers["x-trace"] == "t"
    assert parse(received(wire), {"json"}).id == delivery.message.id  # type: ignore[union-attr]
    assert channel.log == [("ack", "tag-1")]


def test_a_dead_letter_that_cannot_be_published_is_not_acknowledged(
    room: AppRoom, channel: Channel
) -> None:
    room.publisher.error = BrokerUnavailableError("away")
    with pytest.raises(BrokerUnavailableError):
        settler(room, channel).settle(held(channel), Outcome(Settlement.DEAD_LETTER))
    assert channel.log == []


def test_a_compressed_dead_letter_is_kept_unpacked(room: AppRoom, channel: Channel) -> None:
    delivery = held(channel)
    delivery.raw.headers["compression"] = "application/x-gzip"
    settler(room, channel).settle(delivery, Outcome(Settlement.DEAD_LETTER))
    ((_, wire),) = room.publisher.sent
    assert "compression" not in wire.headers
    assert delivery.raw.headers["compression"] == "application/x-gzip"


def test_what_is_no_task_message_is_parked_with_its_reason(
    room: AppRoom, channel: Channel, caplog: pytest.LogCaptureFixture
) -> None:
    raw = held(channel, id="my-id").raw
    settler(room, channel, ABLE).park(raw, "mail", Unreadable("retries is 'x'", "my-id", "t"))
    assert channel.log == [("dead_letter", "tag-1", "retries is 'x'")]
    handle: AsyncResult[Any] = room.task_app.result("my-id")
    with pytest.raises(InvalidMessageError, match="retries is 'x'"):
        handle.get(timeout=0)
    assert "message in queue mail is parked: retries is 'x'" in caplog.text


@pytest.mark.parametrize(
    ("body", "content_type", "encoding", "headers"),
    [
        (b"\xff\x00", None, None, []),
        ("text", 5, 5, "junk"),
        (None, "application/json", "utf-8", {"a": 1}),
        ({"not": "bytes"}, "application/json", "utf-8", {}),
    ],
)
def test_anything_can_be_parked(
    body: Any, content_type: Any, encoding: Any, headers: Any, room: AppRoom, channel: Channel
) -> None:
    raw = held(channel).raw
    raw.body, raw.content_type, raw.content_encoding, raw.headers = (
        body, content_type, encoding, headers,
    )  # fmt: skip
    settler(room, channel).park(raw, "mail", Unreadable("it is junk"))
    ((queue, wire),) = room.publisher.sent
    assert queue == "mail.dead"
    assert isinstance(wire, WireMessage)
    assert isinstance(wire.body, (bytes, str))
    assert isinstance(wire.content_type, str)
    assert isinstance(wire.content_encoding, str)
    assert wire.headers["x-dead-letter-reason"] == "it is junk"
    assert channel.log == [("ack", "tag-1")]


def test_a_message_is_parked_even_when_its_result_cannot_be_stored(
    room: AppRoom, channel: Channel, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    def away(record: TaskRecord) -> None:
        raise OSError("the store is away")

    monkeypatch.setattr(room.task_app.backend, "store", away)
    settler(room, channel, ABLE).park(held(channel).raw, "q", Unreadable("junk", "my-id"))
    assert channel.log == [("dead_letter", "tag-1", "junk")]
    assert "result of my-id is not stored: the store is away" in caplog.text


# -- at most once -------------------------------------------------------------------------


def test_acknowledged_before_the_run_means_now(room: AppRoom, channel: Channel) -> None:
    delivery = held(channel)
    settler(room, channel, ABLE).acknowledge_before_run(delivery)
    assert channel.log == [("ack", "tag-1"), ("flush",)]
    assert delivery.acknowledged


def test_what_is_acknowledged_is_not_settled_twice_but_its_result_is_stored(
    room: AppRoom, channel: Channel
) -> None:
    delivery = held(channel)
    delivery.acknowledged = True
    record = TaskRecord(delivery.message.id, states.SUCCESS, 5)
    settler(room, channel).settle(delivery, Outcome(Settlement.ACKNOWLEDGE, record))
    settler(room, channel).settle(delivery, Outcome(Settlement.REQUEUE))
    assert channel.log == []
    assert room.task_app.result(delivery.message.id).get(timeout=0) == 5


def test_what_is_acknowledged_and_did_not_run_is_reported_as_lost(
    room: AppRoom, channel: Channel, caplog: pytest.LogCaptureFixture
) -> None:
    delivery = held(channel, id="my-id")
    delivery.acknowledged = True
    settler(room, channel).give_back(delivery)
    assert channel.log == []
    assert "task t[my-id] is lost: it is acknowledged before it runs" in caplog.text
    assert caplog.records[0].levelno == logging.ERROR


# -- flushing and failing -----------------------------------------------------------------


def test_only_a_channel_that_buffers_is_flushed(room: AppRoom, channel: Channel) -> None:
    settler(room, channel).flush()
    assert channel.log == []
    settler(room, channel, ABLE).flush()
    assert channel.log == [("flush",)]


@pytest.mark.usefixtures("no_failpoints")
@pytest.mark.parametrize(
    ("point", "settlement", "settled"),
    [
        ("before_ack", Settlement.ACKNOWLEDGE, False),
        ("after_ack", Settlement.ACKNOWLEDGE, True),
        ("before_requeue", Settlement.REQUEUE, False),
        ("after_requeue", Settlement.REQUEUE, True),
        ("before_dead_letter", Settlement.DEAD_LETTER, False),
        ("after_dead_letter", Settlement.DEAD_LETTER, True),
    ],
)
def test_a_crash_can_be_made_on_either_side_of_each_step(
    point: str, settlement: Settlement, settled: bool, room: AppRoom, channel: Channel
) -> None:
    failpoints.arm(point, "raise")
    with pytest.raises(FailpointError, match=point):
        settler(room, channel).settle(held(channel), Outcome(settlement))
    assert bool(channel.log) is settled
