"""Processes, servers and disks fail under load, and the SQL transport loses nothing.

Every id a publisher tried, was told is sent, or a consumer got stands in a ledger (see
:mod:`support.load`). ``TASKWORKER_FAULT_SECONDS`` is how long each fault is kept up; the figures
are printed, so run with ``-s`` to read them.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import kombu
import pytest
import sqlalchemy as sa

from flask_taskworker.transports.sql.engine import database_for
from flask_taskworker.transports.sql.errors import DatabaseUnavailableError
from support.load import PREFETCH, QUEUE, Load, load_on
from support.processes import Program, eventually
from support.servers import OwnMariaDB, OwnPostgreSQL, OwnServer, running

SECONDS = float(os.environ.get("TASKWORKER_FAULT_SECONDS", "3"))
#: A consumer that resumes must do so within this time; it includes the start of a server.
RESUME = 20.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180 + 6 * SECONDS)]


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgresql_url", marks=pytest.mark.services),
        pytest.param("mysql_url", marks=pytest.mark.services),
    ],
    ids=["sqlite", "postgresql", "mariadb"],
)
def load(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[Load]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/queue.db"
    else:
        url = request.getfixturevalue(request.param)
    with load_on(url, tmp_path, table_prefix=f"{unique}_") as load:
        load.left()  # creates the tables
        yield load


def keep_on() -> Iterator[float]:
    """The seconds that are left, until there are none."""
    end = time.monotonic() + SECONDS
    while (left := end - time.monotonic()) > 0:
        yield left


def all_run(*programs: Program) -> bool:
    for program in programs:
        assert program.running, f"{program} ended by itself:\n{program.output}"
    return True


def report(name: str, load: Load, **more: object) -> None:
    print(f"\n{name}: {load.figures(**more)}")


def test_consumers_killed_at_random_lose_nothing(load: Load) -> None:
    publishers = [load.publisher() for _ in range(2)]
    consumers = [load.consumer() for _ in range(3)]
    eventually(lambda: load.count("got") >= 20, "the load runs")
    chance = random.Random(SECONDS)
    kills = 0
    for _ in keep_on():
        load.wait_for_progress("got", what="before the next kill")
        time.sleep(chance.uniform(0, 0.5))
        consumers.pop(chance.randrange(3)).kill_all()
        kills += 1
        consumers.append(load.consumer())
    all_run(*publishers, *consumers)
    for publisher in publishers:
        publisher.close()
    load.drain()
    report("consumers killed", load, kills=kills)
    assert load.lost == load.unknown == set()
    assert load.duplicates <= kills * PREFETCH


@pytest.mark.parametrize("durability", ["full", "normal"])
def test_what_a_killed_publisher_was_told_is_sent_is_delivered(load: Load, durability: str) -> None:
    load.options["durability"] = durability
    consumer = load.consumer()
    publishers = [load.publisher(0) for _ in range(3)]
    eventually(lambda: load.count("got") >= 20, "the load runs")
    chance = random.Random(SECONDS)
    kills = 0
    for _ in keep_on():
        load.wait_for_progress("sent", what="before the next kill")
        time.sleep(chance.uniform(0, 0.5))
        publishers.pop(chance.randrange(3)).kill_all()
        kills += 1
        publishers.append(load.publisher(0))
    all_run(*publishers, consumer)
    for publisher in publishers:
        publisher.close()
    load.drain()
    report("publishers killed", load, kills=kills, uncertain=len(load.uncertain))
    assert load.lost == load.unknown == set()
    assert load.duplicates == 0
    # Killed between the commit and the line in the ledger, at most once each.
    assert len(load.uncertain) <= kills + len(publishers)


def test_competing_consumers_without_faults_share_without_loss_or_duplicate(load: Load) -> None:
    publishers = [load.publisher(0) for _ in range(2)]
    consumers = [load.consumer() for _ in range(4)]
    eventually(lambda: load.count("ready") == 4, "four consumers")
    for left in keep_on():
        time.sleep(left)
    all_run(*publishers, *consumers)
    for publisher in publishers:
        publisher.close()
    load.drain()
    report("no faults", load)
    assert load.lost == load.unknown == set()
    assert load.duplicates == 0


# -- servers ------------------------------------------------------------------------------


@pytest.mark.services
@pytest.mark.parametrize("kind", [OwnPostgreSQL, OwnMariaDB], ids=["postgresql", "mariadb"])
def test_a_server_that_crashes_under_load_loses_nothing(
    kind: type[OwnServer], tmp_path: Path
) -> None:
    with running(kind) as server, load_on(server.url, tmp_path) as load:
        load.left()
        programs = [
            load.publisher(), load.publisher(), load.consumer(), load.consumer(renew=True),
        ]  # fmt: skip
        eventually(lambda: load.count("got") >= 20 and load.count("ready") >= 2, "the load runs")
        back: list[float] = []
        for left in keep_on():
            server.crash()
            load.wait_for_progress("failed", "trouble", what="while the server is away")
            server.start()
            started = time.monotonic()
            load.wait_for_progress("sent", "got", what="after the restart", timeout=RESUME)
            back.append(time.monotonic() - started)
            time.sleep(min(left, random.uniform(0, 1)))
        all_run(*programs)
        for publisher in programs[:2]:
            publisher.close()
        load.drain()
        report(
            f"{kind.__name__} crashed", load, crashes=len(back),
            resumed_in=f"{max(back):.2f}s", uncertain=len(load.uncertain),
        )  # fmt: skip
        assert load.lost == load.unknown == set()
        # PostgreSQL's consumers do not wait for the disk: their last acknowledgements, of up
        # to three rounds of its log writer, may be undone. Never a publish.
        undone = 1.0 * load.count("got") / SECONDS if kind is OwnPostgreSQL else 0
        assert load.duplicates <= len(back) * (2 * PREFETCH + undone)


@pytest.mark.services
def test_a_server_whose_summer_time_ends_has_no_hour_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")  # of the server
    with running(OwnMariaDB) as server:
        database = database_for(server.url)
        held = database.connect()
        local = []
        for moment in (1729989000.5, 1729992600.5):  # 2:30 in the morning, twice
            held.execute(f"SET timestamp = {moment}")
            local.append(held.execute("SELECT NOW(6)").fetchone()[0])
            assert database.dialect.database_time(held) == moment
        assert local[0] == local[1]
        held.close()
        database.dispose()


_KILL_SESSIONS = {
    "postgresql": "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    "mysql": "SELECT id FROM information_schema.processlist "
    "WHERE db = DATABASE() AND id <> CONNECTION_ID()",
}


@pytest.mark.parametrize(
    "service",
    [
        pytest.param("postgresql_url", marks=pytest.mark.services, id="postgresql"),
        pytest.param("mysql_url", marks=pytest.mark.services, id="mariadb"),
    ],
)
def test_sessions_killed_each_second_lose_nothing(
    service: str, request: pytest.FixtureRequest, tmp_path: Path, unique: str
) -> None:
    url = request.getfixturevalue(service)
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with load_on(url, tmp_path, table_prefix=f"{unique}_") as load:
        load.left()
        programs = [
            load.publisher(), load.publisher(), load.consumer(), load.consumer(renew=True),
        ]  # fmt: skip
        eventually(lambda: load.count("got") >= 20 and load.count("ready") >= 2, "the load runs")
        rounds = killed = 0
        back = 0.0
        for left in keep_on():
            with admin.connect() as connection:
                found = connection.exec_driver_sql(_KILL_SESSIONS[admin.dialect.name]).fetchall()
                if admin.dialect.name == "mysql":
                    for (session,) in found:
                        with contextlib.suppress(sa.exc.OperationalError):  # gone by itself
                            connection.exec_driver_sql(f"KILL {session:d}")
                    killed += len(found)
                else:
                    killed += found[0][0]
            rounds += 1
            took = load.wait_for_progress("sent", "got", what="after the kill", timeout=RESUME)
            back = max(back, took)
            time.sleep(max(0.0, min(left, 1 - took)))
        all_run(*programs)
        for publisher in programs[:2]:
            publisher.close()
        load.drain()
        failures = load.ledger.count("failed")
        report(
            "sessions killed", load, sessions=killed, resumed_in=f"{back:.2f}s",
            uncertain=len(load.uncertain), trouble=load.count("trouble"),
        )  # fmt: skip
        assert load.lost == load.unknown == set()
        assert all(" DatabaseUnavailableError: " in line for line in failures)
        # A session may end between the commit and the answer, once for each of them.
        assert load.duplicates <= rounds * 2 * 2 * PREFETCH


# -- disk and locks -----------------------------------------------------------------------


@contextlib.contextmanager
def disk_of(size: str, folder: Path, user: str = "root") -> Iterator[Path]:
    """Make a folder a disk of its own."""
    folder.mkdir(exist_ok=True)
    mounted = os.name == "posix" and os.getuid() == 0
    if mounted:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("no small disk can be mounted here")
    try:
        shutil.chown(folder, user)
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 2 MB."""
    with disk_of("2m", tmp_path / "disk") as folder:
        yield folder


def test_a_full_disk_refuses_publishes_keeps_the_rest_and_lets_the_consumer_resume(
    small_disk: Path, tmp_path: Path
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(500_000))
    url = f"taskworker+sqlite:///{small_disk}/queue.db"
    sent: list[str] = []
    with kombu.Connection(url) as connection:
        producer = kombu.Producer(connection.channel())
        with pytest.raises(DatabaseUnavailableError, match="Free some space on the disk"):
            for number in range(1000):
                producer.publish({"id": f"{number}", "x": "x" * 20_000}, routing_key=QUEUE)
                sent.append(f"{number}")
        assert len(sent) > 10
        with pytest.raises(DatabaseUnavailableError):
            producer.publish({"id": "again", "x": "x" * 20_000}, routing_key=QUEUE)
        with contextlib.closing(sqlite3.connect(small_disk / "queue.db")) as look:
            assert look.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            stored = look.execute("SELECT count(*) FROM taskworker_message").fetchone()[0]
            assert stored == len(sent)

        got: list[str] = []

        def work(message: kombu.Message) -> None:
            got.append(message.payload["id"])
            message.ack()

        with kombu.Connection(url) as other:
            consumer = kombu.Consumer(
                other.channel(), [kombu.Queue(QUEUE)], on_message=work, auto_declare=False
            )
            consumer.consume()
            with contextlib.suppress(*other.connection_errors):  # the disk is full for it, too
                while len(got) < len(sent):
                    other.drain_events(timeout=1)
            ballast.unlink()
            freed = time.monotonic()
            while len(got) < len(sent):
                other.drain_events(timeout=RESUME)
            resumed = time.monotonic() - freed
            producer.publish({"id": "after"}, routing_key=QUEUE)
            while "after" not in got:
                other.drain_events(timeout=RESUME)
    print(f"\nfull disk: stored={stored} got={len(got)} resumed_in={resumed:.2f}s")
    assert sorted(got) == sorted([*sent, "after"])
    database_for(url).dispose()


@contextlib.contextmanager
def tables_on_a_small_disk(kind: type[OwnServer]) -> Iterator[tuple[str, Path]]:
    """A server of our own whose tables, and nothing else, lie on a disk of 12 MB."""
    with running(kind) as server, contextlib.ExitStack() as stack:
        admin = sa.create_engine(server.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with admin.connect() as connection:
            connection.exec_driver_sql("CREATE DATABASE small")
            user = server.user or "root"
            if kind is OwnPostgreSQL:
                disk = stack.enter_context(disk_of("12m", server.folder / "disk", user))
                connection.exec_driver_sql(f"CREATE TABLESPACE small LOCATION '{disk}'")
                connection.exec_driver_sql("ALTER DATABASE small SET default_tablespace = small")
            else:
                folder = server.folder / "data" / "small"
                disk = stack.enter_context(disk_of("12m", folder, user))
        yield str(admin.url.set(database="small").render_as_string(hide_password=False)), disk
        server.crash()  # it has files open there


@pytest.mark.services
@pytest.mark.parametrize("kind", [OwnPostgreSQL, OwnMariaDB], ids=["postgresql", "mariadb"])
def test_a_full_disk_of_a_server_refuses_publishes_and_lets_the_consumer_resume(
    kind: type[OwnServer],
) -> None:
    with tables_on_a_small_disk(kind) as (server, disk):
        url = f"taskworker+{server}"
        database = database_for(url)
        held = database.connect()  # creates the tables
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(4_000_000))
        sent: list[str] = []
        with kombu.Connection(url) as connection:
            producer = kombu.Producer(connection.channel())
            with pytest.raises(DatabaseUnavailableError, match="the server's disk is full"):
                for number in range(2000):
                    body = {"id": f"{number}", "x": os.urandom(10_000).hex()}
                    producer.publish(body, routing_key=QUEUE)
                    sent.append(f"{number}")
            assert len(sent) > 10
            stored = held.execute(database.dialect.sql("SELECT count(*) FROM {message}")).fetchone()
            assert stored[0] == len(sent)
            ballast.unlink()
            producer.publish({"id": "after"}, routing_key=QUEUE)
            got: list[str] = []

            def work(message: kombu.Message) -> None:
                got.append(message.payload["id"])
                message.ack()

            with kombu.Connection(url) as other:
                consumer = kombu.Consumer(
                    other.channel(), [kombu.Queue(QUEUE)], on_message=work, auto_declare=False
                )
                consumer.consume()
                while len(got) <= len(sent):
                    other.drain_events(timeout=RESUME)
        print(f"\nfull disk of {kind.__name__}: stored={stored[0]} got={len(got)}")
        assert got == [*sent, "after"]
        held.close()
        database.dispose()


def test_a_disk_that_was_full_at_the_start_does_no_lasting_harm(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    url = f"taskworker+sqlite:///{small_disk}/queue.db"
    with kombu.Connection(url) as connection, pytest.raises(connection.connection_errors):
        kombu.Producer(connection.channel()).publish(1, routing_key=QUEUE)
    database_for(url).dispose()
    ballast.unlink()
    with kombu.Connection(url) as connection:
        kombu.Producer(connection.channel()).publish(1, routing_key=QUEUE)
        assert connection.channel().basic_get(QUEUE).payload == 1
        assert database_for(url).doorbell.available
    database_for(url).dispose()


def test_a_file_locked_for_longer_than_the_patience_is_an_error_and_work_resumes(
    tmp_path: Path,
) -> None:
    path = tmp_path / "queue.db"
    with load_on(f"sqlite:///{path}", tmp_path, busy_timeout=0.5) as load:
        load.left()
        # Consumers slower than publishers, so that they, too, want to write all the time.
        programs = [
            load.publisher(), load.publisher(), load.consumer(0.005),
            load.consumer(0.005, renew=True),
        ]  # fmt: skip
        eventually(lambda: load.count("got") >= 20 and load.count("ready") >= 2, "the load runs")
        back: list[float] = []
        for _ in keep_on():
            with contextlib.closing(sqlite3.connect(path, timeout=30)) as app:
                app.execute("BEGIN IMMEDIATE")
                load.wait_for_progress("failed", "trouble", what="while the app holds the lock")
                app.rollback()
            started = time.monotonic()
            load.wait_for_progress("sent", "got", what="after the lock", timeout=RESUME)
            back.append(time.monotonic() - started)
        all_run(*programs)
        for publisher in programs[:2]:
            publisher.close()
        load.drain()
        failures = load.ledger.count("failed")
        report("locked file", load, locks=len(back), resumed_in=f"{max(back):.2f}s")
        assert load.lost == load.unknown == set()
        assert failures
        assert all("was locked by another connection for 0.5 s" in line for line in failures)
        # A publish that raised was not stored.
        assert not {line.split()[0] for line in failures} & set(load.ledger.count("got"))
        # Acknowledgements that a connection could not write when it was closed.
        assert load.duplicates <= len(back) * PREFETCH
