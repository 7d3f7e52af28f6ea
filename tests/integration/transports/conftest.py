"""The same broker on every database there is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest
from sqlalchemy.engine import make_url

import flask_taskworker.transports  # noqa: F401 - registers the transport
from flask_taskworker.transports.sql.engine import Database, database_for

DATABASES = [
    "sqlite",
    pytest.param("psycopg", marks=pytest.mark.services),
    pytest.param("psycopg2", marks=pytest.mark.services),
    pytest.param("pymysql", marks=pytest.mark.services),
]


class Broker:
    """A database with tables of its own, and connections closed with the test."""

    def __init__(self, url: str, prefix: str) -> None:
        self.url = f"taskworker+{url}"
        self.options = {"table_prefix": prefix, "durability": "normal"}
        self._connections: list[kombu.Connection] = []
        self._processes: list[subprocess.Popen[str]] = []

    @property
    def database(self) -> Database:
        return database_for(self.url, self.options)

    def connection(self, **options: Any) -> kombu.Connection:
        options = {**self.options, **options}
        connection = kombu.Connection(self.url, transport_options=options)
        self._connections.append(connection)
        return connection

    def publish(self, *bodies: Any, queue: str = "q", **options: Any) -> None:
        producer = kombu.Producer(self.connection().channel())
        for body in bodies:
            producer.publish(body, exchange="", routing_key=queue, **options)

    def receiver(self, *queues: str, prefetch: int = 0, **options: Any) -> Receiver:
        return Receiver(self.connection(**options), queues or ("q",), prefetch)

    def execute(self, sql: str, *params: Any) -> list[Any]:
        """Run one statement with ``?`` and ``{message}``; return its rows."""
        held = self.database.connect()
        try:
            cursor = held.execute(self.database.dialect.sql(sql), params)
            return list(cursor.fetchall()) if cursor.description else []
        finally:
            held.close()

    def count(self) -> int:
        return int(self.execute("SELECT count(*) FROM {message}")[0][0])

    def spawn(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        """A process that runs ``code``, with ``connection`` and ``arguments`` at hand."""
        setup = (
            "import kombu, sys, socket, time, os\n"
            "import flask_taskworker.transports\n"
            f"connection = kombu.Connection({self.url!r}, transport_options={self.options!r})\n"
            "arguments = sys.argv[1:]\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", setup + code, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
        for connection in self._connections:
            connection.release()
        database = self.database
        held = database.connect()
        for table in reversed(database.dialect.names):
            held.execute(f"DROP TABLE IF EXISTS {table}")
        held.close()
        database.dispose()


class Receiver:
    """A consumer that keeps what it gets."""

    def __init__(
        self, connection: kombu.Connection, queues: tuple[str, ...], prefetch: int
    ) -> None:
        self.connection = connection
        self.channel = connection.channel()
        self.messages: list[Any] = []
        kombu.Consumer(
            self.channel,
            [kombu.Queue(name) for name in queues],
            on_message=self.messages.append,
            auto_declare=False,
            prefetch_count=prefetch,
        ).consume()

    def drain(self) -> list[Any]:
        before = len(self.messages)
        while True:
            try:
                self.connection.drain_events(timeout=0)
            except TimeoutError:
                return [message.decode() for message in self.messages[before:]]

    def wait_for(self, count: int, timeout: float = 20) -> list[Any]:
        while len(self.messages) < count:
            self.connection.drain_events(timeout=timeout)
        return [message.decode() for message in self.messages]

    def ack(self) -> None:
        for message in self.messages:
            if not message.acknowledged:
                message.ack()
        self.channel.flush()


@pytest.fixture(params=DATABASES)
def broker(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[Broker]:
    """An empty broker; the test runs once on each database."""
    driver = request.param
    if driver == "sqlite":
        url = f"sqlite:///{tmp_path}/queue.db"
    elif driver == "pymysql":
        url = request.getfixturevalue("mysql_url")
    else:
        given = make_url(request.getfixturevalue("postgresql_url"))
        pytest.importorskip(driver)
        url = given.set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
    broker = Broker(url, f"{unique}_")
    yield broker
    broker.close()
