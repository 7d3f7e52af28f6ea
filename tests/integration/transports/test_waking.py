"""Whoever sleeps is woken by the process that publishes, on every database; and if not, looks."""

from __future__ import annotations

import errno
import os
import random
import socket
import time
from typing import Any

import kombu
import pytest

from flask_taskworker.transports.sql import doorbell
from flask_taskworker.transports.sql.doorbell import Doorbell

pytestmark = pytest.mark.parametrize(
    "broker",
    [
        "sqlite",
        pytest.param("psycopg", marks=pytest.mark.services),
        pytest.param("pymysql", marks=pytest.mark.services),
    ],
    indirect=True,
)

#: A consumer that looks only when it is woken: nothing that is due now and then ends its sleep.
SLEEP = """
from flask_taskworker.transports.sql import janitor
from flask_taskworker.transports.sql.dialects import mysql, postgresql
janitor._REAP = janitor._EXPIRE = janitor._MAINTAIN = 3600.0
mysql.MySQLDialect.remote_poll = postgresql.PostgreSQLDialect.remote_poll = None
got = 0
def take(message):
    global got
    got += 1
    message.ack()
    print(message.payload, flush=True)
with kombu.Consumer(connection, [kombu.Queue("q")], on_message=take, auto_declare=False):
    print("sleeping", flush=True)
    while got < int(arguments[0]):
        connection.drain_events(timeout=60)
"""
#: ``TASKWORKER_RACES=10000`` for a longer look.
_RACES = int(os.environ.get("TASKWORKER_RACES", "2000"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_wake_up_is_lost_between_processes(broker: Any) -> None:
    """A publish at a random moment of the consumer's way to sleep, again and again."""
    broker.options |= {"fallback_interval": 3600.0}
    sleeper = broker.spawn(SLEEP, str(_RACES))
    assert sleeper.stdout.readline() == "sleeping\n"
    producer = kombu.Producer(broker.connection().channel())
    chance = random.Random(3)
    slowest = 0.0
    for race in range(_RACES):
        until = time.perf_counter() + chance.random() * 0.0015
        while time.perf_counter() < until:
            pass
        started = time.monotonic()
        producer.publish(race, exchange="", routing_key="q")
        assert sleeper.stdout.readline() == f"{race}\n"
        slowest = max(slowest, time.monotonic() - started)
    print(f"\nslowest of {_RACES} wake-ups: {slowest * 1000:.0f} ms")
    assert slowest < 30  # the shortest sleep that would end by itself is a minute


@pytest.mark.parametrize("trouble", ["file", "socket", "places"])
def test_where_nobody_can_be_woken_the_consumer_looks_by_itself(
    broker: Any, trouble: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broker.options |= {"notify": False, "fallback_interval": 60.0}
    if trouble == "file":
        refused = OSError(errno.EACCES, "not for you")
        monkeypatch.setattr(doorbell, "_open", lambda path: _raise(refused))
    elif trouble == "socket":
        monkeypatch.setattr(socket.socket, "bind", lambda *args: _raise(OSError("no loopback")))
    else:
        monkeypatch.setattr(doorbell, "_free_slot", lambda shared: _raise(OSError("all taken")))
    one = broker.receiver()
    one.connection.transport.wait(one.connection, 0.05)
    monkeypatch.undo()
    assert "no doorbell" in caplog.text
    publisher = broker.spawn(
        "kombu.Producer(connection.channel()).publish('hear', exchange='', routing_key='q')\n"
        "connection.release()"
    )
    assert one.wait_for(1, timeout=30) == ["hear"]
    assert publisher.wait(30) == 0
    assert isinstance(broker.database.doorbell, Doorbell)


def _raise(error: Exception) -> Any:
    raise error
