"""What our RabbitMQ transport does beyond kombu's contract."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import kombu
import pytest
from amqp.exceptions import ChannelError

from support.sockets import Proxy

pytestmark = pytest.mark.services

OURS = "flask_taskworker.transports.amqp:Transport"
PATIENCE = 20.0


class Place:
    def __init__(self, url: str, unique: str) -> None:
        self.url = url
        self.queue = unique
        self.options: dict[str, Any] = {"confirm_publish": True, "read_timeout": 4}
        self._connections: list[kombu.Connection] = []
        self._queues: set[str] = set()

    def connection(self, url: str = "", **options: Any) -> kombu.Connection:
        connection = kombu.Connection(
            url or self.url, transport=OURS, transport_options=self.options | options
        )
        self._connections.append(connection)
        return connection

    def declare(self, channel: Any, name: str = "") -> str:
        name = name or self.queue
        kombu.Queue(name, durable=True)(channel).queue_declare()
        self._queues.add(name)
        return name

    def consume(self, channel: Any, *names: str) -> list[Any]:
        got: list[Any] = []
        queues = [kombu.Queue(name) for name in names or (self.queue,)]
        kombu.Consumer(channel, queues, on_message=got.append, auto_declare=False).consume()
        return got

    def close(self) -> None:
        for connection in self._connections:
            connection.release()
        with kombu.Connection(self.url) as connection:
            for name in self._queues:
                connection.default_channel.queue_delete(name)


@pytest.fixture
def place(amqp_url: str, unique: str) -> Iterator[Place]:
    place = Place(amqp_url, unique)
    yield place
    place.close()


def drain(channel: Any, got: list[Any], count: int, patience: float = PATIENCE) -> list[Any]:
    deadline = time.monotonic() + patience
    while len(got) < count and time.monotonic() < deadline:
        with contextlib.suppress(socket.timeout):
            channel.connection.client.drain_events(timeout=0.5)
    return [message.payload for message in got]


def send(channel: Any, queue: str, body: Any, **properties: Any) -> None:
    kombu.Producer(channel).publish(body, exchange="", routing_key=queue, **properties)


def send_later(channel: Any, queue: str, body: Any, seconds: float) -> None:
    message = channel.prepare_message(
        f'"{body}"'.encode(), content_type="application/json", content_encoding="utf-8",
        properties={"delivery_mode": 2, "eta_at": time.time() + seconds},
    )  # fmt: skip
    channel.basic_publish(message, exchange="", routing_key=queue)


def test_a_delayed_message_waits_in_the_server(place: Place) -> None:
    sender = place.connection().channel()
    place.declare(sender)
    began = time.monotonic()
    send_later(sender, place.queue, "later", 3.4)
    send_later(sender, place.queue, "soon", 0.5)
    channel = place.connection().channel()
    got = place.consume(channel)
    assert drain(channel, got, 1) == ["soon"]
    assert drain(channel, got, 2) == ["soon", "later"]
    assert time.monotonic() - began >= 2.9, "a fraction of a second is left to the worker"
    assert "x-death" not in got[1].headers


def test_a_queue_gets_no_message_of_one_whose_name_ends_alike(place: Place) -> None:
    sender = place.connection().channel()
    long = place.declare(sender, f"jobs.{place.queue}")
    short = place.declare(sender)
    send_later(sender, short, "short", 1.2)
    send_later(sender, long, "long", 1.2)
    channel = place.connection().channel()
    got = place.consume(channel, long, short)
    assert sorted(drain(channel, got, 2)) == ["long", "short"]
    assert drain(channel, got, 3, patience=1.0) == [message.payload for message in got[:2]]


def test_a_message_may_wait_again_after_it_has_waited(place: Place) -> None:
    sender = place.connection().channel()
    place.declare(sender)
    send_later(sender, place.queue, "once", 1.1)
    channel = place.connection().channel()
    got = place.consume(channel)
    drain(channel, got, 1)
    again = channel.prepare_message(
        got[0].body, content_type="application/json", content_encoding="utf-8",
        headers=dict(got[0].headers), properties={"eta_at": time.time() + 1.1},
    )  # fmt: skip
    sender.basic_publish(again, exchange="", routing_key=place.queue)
    assert drain(channel, got, 2) == ["once", "once"]


def test_a_message_for_no_queue_is_an_error(place: Place) -> None:
    channel = place.connection().channel()
    with pytest.raises(ChannelError, match="NO_ROUTE"):
        send(channel, f"{place.queue}-nowhere", 1, mandatory=True)


def test_queues_may_have_priorities(place: Place) -> None:
    place.options["queue_arguments"] = {"x-max-priority": 10}
    channel = place.connection().channel()
    place.declare(channel)
    for priority in (0, 5, 9, 1):
        send(channel, place.queue, priority, priority=priority)
    got = place.consume(channel)
    assert drain(channel, got, 4) == [9, 5, 1, 0]


def test_quorum_queues_count_deliveries(place: Place) -> None:
    place.options["queue_arguments"] = {"x-queue-type": "quorum"}
    channel = place.connection().channel()
    place.declare(channel)
    send(channel, place.queue, 1)
    channel.basic_qos(0, 5, True)
    got = place.consume(channel)
    drain(channel, got, 1)
    channel.basic_qos(0, 9, True)
    got[0].reject(requeue=True)
    drain(channel, got, 2)
    assert got[1].headers["x-delivery-count"] == 1
    got[1].ack()


def test_acknowledgements_are_sent_before_anything_else(place: Place) -> None:
    channel = place.connection().channel()
    place.declare(channel)
    for number in range(3):
        send(channel, place.queue, number)
    got = place.consume(channel)
    drain(channel, got, 3)
    for message in got:
        message.ack()
    channel.flush()
    channel.close()
    other = place.connection().channel()
    assert other.queue_declare(place.queue, passive=True).message_count == 0


def test_closing_a_dead_connection_takes_no_time(place: Place) -> None:
    parts = urlsplit(place.url)
    with Proxy(parts.hostname or "127.0.0.1", parts.port or 5672) as proxy:
        url = place.url.replace(f":{parts.port}/", f":{proxy.port}/", 1)
        connection = place.connection(url)
        place.declare(connection.default_channel)
        proxy.hole()
        began = time.monotonic()
        connection.release()
        assert time.monotonic() - began < 3
