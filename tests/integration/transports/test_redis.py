"""What our Redis transport does beyond kombu's contract."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest
import redis
from redis.exceptions import ConnectionError

from flask_taskworker.broker import broker_connection
from flask_taskworker.transports.redis import claims as claims_module
from flask_taskworker.transports.redis.bell import Bell
from flask_taskworker.transports.redis.scripts import CLAIM
from flask_taskworker.transports.redis.wire import Wire
from support.room import Room
from support.servers import OwnRedis, running
from support.waiting import wait_until

pytestmark = pytest.mark.services

OURS = "flask_taskworker.transports.redis:Transport"
PATIENCE = 20.0


class Place:
    """Connections to one server, with keys that no other test uses."""

    def __init__(self, url: str, unique: str) -> None:
        self.url = url
        self.queue = unique
        self.client = redis.Redis.from_url(url)
        self.options: dict[str, Any] = {"lease": 2.0, "global_keyprefix": f"{unique}:"}
        self._connections: list[kombu.Connection] = []

    def connection(self, ours: bool = True, **options: Any) -> kombu.Connection:
        connection = kombu.Connection(
            self.url, transport=OURS if ours else None, transport_options=self.options | options
        )
        self._connections.append(connection)
        return connection

    def publish(self, *bodies: Any, ours: bool = False, **properties: Any) -> None:
        channel = self.connection(ours).channel()
        for body in bodies:
            kombu.Producer(channel).publish(body, exchange="", routing_key=self.queue, **properties)

    def consume(self, prefetch: int = 0, **options: Any) -> tuple[Any, list[Any]]:
        channel = self.connection(**options).channel()
        got: list[Any] = []
        consumer = kombu.Consumer(
            channel, [kombu.Queue(self.queue)], on_message=got.append, auto_declare=False,
            prefetch_count=prefetch or None,
        )  # fmt: skip
        consumer.consume()
        return channel, got

    def key(self, name: str) -> str:
        return f"{self.queue}:{name}"

    def close(self) -> None:
        for connection in self._connections:
            connection.release()
        for key in self.client.scan_iter(f"{self.queue}*"):
            self.client.delete(key)
        self.client.close()


@pytest.fixture
def place(redis_url: str, unique: str) -> Iterator[Place]:
    place = Place(redis_url, unique)
    yield place
    place.close()


def drain(channel: Any, got: list[Any], count: int) -> list[Any]:
    deadline = time.monotonic() + PATIENCE
    while len(got) < count:
        assert time.monotonic() < deadline, [message.payload for message in got]
        with contextlib.suppress(socket.timeout):
            channel.connection.client.drain_events(timeout=0.5)
    return [message.payload for message in got]


def vanish(channel: Any) -> None:
    """End a consumer as a kill would: no renewal, no goodbye."""
    channel._keeper.stop()
    channel.known_claims._wire.close()
    channel.known_claims._bell.close()
    channel.known_claims.claimed.clear()


def test_a_claim_is_a_record_that_kombu_can_put_back(place: Place) -> None:
    place.publish({"n": 1})
    channel, got = place.consume()
    drain(channel, got, 1)
    ((field, record),) = place.client.hgetall(place.key("unacked")).items()
    message, exchange, routing_key = json.loads(record)
    assert (exchange, routing_key) == ("", place.queue)
    assert message["headers"] == {}
    ((member, score),) = place.client.zrange(place.key("unacked_index"), 0, -1, withscores=True)
    assert member == field
    assert score > time.time(), "no visibility timeout of Celery's is over"
    vanish(channel)
    place.client.zadd(place.key("unacked_index"), {member: time.time() - 7200})
    theirs = place.connection(ours=False).channel()
    theirs.qos.restore_visible(num=10, interval=1)
    assert place.client.llen(place.key(place.queue)) == 1


def test_what_a_dead_consumer_held_comes_back_to_the_head_in_order(place: Place) -> None:
    place.publish(*range(5))
    dead, got = place.consume(prefetch=3)
    drain(dead, got, 3)
    vanish(dead)
    channel, again = place.consume()
    assert drain(channel, again, 2) == [3, 4], "the others have an owner, as far as is known"
    place.publish(5)
    wait_until(lambda: place.client.llen(place.key(place.queue)) >= 3, "they are back", PATIENCE)
    assert drain(channel, again, 6) == [3, 4, 0, 1, 2, 5]
    counts = [message.properties["delivery_count"] for message in again]
    assert counts == [1, 1, 2, 2, 2, 1]
    assert [bool(m.delivery_info.get("redelivered")) for m in again[2:5]] == [True] * 3


def test_who_settles_too_late_settles_nothing(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.publish(1)
    zombie, got = place.consume()
    drain(zombie, got, 1)
    zombie._keeper.stop()  # as if the process had been suspended
    channel, again = place.consume()
    drain(channel, again, 1)
    got[0].ack()
    zombie.flush()
    with caplog.at_level(logging.WARNING), contextlib.suppress(socket.timeout):
        zombie.connection.client.drain_events(timeout=0.1)
    assert "settled too late" in caplog.text
    assert place.client.hlen(place.key("unacked")) == 1, "the new owner's claim is untouched"


def test_a_lease_is_kept_while_the_consumer_is_busy(place: Place) -> None:
    place.publish(1)
    busy, got = place.consume()
    drain(busy, got, 1)
    channel, again = place.consume()
    with contextlib.suppress(socket.timeout):
        channel.connection.client.drain_events(timeout=6)
    assert again == []
    got[0].ack()
    busy.flush()
    assert place.client.hlen(place.key("unacked")) == 0


def test_a_claim_whose_answer_got_lost_is_found_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.publish(*range(5))
    channel, got = place.consume()
    run, lost = Wire.run, []

    def lose_the_first(wire: Wire, script: Any, *arguments: Any) -> Any:
        answer = run(wire, script, *arguments)
        if script is CLAIM and len(answer) > 2 and not lost:
            lost.append(answer)
            wire.close()
            raise ConnectionError("the answer got lost")
        return answer

    monkeypatch.setattr(claims_module.Wire, "run", lose_the_first)
    with pytest.raises(ConnectionError):
        channel.connection.client.drain_events(timeout=5)
    assert place.client.hlen(place.key("unacked")) == 5
    assert drain(channel, got, 5) == list(range(5))
    for message in got:
        message.ack()
    channel.flush()
    assert place.client.hlen(place.key("unacked")) == 0


def test_acknowledgements_survive_a_lost_connection(place: Place) -> None:
    place.publish(*range(3))
    channel, got = place.consume()
    drain(channel, got, 3)
    for message in got:
        message.ack()
    channel.known_claims._wire.close()
    channel.flush()
    assert place.client.hlen(place.key("unacked")) == 0


def test_a_sleeper_is_woken_by_a_plain_push(place: Place) -> None:
    channel, got = place.consume()
    connection = channel.connection.client
    with contextlib.suppress(socket.timeout):
        connection.drain_events(timeout=0)
    sender = place.connection(ours=False).channel()
    latencies = []
    for number in range(5):
        sent: list[float] = []

        def publish(number: int = number, sent: list[float] = sent) -> None:
            sent.append(time.monotonic())
            kombu.Producer(sender).publish(number, exchange="", routing_key=place.queue)

        timer = threading.Timer(0.1, publish)
        timer.start()
        drain(channel, got, number + 1)
        latencies.append(time.monotonic() - sent[0])
        timer.join()
    assert sorted(latencies)[2] < 0.5, "the fallback would take seconds"


def test_without_wake_ups_lists_are_looked_at(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bell, "attach", lambda self, wire: None)
    channel, got = place.consume()
    timer = threading.Timer(0.3, place.publish, [1])
    timer.start()
    assert drain(channel, got, 1) == [1]
    timer.join()


def test_too_many_deliveries_end_in_the_dead_queue(place: Place) -> None:
    place.publish(1)
    channel, got = place.consume(max_deliveries=2)
    drain(channel, got, 1)
    got[0].reject(requeue=True)
    drain(channel, got, 2)
    got[1].reject(requeue=True)
    with contextlib.suppress(socket.timeout):
        channel.connection.client.drain_events(timeout=0.2)
    channel.flush()
    assert len(got) == 2
    (letter,) = place.client.lrange(place.key(f"{place.queue}.dead"), 0, -1)
    assert "delivered 2 times" in json.loads(letter)["headers"]["x-dead-letter-reason"]


@pytest.mark.parametrize("text", [b"{", b"5", b"{}", b'{"properties": {}, "body": "!"}', b"\xff"])
def test_what_is_no_message_is_set_aside(place: Place, text: bytes) -> None:
    place.client.lpush(place.key(place.queue), text)
    place.publish(1)
    channel, got = place.consume()
    assert drain(channel, got, 1)[-1:] == [1]
    for message in got:
        message.ack()
    channel.flush()
    if len(got) == 1:  # else kombu could make a message of it, and the worker will say more
        assert place.client.llen(place.key(f"{place.queue}.dead")) == 1
    assert place.client.hlen(place.key("unacked")) == 0


def test_queues_share_a_claim_unless_one_is_to_come_first(place: Place) -> None:
    other = f"{place.queue}-b"
    sender = place.connection(ours=False).channel()
    for queue in (place.queue, other):
        for number in range(10):
            kombu.Producer(sender).publish(f"{queue[-1]}{number}", exchange="", routing_key=queue)

    def first_six(**options: Any) -> set[str]:
        channel = place.connection(**options).channel()
        got: list[Any] = []
        kombu.Consumer(
            channel, [kombu.Queue(place.queue), kombu.Queue(other)], on_message=got.append,
            auto_declare=False, prefetch_count=6,
        ).consume()  # fmt: skip
        drain(channel, got, 6)
        names = {message.payload[0] for message in got}
        channel.close()
        return names

    assert len(first_six()) == 2
    assert first_six(queue_order_strategy="priority") == {place.queue[-1]}


@pytest.mark.parametrize("steps", [[0, 3, 6, 9], list(range(10))])
def test_priorities_are_kombus(place: Place, steps: list[int]) -> None:
    place.options["priority_steps"] = steps
    for priority in (9, 0, 6, 3):
        place.publish(priority, priority=priority)
    channel, got = place.consume()
    assert drain(channel, got, 4) == [0, 3, 6, 9]


def test_a_socket_file_is_an_address_too(tmp_path: Path, unique: str) -> None:
    with running(lambda: OwnRedis("--unixsocket", "redis.sock", "--unixsocketperm", "777")) as own:
        url = f"redis+socket://{own.folder}/redis.sock"
        settings = {"TASKER_BROKER_URL": url, "TASKER_RESULT_BACKEND": "disabled"}
        room = Room(settings, tmp_path, unique)
        connection = broker_connection(room.config, role="consume")
        assert connection.transport.capabilities.leased, "it is our own transport"
        room.add.delay(1)
        room.burst()
        assert room.starts("add") == [1]
        room.close()
