"""Celery's event stream: what an event is, and reading the stream.

Workers send it (:mod:`flask_taskworker.worker.events`), publishers add ``task-sent``.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import kombu

from . import clock
from .broker import broker_connection, capabilities_of, wait_for_messages
from .exceptions import BrokerError

if TYPE_CHECKING:
    from .app import TaskApp

#: Where events go; monitors bind queues to it. In Redis, where keys of a fanout exchange are
#: patterns, it is one: Celery publishes to subscribers there, and keeps nothing.
_EXCHANGES = {kind: kombu.Exchange("celeryev", type=kind) for kind in ("topic", "fanout")}
#: The routing key of a list of task events.
MULTI = "task.multi"
#: How long unread events, and the queue of a monitor that is gone, are kept. Seconds.
_TTL, _EXPIRES = 5.0, 60.0

Event = dict[str, Any]

_encode = json.JSONEncoder().encode
_JSON = {"content_type": "application/json", "content_encoding": "utf-8"}


def event(
    type: str, hostname: str, count: int, fields: Mapping[str, Any], at: float | None = None
) -> Event:
    """An event.

    :param hostname: the node name of the sender.
    :param count: the sender's logical clock.
    :param at: when it happened, in epoch seconds; None is now.
    """
    return {
        "hostname": hostname,
        "utcoffset": utcoffset(),
        "pid": os.getpid(),
        "clock": count,
        **fields,
        "timestamp": clock.wall() if at is None else at,
        "type": type,
    }


def utcoffset() -> float:
    """Hours from local time to UTC, positive in the west."""
    return (time.altzone if time.localtime().tm_isdst > 0 else time.timezone) / 3600


def routing_key(type: str) -> str:
    """``task.sent`` for ``task-sent``."""
    return type.replace("-", ".")


def exchange_of(channel: Any) -> kombu.Exchange:
    """The exchange of events, as the transport of a channel has it."""
    is_redis = getattr(channel.connection, "driver_type", "") == "redis"
    return _EXCHANGES["fanout" if is_redis else "topic"]


def written(hostname: str, count: int, noted: Iterable[str]) -> str:
    """A list of events as JSON; there may be thousands in a second.

    :param count: the logical clock of the first; each of the others has the next.
    :param noted: what each has of its own, and the closing brace, as JSON.
    """
    common = {"hostname": hostname, "utcoffset": utcoffset(), "pid": os.getpid()}
    head = f'{_encode(common)[:-1]}, "clock": '
    return f"[{','.join([f'{head}{n}, {text}' for n, text in enumerate(noted, count)])}]"


def publish(channel: Any, body: Event | str, key: str, hostname: str) -> None:
    """Send an event, or a list of them in JSON, to whoever listens."""
    exchange = exchange_of(channel)
    kombu.Producer(channel, auto_declare=False, serializer="json").publish(
        body,
        exchange=exchange,
        routing_key=key,
        declare=[exchange],  # kombu does so once a connection
        delivery_mode=1,
        headers={"hostname": hostname},
        retry=False,
        **(_JSON if isinstance(body, str) else {}),
    )


def receive(
    app: TaskApp,
    *,
    key: str = "#",
    timeout: float | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> Iterator[Event]:
    """The events of all workers and publishers, as they come in.

    :param key: which; ``worker.#`` is those about workers.
    :param timeout: ends after so many seconds without an event; None: never.
    :param on_ready: called when nothing can be missed any more.
    :raises BrokerError: if the broker cannot broadcast.
    """
    with broker_connection(app.config, role="control") as connection:
        capabilities = capabilities_of(connection)
        if not capabilities.fanout:
            raise no_broadcast(app)
        inbox: list[Event] = []
        consumer = kombu.Consumer(
            connection.default_channel,
            [_monitor_queue(exchange_of(connection.default_channel), key)],
            no_ack=True,
            accept=["json"],
            callbacks=[lambda body, message: inbox.extend(_readable(body))],
        )
        with consumer:
            on_ready()
            yield from _drain(connection, capabilities, inbox, timeout, app)


def _drain(
    connection: kombu.Connection,
    capabilities: Any,
    inbox: list[Event],
    timeout: float | None,
    app: TaskApp,
) -> Iterator[Event]:
    heard = clock.monotonic()
    while timeout is None or clock.monotonic() - heard < timeout:
        try:
            connection.drain_events(timeout=0)
        except (TimeoutError, BlockingIOError):
            left = 5.0 if timeout is None else heard + timeout - clock.monotonic()
            wait_for_messages(connection, capabilities, max(0.0, min(left, 5.0)), None, poll=0.1)
            if connection.supports_heartbeats:
                connection.heartbeat_check()
        if inbox:
            heard = clock.monotonic()
            batch, inbox[:] = list(inbox), []
            for item in batch:
                if item["type"] != "task-sent":
                    app.clock.adjust(item["clock"])
                yield item


def _readable(body: Any) -> Iterator[Event]:
    """What is an event in a message; others are nobody's business."""
    for item in body if isinstance(body, list) else [body]:
        if isinstance(item, dict) and isinstance(item.get("type"), str):
            count = item.get("clock")
            yield {**item, "clock": count if isinstance(count, int) else 0}


def _monitor_queue(exchange: kombu.Exchange, key: str) -> kombu.Queue:
    return kombu.Queue(
        f"celeryev.{uuid.uuid4()}",
        exchange,
        routing_key=key,
        durable=False,
        exclusive=True,
        auto_delete=True,
        message_ttl=_TTL,
        expires=_EXPIRES,
    )


def no_broadcast(app: TaskApp) -> BrokerError:
    """The error for a broker without fanout exchanges."""
    return BrokerError(
        f"the broker {app.config.engine} cannot broadcast: there are neither remote control nor "
        "events. Use a SQL database, Redis or RabbitMQ."
    )
