"""A broker or a database that goes away and comes back: runs go on, and their results are kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa

from flask_taskworker.transports.sql.engine import database_for
from flask_taskworker.worker import watchdog
from support import wait_until
from support.app_folder import AppFolder
from support.processes import eventually
from support.room import PATIENCE, Room
from support.servers import OwnPostgreSQL, running
from support.sockets import Proxy

pytestmark = [pytest.mark.services, pytest.mark.timeout(180)]

LEASE = 2.0

LAB = """
    task_worker = BaseTaskWorker(app)

    @task_worker.define_task
    def work(name, seconds):
        ledger.write("start", name)
        time.sleep(seconds)
        ledger.write("end", name)
"""


@pytest.fixture
def server() -> Iterator[OwnPostgreSQL]:
    with running(OwnPostgreSQL) as server:
        assert isinstance(server, OwnPostgreSQL)
        yield server
        database_for(server.url).dispose()


def room(folder: Path, queue: str, broker: str, results: str, **more: Any) -> Room:
    settings = {
        "TASKER_BROKER_URL": broker,
        "TASKER_RESULT_BACKEND": results,
        "TASKER_LEASE": LEASE,
        **more,
    }
    return Room(settings, folder, queue)


def wait_for_the_disk() -> None:
    """Claims are written without waiting for the disk: losing one means only that it runs again."""
    time.sleep(1.0)


def get(handle: Any) -> Any:
    return handle.get(timeout=60)


def test_runs_go_on_while_the_database_is_away_and_settle_when_it_is_back(
    server: OwnPostgreSQL, tmp_path: Path, unique: str
) -> None:
    """Messages and results in one database; it is away for longer than the lease."""
    lab = room(tmp_path, unique, f"taskworker+{server.url}", server.url)
    handles = [lab.wait.delay(number) for number in range(4)]
    with lab.worker(concurrency=4), lab.worker(concurrency=4):
        lab.wait_for_starts("wait", 4)
        wait_for_the_disk()
        server.crash()
        lab.gate.set()  # they end while nobody can store it
        time.sleep(2 * LEASE)
        server.start()
        assert [get(handle) for handle in handles] == [0, 1, 2, 3]
        assert get(lab.note.delay("after")) == "after"
    assert sorted(lab.starts("wait")) == [0, 1, 2, 3], "each ran once"
    lab.close()


def test_tasks_that_outlast_the_absence_run_once(server: OwnPostgreSQL, tmp_path: Path) -> None:
    """Two processes: neither takes the other for dead because it could not show that it lives."""
    lab = AppFolder(tmp_path, LAB)
    settings = {
        "FLASK_TASKER_BROKER_URL": f"taskworker+{server.url}",
        "FLASK_TASKER_LEASE": str(LEASE),
    }
    try:
        workers = [lab.ready_worker("-q", "-c", "2", **settings) for _ in range(2)]
        lab.send("for n in range(4): work.delay(f'n{n}', 12)", **settings)
        lab.wait_for_steps("start", 4)
        wait_for_the_disk()
        server.crash()
        time.sleep(2.5 * LEASE)
        server.start()
        assert len(lab.wait_for_steps("end", 4)) == 4
        eventually(
            lambda: lab.query("SELECT count(*) FROM taskworker_message", server.url) == [(0,)],
            "all is settled",
        )
        assert [worker.stop() for worker in workers] == [0, 0]
        assert sorted(lab.steps("start")) == ["n0", "n1", "n2", "n3"], "each ran once"
    finally:
        lab.close()


def test_results_are_kept_while_their_store_is_away(
    server: OwnPostgreSQL, tmp_path: Path, unique: str
) -> None:
    """The queue is elsewhere and works all the time."""
    queue = f"taskworker+sqlite:///{tmp_path / 'queue.db'}"
    lab = room(tmp_path, unique, queue, server.url)
    handles = [lab.wait.delay(number) for number in range(4)]
    with lab.worker(concurrency=4):
        lab.wait_for_starts("wait", 4)
        server.crash()
        lab.gate.set()
        time.sleep(2 * LEASE)
        server.start()
        assert [get(handle) for handle in handles] == [0, 1, 2, 3]
    assert sorted(lab.starts("wait")) == [0, 1, 2, 3]
    lab.close()


@pytest.mark.parametrize("ends", ["before it comes back", "after it came back"])
def test_a_run_that_outlives_its_connection_is_not_run_again(
    ends: str, amqp_url: str, tmp_path: Path, unique: str
) -> None:
    address = urlsplit(amqp_url)
    with Proxy(address.hostname or "", address.port or 5672) as proxy:
        through = amqp_url.replace(f":{address.port or 5672}/", f":{proxy.port}/")
        lab = room(tmp_path, unique, through, f"sqlite:///{tmp_path / 'results.db'}")
        handles = [lab.wait.delay(number) for number in range(3)]
        with lab.worker(concurrency=4) as worker:
            lab.wait_for_starts("wait", 3)
            epoch = worker.consumer._epoch
            if ends.startswith("before"):
                lab.gate.set()
            proxy.cut()
            wait_until(lambda: worker.consumer._epoch > epoch, "it reconnects", PATIENCE)
            assert get(lab.note.delay("after")) == "after"
            lab.gate.set()
            assert sorted(get(handle) for handle in handles) == [0, 1, 2]
            wait_until(lambda: not worker.consumer.unsettled(), "all is settled", PATIENCE)
        assert sorted(lab.starts("wait")) == [0, 1, 2], "each ran once"
        assert lab.task_app.publisher.queue_size(unique) == 0
        lab.close()


def test_a_half_open_connection_is_noticed_and_replaced(
    postgresql_url: str, tmp_path: Path, unique: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The peer is gone without a word: only the watchdog can tell."""
    monkeypatch.setattr(watchdog, "STALLED_AFTER", 4.0)
    monkeypatch.setattr(watchdog, "INTERVAL", 0.5)
    address = sa.make_url(postgresql_url)
    with Proxy(address.host or "", address.port or 5432) as proxy:
        through = address.set(port=proxy.port).render_as_string(hide_password=False)
        lab = room(
            tmp_path, unique, f"taskworker+{through}", f"sqlite:///{tmp_path / 'results.db'}",
            TASKER_LOOP_INTERVAL=1,
        )  # fmt: skip
        with lab.worker(concurrency=2):
            assert get(lab.note.delay("before")) == "before"
            lab.task_app.publisher.close()  # its connections are not what is tested
            proxy.hole()
            assert get(lab.note.delay("after")) == "after"
        assert "the worker's loop has stood still" in caplog.text
        lab.close()
        database_for(through).dispose()
