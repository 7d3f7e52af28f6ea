"""A SQLite queue of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest

import flask_taskworker.transports  # noqa: F401 - registers the transport
from flask_taskworker.transports.sql.engine import Database, database_for


class Broker:
    """Connections to one queue file, closed at the end of the test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"taskworker+sqlite:///{path}"
        self._connections: list[kombu.Connection] = []

    def connection(self, **options: Any) -> kombu.Connection:
        options = {"durability": "normal", **options}
        connection = kombu.Connection(self.url, transport_options=options)
        self._connections.append(connection)
        return connection

    def channel(self, **options: Any) -> Any:
        return self.connection(**options).channel()

    @property
    def database(self) -> Database:
        return database_for(self.url)

    def publish(self, *bodies: Any, queue: str = "q", **options: Any) -> None:
        producer = kombu.Producer(self.channel())
        for body in bodies:
            producer.publish(body, exchange="", routing_key=queue, **options)

    def rows(self, columns: str = "count(*)") -> list[tuple[Any, ...]]:
        held = self.database.connect()
        try:
            return held.execute(f"SELECT {columns} FROM taskworker_message ORDER BY id").fetchall()
        finally:
            held.close()

    def count(self) -> int:
        return int(self.rows()[0][0])

    def close(self) -> None:
        for connection in self._connections:
            connection.release()
        self.database.dispose()


class Receiver:
    """A consumer that keeps what it gets."""

    def __init__(self, connection: kombu.Connection, *queues: str, **options: Any) -> None:
        self.connection = connection
        self.messages: list[Any] = []
        self.channel = connection.channel()
        prefetch = options.pop("prefetch", 0)
        self.consumer = kombu.Consumer(
            self.channel,
            [kombu.Queue(name, auto_declare=False) for name in queues or ("q",)],
            on_message=self.messages.append,
            auto_declare=False,
            prefetch_count=prefetch,
            **options,
        )
        self.consumer.consume()

    def drain(self) -> list[Any]:
        """Receive all there is now; return the bodies of the new ones."""
        before = len(self.messages)
        while True:
            try:
                self.connection.drain_events(timeout=0)
            except TimeoutError:
                return self.bodies(before)

    def bodies(self, start: int = 0) -> list[Any]:
        return [message.decode() for message in self.messages[start:]]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path / "queue.db")
    yield broker
    broker.close()


@pytest.fixture
def receiver(broker: Broker) -> Any:
    """Make a consumer: ``receiver("q", prefetch=2, transport_options={...})``."""

    def make(*queues: str, transport_options: Any = None, **options: Any) -> Receiver:
        return Receiver(broker.connection(**(transport_options or {})), *queues, **options)

    return make
