"""``python -m benchmarks.sql_transport``: our SQL transport, kombu's stock one, a bare driver.

On each database that answers: sending one by one and in batches, fetching with acknowledging,
four consumers at once, the delay of an idle consumer, its CPU time, and what a long backlog
costs. Then each goal, met or missed. All use the same driver and flush each send to the disk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from typing import Any, NamedTuple

import kombu
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

import flask_taskworker.transports  # noqa: F401 - registers the transport

from .figures import median, percentile, spin

BODY = {"id": "x" * 36, "args": list(range(20)), "kwargs": {"k": "v" * 150}}
HEADERS = {f"header{number}": "value" for number in range(10)}
PREFIX = "twbench_"
PREFETCH = 16
BATCH = 100
CONSUMERS = 4
_spawn = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Scale:
    """Sizes of the runs; ``slow`` are those of the systems that take a hundred times longer."""

    rounds: int
    messages: int
    slow_messages: int
    crew_seconds: float
    crew_messages: int
    sends: int
    idle_seconds: float
    backlog: int


QUICK = Scale(3, 1500, 200, 1.2, 18_000, 60, 4.0, 100_000)
FULL = Scale(5, 4000, 500, 4.0, 60_000, 200, 20.0, 1_000_000)


class Target(NamedTuple):
    """A queue of one system on one database; children get it too, so it holds plain values."""

    system: str
    url: str
    queue: str
    durability: str = "full"

    def connection(self) -> kombu.Connection:
        if self.system == "stock":
            return kombu.Connection(f"sqla+{self.url}")
        options = {"table_prefix": PREFIX, "durability": self.durability}
        return kombu.Connection(f"taskworker+{self.url}", transport_options=options)

    @contextmanager
    def channel(self) -> Iterator[tuple[kombu.Connection, Any]]:
        """A connection and a channel on which the queue exists."""
        with self.connection() as connection, connection.channel() as channel:
            kombu.Queue(self.queue)(channel).declare()
            yield connection, channel


# -- one process ----------------------------------------------------------------------------


def publish(channel: Any, queue: str, count: int) -> float:
    """Send one by one.

    :returns: seconds.
    """
    producer = kombu.Producer(channel)
    begin = time.perf_counter()
    for _ in range(count):
        producer.publish(BODY, exchange="", routing_key=queue, headers=dict(HEADERS))
    return time.perf_counter() - begin


def publish_batches(channel: Any, queue: str, count: int) -> float:
    """Send a hundred at a time.

    :returns: seconds.
    """
    producer = kombu.Producer(channel)
    begin = time.perf_counter()
    with producer.batch(BATCH):
        for _ in range(count):
            producer.publish(BODY, exchange="", routing_key=queue, headers=dict(HEADERS))
    return time.perf_counter() - begin


def fetch(connection: kombu.Connection, channel: Any, queue: str, count: int) -> float:
    """Receive, decode and acknowledge.

    :returns: seconds, until the last acknowledgement is written.
    """
    got = 0

    def take(body: object, message: Any) -> None:
        nonlocal got
        got += 1
        message.ack()

    begin = time.perf_counter()
    with kombu.Consumer(channel, [kombu.Queue(queue)], callbacks=[take], prefetch_count=PREFETCH):
        while got < count:
            connection.drain_events(timeout=20)
        if hasattr(channel, "flush"):
            channel.flush()
    return time.perf_counter() - begin


def rates(target: Target, scale: Scale) -> dict[str, float]:
    """Messages per second of one process, after a few to warm up."""
    ours = target.system != "stock"
    count = scale.messages if ours else scale.slow_messages
    with target.channel() as (connection, channel):
        publish(channel, target.queue, 20)
        fetch(connection, channel, target.queue, 20)
        found = {"publish": count / publish(channel, target.queue, count)}
        if ours:  # enough to be timed well
            more = 3 * count
            found["batch"] = more / publish_batches(channel, target.queue, more)
            count += more
        found["fetch"] = count / fetch(connection, channel, target.queue, count)
    found.setdefault("batch", found["publish"])  # the stock transport has no batches
    return found


# -- several processes ------------------------------------------------------------------------


def _consume(target: Target, pipe: Pipe, idle: bool) -> None:
    """A child: consume between two words of the parent, then report.

    :param idle: the bodies are times of sending; begin by finding nothing.
    """
    got = 0
    delays: list[float] = []  # milliseconds

    def take(message: Any) -> None:
        nonlocal got
        got += 1
        if idle:
            delays.append((time.monotonic() - message.decode()) * 1e3)
        message.ack()

    with target.channel() as (connection, channel):
        queue = kombu.Queue(target.queue)
        with kombu.Consumer(channel, [queue], on_message=take, prefetch_count=PREFETCH):
            if idle:
                with suppress(TimeoutError):
                    connection.drain_events(timeout=0.5)
            pipe.send("ready")
            pipe.recv()
            cpu, begin = time.process_time(), time.monotonic()
            while not pipe.poll():
                # SQLAlchemyError: on MariaDB the stock transport's consumers run into deadlocks.
                with suppress(TimeoutError, SQLAlchemyError):
                    connection.drain_events(timeout=5.0 if idle else 0.5)
            percent = 100 * (time.process_time() - cpu) / (time.monotonic() - begin)
    pipe.send((got, delays, percent))


def _produce(target: Target, pipe: Pipe) -> None:
    """A child: send one by one between two words of the parent."""
    with target.channel() as (_, channel):
        pipe.send("ready")
        pipe.recv()
        while not pipe.poll():
            publish(channel, target.queue, 5)


@contextmanager
def child(work: Callable[..., None], target: Target, *more: Any) -> Iterator[Pipe]:
    """A process that runs ``work(target, pipe, ...)`` and is ready."""
    here, there = _spawn.Pipe()
    process = _spawn.Process(target=work, args=(target, there, *more), daemon=True)
    process.start()
    there.close()  # so that a child that dies is noticed
    try:
        here.recv()
        yield here
        process.join(20)
    finally:
        if process.is_alive():
            process.kill()
            process.join()


def crew(target: Target, scale: Scale) -> dict[str, float]:
    """Messages per second that four consumers get together while somebody sends."""
    with target.channel() as (_, channel):
        if target.system == "stock":
            publish(channel, target.queue, scale.slow_messages)
        else:
            publish_batches(channel, target.queue, scale.crew_messages)
    with ExitStack() as stack:
        consumers = [stack.enter_context(child(_consume, target, False)) for _ in range(CONSUMERS)]
        everybody = [*consumers, stack.enter_context(child(_produce, target))]
        begin = time.monotonic()
        for pipe in everybody:
            pipe.send("go")
        time.sleep(scale.crew_seconds)
        for pipe in everybody:
            pipe.send("stop")
        seconds = time.monotonic() - begin
        got = sum(pipe.recv()[0] for pipe in consumers)
    return {"crew": got / seconds}


def latency(target: Target, scale: Scale) -> dict[str, float]:
    """Milliseconds from the call that sends to the callback of an idle consumer."""
    ours = target.system != "stock"
    sends, longest = (scale.sends, 0.04) if ours else (5, 1.0)
    rng = random.Random(1)
    with child(_consume, target, True) as pipe, target.channel() as (_, channel):
        producer = kombu.Producer(channel)
        pipe.send("go")
        for _ in range(sends):
            time.sleep(longest * rng.uniform(0.5, 1.0))
            producer.publish(time.monotonic(), exchange="", routing_key=target.queue)
        time.sleep(0.05)
        pipe.send("stop")
        producer.publish(time.monotonic(), exchange="", routing_key=target.queue)
        delays = pipe.recv()[1][:sends]
    return {"p50": percentile(delays, 0.50), "p99": percentile(delays, 0.99)}


def idle(target: Target, scale: Scale) -> dict[str, float]:
    """CPU time of a consumer with nothing to do, in percent of a core."""
    with child(_consume, target, True) as pipe, target.channel() as (_, channel):
        pipe.send("go")
        time.sleep(scale.idle_seconds)
        pipe.send("stop")
        kombu.Producer(channel).publish(time.monotonic(), exchange="", routing_key=target.queue)
        return {"cpu": pipe.recv()[2]}


# -- a long backlog -----------------------------------------------------------------------------


def backlog(target: Target, scale: Scale) -> dict[str, float]:
    """How many times a message costs more with a long backlog than with 1,000 messages."""
    with target.channel() as (connection, channel):
        publish_batches(channel, target.queue, 1000)

        def cost() -> float:
            count = scale.messages
            runs = [
                publish(channel, target.queue, count // 3)
                + fetch(connection, channel, target.queue, count // 3)
                for _ in range(3)
            ]
            return median(runs)

        cost()  # to warm up
        short = cost()
        _multiply(target, scale.backlog)
        cost()
        return {"backlog": cost() / short}


def _multiply(target: Target, wanted: int) -> None:
    """Copy the rows of a queue until there are as many as wanted."""
    columns = "queue, prio, owner, attempts, meta, body"
    copy = text(
        f"INSERT INTO {PREFIX}message ({columns}) SELECT {columns} FROM {PREFIX}message "
        "WHERE owner = 0 ORDER BY id LIMIT :most"
    )
    engine = create_engine(target.url)
    have = 1000
    while have < wanted:
        with engine.begin() as connection:
            have += connection.execute(copy, {"most": min(wanted - have, 100_000)}).rowcount
    engine.dispose()


# -- the bare driver ----------------------------------------------------------------------------


class Raw:
    """The least a queue in SQL could be: one table, one index, no kombu."""

    def __init__(self, target: Target) -> None:
        self._engine = create_engine(target.url, isolation_level="AUTOCOMMIT")
        self._pool = self._engine.raw_connection()
        raw: Any = self._pool.driver_connection
        self._cursor = raw.cursor()
        name = self._engine.dialect.name
        self._mark = "?" if name == "sqlite" else "%s"
        self._lock = "" if name == "sqlite" else "FOR UPDATE SKIP LOCKED"
        self._begin = "BEGIN IMMEDIATE" if name == "sqlite" else "BEGIN"
        number, blob = {
            "sqlite": ("INTEGER PRIMARY KEY AUTOINCREMENT", "BLOB"),
            "postgresql": ("BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY", "BYTEA"),
        }.get(name, ("BIGINT AUTO_INCREMENT PRIMARY KEY", "LONGBLOB"))
        if name == "sqlite":
            raw.isolation_level = None
            self._cursor.execute("PRAGMA journal_mode = WAL")
            self._cursor.execute("PRAGMA synchronous = FULL")
        self._table = f"{PREFIX}raw"
        self._cursor.execute(f"DROP TABLE IF EXISTS {self._table}")
        self._cursor.execute(
            f"CREATE TABLE {self._table} (id {number}, meta VARCHAR(2000), body {blob})"
        )

    def close(self) -> None:
        self._cursor.execute(f"DROP TABLE {self._table}")
        self._pool.close()
        self._engine.dispose()

    def send(self, count: int) -> float:
        """Seconds for so many messages, a commit each."""
        begin = time.perf_counter()
        for _ in range(count):
            self._insert(1)
        return time.perf_counter() - begin

    def send_batches(self, count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count // BATCH):
            self._insert(BATCH)
        return time.perf_counter() - begin

    def fetch(self, count: int) -> float:
        """Seconds to read and delete so many, as many at a time as a prefetching consumer."""
        begin = time.perf_counter()
        for _ in range(count // PREFETCH):
            self._cursor.execute(self._begin)
            self._cursor.execute(
                f"SELECT id, meta, body FROM {self._table} ORDER BY id LIMIT {PREFETCH} "
                + self._lock
            )
            ids = ",".join(str(row[0]) for row in self._cursor.fetchall())
            self._cursor.execute(f"DELETE FROM {self._table} WHERE id IN ({ids})")
            self._cursor.execute("COMMIT")
        return time.perf_counter() - begin

    def _insert(self, rows: int) -> None:
        values = ", ".join([f"({self._mark}, {self._mark})"] * rows)
        self._cursor.execute(
            f"INSERT INTO {self._table} (meta, body) VALUES {values}",
            ("m" * 550, b"b" * 300) * rows,
        )


def raw_rates(target: Target, scale: Scale) -> dict[str, float]:
    """Messages per second of the bare driver in one process."""
    count = scale.messages
    raw = Raw(target)
    try:
        raw.send(20)
        found = {"publish": count / raw.send(count)}
        more = 3 * count // BATCH * BATCH
        found["batch"] = more / raw.send_batches(more)
        found["fetch"] = (count + more) / raw.fetch(count + more)
    finally:
        raw.close()
    return found


# -- goals and tables ---------------------------------------------------------------------------


class Goal(NamedTuple):
    """A bound for each database, for a figure or for its ratio to the stock transport's."""

    key: str
    title: str
    limits: tuple[float, float, float]
    against: str = ""
    at_least: bool = False


DATABASES = ("sqlite", "postgresql", "mariadb")
GOALS = (
    Goal("publish", "send one by one ÷ stock", (8, 2.5, 6), "publish", True),
    Goal("batch", f"batches of {BATCH} ÷ stock one by one", (80, 20, 30), "batch", True),
    Goal("fetch", f"fetch and ack, prefetch {PREFETCH} ÷ stock", (40, 25, 15), "fetch", True),
    Goal("crew", "4 consumers and a sender ÷ stock", (30, 20, 15), "crew", True),
    Goal("p50", "idle consumer's delay, p50 ms", (2, 4, 8)),
    Goal("p99", "idle consumer's delay, p99 ms", (10, 20, 30)),
    Goal("backlog", "cost with the backlog ÷ with 1,000", (2, 2, 2)),
    Goal("cpu", "idle consumer's CPU, %", (0.3, 0.3, 1)),
)
COLUMNS = {
    "publish": "send/s",
    "batch": "batch/s",
    "fetch": "fetch+ack/s",
    "crew": "crew/s",
    "p50": "p50 ms",
    "p99": "p99 ms",
    "backlog": "backlog x",
    "cpu": "CPU %",
}


@dataclass
class Outcome:
    """What was measured on one database: figures by system and key, one per round."""

    database: str
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, system: str, found: dict[str, float]) -> None:
        for key, value in found.items():
            self.figures.setdefault(system, {}).setdefault(key, []).append(value)

    def value(self, goal: Goal) -> float | None:
        """What to compare with the goal; ratios are medians of the rounds' own."""
        ours = self.figures.get("ours", {}).get(goal.key)
        if not ours:
            return None
        if not goal.against:
            return median(ours)
        theirs = self.figures.get("stock", {}).get(goal.against, [])
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=False) if other]
        return median(ratios) if ratios else None

    def table(self) -> list[list[str]]:
        keys = [key for key in COLUMNS if any(key in found for found in self.figures.values())]
        lines = [["", *(COLUMNS[key] for key in keys)]]
        for system, found in self.figures.items():
            lines.append([system, *(_range(found.get(key, [])) for key in keys)])
        return lines

    def verdicts(self) -> list[list[str]]:
        lines = []
        for goal in GOALS:
            value = self.value(goal)
            limit = goal.limits[DATABASES.index(self.database)]
            met = value is not None and (value >= limit if goal.at_least else value <= limit)
            lines.append(
                [
                    f"{self.database}: {goal.title}",
                    f"{'≥' if goal.at_least else '≤'} {limit:g}",
                    "-" if value is None else f"{value:.3g}",
                    "not measured" if value is None else "met" if met else "MISSED",
                ]
            )
        return lines


def _range(values: Sequence[float]) -> str:
    if not values:
        return "-"
    show = "{:,.0f}" if max(values) >= 100 else "{:.2f}"
    low, middle, high = (show.format(value) for value in (min(values), median(values), max(values)))
    return middle if low == high else f"{middle} [{low}-{high}]"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


# -- the whole ----------------------------------------------------------------------------------


def measure(database: str, url: str, scale: Scale) -> Outcome:
    """All measures of one database: in each round every system in turn, in a new order."""
    outcome = Outcome(database)

    def run(work: Callable[[Target, Scale], dict[str, float]], system: str) -> None:
        with fresh(system, url) as target:
            outcome.add(system, work(target, scale))

    systems = ["ours", "stock", "raw"]
    for number in range(scale.rounds):
        for system in random.Random(number).sample(systems, len(systems)):
            run(raw_rates if system == "raw" else rates, system)
        for system in random.Random(number).sample(systems[:2], 2):
            run(crew, system)
            if system == "ours" or number == 0:  # stock: always up to a second
                run(latency, system)
    run(idle, "ours")
    run(backlog, "ours")
    return outcome


@contextmanager
def fresh(system: str, url: str) -> Iterator[Target]:
    """A queue that nobody used before; nothing of it is left behind."""
    with ExitStack() as stack:
        if make_url(url).get_backend_name() == "sqlite":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            url = f"{url}/{folder}/queue.db"
        target = Target(system, url, f"bench-{uuid.uuid4().hex[:12]}")
        try:
            yield target
        finally:
            _clean_up(target)


def _clean_up(target: Target) -> None:
    engine = create_engine(target.url)
    if target.system == "stock":
        statements = [
            "DELETE FROM kombu_message WHERE queue_id IN "
            f"(SELECT id FROM kombu_queue WHERE name = '{target.queue}')",
            f"DELETE FROM kombu_queue WHERE name = '{target.queue}'",
        ]
    else:
        names = ("message", "binding", "consumer", "queue", "meta")
        statements = [f"DROP TABLE IF EXISTS {PREFIX}{name}" for name in names]
        _forget(target)
    for statement in statements:
        with suppress(SQLAlchemyError), engine.begin() as connection:
            connection.execute(text(statement))
    engine.dispose()


def _forget(target: Target) -> None:
    """The tables are about to go: who comes next has to look for them again."""
    from flask_taskworker.transports.sql.engine import database_for

    options = {"table_prefix": PREFIX, "durability": target.durability}
    database_for(target.url, options).dispose()


def answers(url: str) -> bool:
    """Whether there is a database."""
    try:
        engine = create_engine(url)
        with engine.connect():
            return True
    except (SQLAlchemyError, ImportError) as exc:
        print(f"{make_url(url).get_backend_name()} is left out: {exc}", file=sys.stderr)
        return False


def main() -> int:
    arguments = _parse()
    scale = QUICK if arguments.quick else FULL
    begin = time.monotonic()
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} cores, kombu {kombu.__version__}; "
        f"rounds: {scale.rounds}; medians [min-max]; backlog: {scale.backlog:,}",
        flush=True,
    )
    urls = {
        "sqlite": "sqlite://",
        "postgresql": arguments.postgresql,
        "mariadb": arguments.mariadb,
    }
    verdicts = [["goal", "bound", "reached", ""]]
    spins = [spin()]
    for name in arguments.databases or DATABASES:
        if answers(urls[name]):
            outcome = measure(name, urls[name], scale)
            print(f"\n{name}\n{_aligned(outcome.table())}", flush=True)
            verdicts += outcome.verdicts()
            spins.append(spin())
    print(f"\nGoals\n{_aligned(verdicts)}\n\n{time.monotonic() - begin:.0f} s. A fixed loop took")
    print(f"{median(spins):.1f} ms [{min(spins):.1f}-{max(spins):.1f}]: the wider, the noisier.")
    return 1 if arguments.strict and any(line[3] != "met" for line in verdicts[1:]) else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sql_transport",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("databases", nargs="*", choices=[[], *DATABASES], metavar="DATABASE")
    parser.add_argument("--quick", action="store_true", help="smaller runs: under 3 minutes")
    parser.add_argument(
        "--postgresql",
        default=os.environ.get(
            "TASKWORKER_POSTGRESQL_URL", "postgresql+psycopg://postgres@127.0.0.1/test"
        ),
    )
    parser.add_argument(
        "--mariadb",
        default=os.environ.get("TASKWORKER_MYSQL_URL", "mysql+pymysql://root@127.0.0.1/test"),
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 unless every goal is met"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
