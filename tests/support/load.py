"""Publishers and consumers as programs of their own, for tests that kill them or their database.

``python -m support.load publish|consume|renew URL OPTIONS LEDGER NAME PAUSE`` runs until it is
ended. What it did stands in the ledger:

``tried ID``, then ``sent ID`` once the publish has returned, or ``failed ID ERROR``;
``got ID`` before the acknowledgement; ``trouble NAME ERROR`` when receiving failed.

A consumer named ``consume`` stays with its channel whatever happens to the database, one named
``renew`` closes its connection and opens another, as Celery does.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kombu

import flask_taskworker.transports  # noqa: F401 - registers the transport
from flask_taskworker.transports.sql.engine import database_for
from support.ledger import Ledger
from support.processes import PATIENCE, Program, Programs, eventually

QUEUE = "load"
#: How many messages a consumer has in its hands at most.
PREFETCH = 16


def publish(
    connect: Callable[[], kombu.Connection], ledger: Ledger, name: str, pause: float
) -> None:
    """Publish for ever; an error of the database is written down and the next id is tried."""
    connection = connect()
    producer = None
    number = 0
    while True:
        number += 1
        id = f"{name}-{number}"
        ledger.write("tried", id)
        try:
            if producer is None:
                producer = kombu.Producer(connection.channel())
            producer.publish(id, exchange="", routing_key=QUEUE)
        except connection.connection_errors as error:
            ledger.write("failed", f"{id} {type(error).__name__}: {error}".replace("\n", " "))
        else:
            ledger.write("sent", id)
        time.sleep(pause)  # the load, not a wait for something


def consume(
    connect: Callable[[], kombu.Connection], ledger: Ledger, name: str, pause: float, renew: bool
) -> None:
    """Receive, write down and acknowledge, for ever."""

    def work(message: Any) -> None:
        ledger.write("got", message.payload)
        if pause:
            time.sleep(pause)
        message.ack()

    connection = connect()
    consumer: kombu.Consumer | None = None
    while True:
        try:
            if consumer is None:
                consumer = kombu.Consumer(
                    connection.channel(),
                    [kombu.Queue(QUEUE)],
                    on_message=work,
                    prefetch_count=PREFETCH,
                    auto_declare=False,
                )
                consumer.consume()
                ledger.write("ready", name)
            connection.drain_events(timeout=60)
        except TimeoutError:
            pass
        except connection.connection_errors as error:
            ledger.write("trouble", f"{name} {type(error).__name__}: {error}".replace("\n", " "))
            time.sleep(0.05)
            if renew:
                with contextlib.suppress(*connection.connection_errors):
                    connection.release()
                connection, consumer = connect(), None


def main(role: str, url: str, options: str, ledger: str, name: str, pause: str) -> None:
    def connect() -> kombu.Connection:
        return kombu.Connection(url, transport_options=json.loads(options))

    if role == "publish":
        publish(connect, Ledger(ledger), name, float(pause))
    else:
        consume(connect, Ledger(ledger), name, float(pause), renew=role == "renew")


class Load:
    """The programs on one database, and an account of every message.

    :param url: of SQLAlchemy.
    :param options: transport options; give a table prefix of your own on shared servers.
    """

    def __init__(self, url: str, folder: Path, **options: Any) -> None:
        self.url = f"taskworker+{url}"
        self.options = options
        self.ledger = Ledger(folder / "ledger")
        self._programs = Programs(folder)
        self._started = 0

    def publisher(self, pause: float = 0.002) -> Program:
        return self._start("publish", pause)

    def consumer(self, pause: float = 0.0, renew: bool = False) -> Program:
        return self._start("renew" if renew else "consume", pause)

    def _start(self, role: str, pause: float) -> Program:
        self._started += 1
        return self._programs.python(
            "-m", "support.load", role, self.url, json.dumps(self.options), self.ledger.path,
            f"{role}{self._started}", str(pause),
            PYTHONPATH=str(Path(__file__).resolve().parent.parent),
        )  # fmt: skip

    def count(self, step: str) -> int:
        return sum(self.ledger.count(step).values())

    def wait_for_progress(self, *steps: str, what: str, timeout: float = PATIENCE) -> float:
        """Wait until each step is taken anew; the seconds that took."""
        started = time.monotonic()
        before = {step: self.count(step) for step in steps}
        eventually(
            lambda: all(self.count(step) > before[step] for step in steps),
            f"{' and '.join(steps)} again {what}",
            timeout,
        )
        return time.monotonic() - started

    def left(self) -> int:
        """How many messages the tables hold."""
        database = database_for(self.url, self.options)
        held = database.connect()
        try:
            return int(
                held.execute(database.dialect.sql("SELECT count(*) FROM {message}")).fetchone()[0]
            )
        finally:
            held.close()

    def drain(self, timeout: float = 60.0) -> None:
        """Wait until consumers that nobody disturbs have emptied the queue."""
        eventually(lambda: self.left() == 0, "the queue is empty", timeout)

    @property
    def lost(self) -> set[str]:
        """Ids whose publish returned and that nobody got."""
        return set(self.ledger.count("sent")) - set(self.ledger.count("got"))

    @property
    def unknown(self) -> set[str]:
        """Ids that somebody got and nobody published."""
        return set(self.ledger.count("got")) - set(self.ledger.count("tried"))

    @property
    def uncertain(self) -> set[str]:
        """Ids somebody got although their publish did not return."""
        return set(self.ledger.count("got")) - set(self.ledger.count("sent"))

    @property
    def duplicates(self) -> int:
        return sum(count - 1 for count in self.ledger.count("got").values())

    def figures(self, **more: object) -> str:
        """One line for people."""
        counts: dict[str, object] = {step: self.count(step) for step in ("sent", "failed", "got")}
        counts |= {"lost": len(self.lost), "duplicated": self.duplicates}
        return " ".join(f"{key}={value}" for key, value in (counts | more).items())

    def close(self) -> None:
        """End the programs, drop the tables."""
        self._programs.close()
        database = database_for(self.url, self.options)
        with contextlib.suppress(OSError):  # a server that is gone took them along
            held = database.connect()
            for table in reversed(database.dialect.names):
                held.execute(f"DROP TABLE IF EXISTS {table}")
            held.close()
        database.dispose()


@contextlib.contextmanager
def load_on(url: str, folder: Path, **options: Any) -> Iterator[Load]:
    """A load that ends with the block."""
    load = Load(url, folder, **options)
    try:
        yield load
    finally:
        load.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
