"""Workers of Celery and of ours on one queue, fed by clients of both."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.app_folder import AppFolder
from support.processes import Program, eventually

celery = pytest.importorskip("celery", reason="Celery is not installed")

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(180)]

OURS = """
    task_worker = BaseTaskWorker(app)

    @task_worker.define_task(name="work", ignore_result=True)
    def work(name, seconds=0.0):
        ledger.write("start", name)
        if seconds:
            time.sleep(seconds)
        ledger.write("end", name)
        ledger.write("by-ours", name)
"""
THEIRS = """
    import json, os, time, warnings
    warnings.simplefilter("ignore")
    from celery import Celery
    from support.ledger import Ledger

    ledger = Ledger(os.environ["LEDGER"])
    app = Celery("theirs", broker=os.environ["BROKER"])
    app.conf.update(
        task_default_queue=os.environ["QUEUE"],
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        broker_transport_options=json.loads(os.environ["OPTIONS"]),
    )

    @app.task(name="work", ignore_result=True)
    def work(name, seconds=0.0):
        ledger.write("start", name)
        if seconds:
            time.sleep(seconds)
        ledger.write("end", name)
        ledger.write("by-theirs", name)
"""
#: Celery's workers put back what is older than this, in seconds; our lease is longer.
VISIBILITY = 2


class CeleryFolder(AppFolder):
    HEAD = ""


class Fleet:
    """One queue, and whoever works on it."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.queue = f"mixed-{uuid.uuid4().hex[:8]}"
        for name in ("ours", "theirs"):
            (folder / name).mkdir()
        self.our_folder = AppFolder(folder / "ours", OURS)
        self.their_folder = CeleryFolder(folder / "theirs", THEIRS)
        self.ledger = self.our_folder.ledger
        self.options: dict[str, Any] = {}
        if url.startswith("redis"):
            # A share of the server where nobody else's worker sweeps.
            self.options = {
                "visibility_timeout": VISIBILITY,
                "unacked_restore_interval": 1,
                "unacked_restore_throttle": 1,
                "unacked_key": f"{self.queue}-unacked",
                "unacked_index_key": f"{self.queue}-unacked-index",
                "unacked_mutex_key": f"{self.queue}-mutex",
                "unacked_mutex_expire": 2,
            }

    def settings(self) -> dict[str, str]:
        import json

        return {
            "FLASK_TASKER_BROKER_URL": self.url,
            "FLASK_TASKER_DEFAULT_QUEUE": self.queue,
            "FLASK_TASKER_RESULT_BACKEND": "disabled",
            "FLASK_TASKER_LEASE": "6",
            "FLASK_TASKER_TRANSPORT_OPTIONS": json.dumps(self.options),
        }

    def start_ours(self) -> Program:
        return self.our_folder.ready_worker("-q", "-c", "2", **self.settings())

    def start_theirs(self) -> Program:
        import json

        worker = self.their_folder.python(
            *("-m", "celery", "-A", "lab", "worker", "-P", "threads", "-c", "2", "-l", "info"),
            *("--without-gossip", "--without-mingle", "-n", f"{self.queue}@%h"),
            BROKER=self.url,
            QUEUE=self.queue,
            LEDGER=self.ledger.path,
            OPTIONS=json.dumps(self.options),
        )
        worker.wait_for(r"@\S+ ready\.")
        return worker

    def send(self, count: int, seconds: float = 0.0) -> None:
        """Every other task from Celery's client."""
        ours = self.our_folder.load(**self.settings())["work"]
        app = celery.Celery("client", broker=self.url)
        app.conf.task_default_queue = self.queue
        for number in range(count):
            name = f"{number}"
            if number % 2:
                ours.delay(name, seconds)
            else:
                app.send_task("work", (name, seconds))
            self.ledger.write("sent", name)
        app.close()

    def wait_for_all(self, but: int = 0) -> None:
        def missing() -> set[str]:
            return set(self.ledger.count("sent")) - set(self.ledger.count("end"))

        eventually(lambda: len(missing()) <= but, "all that was sent has run", 60.0)

    def close(self) -> None:
        self.our_folder.close()
        self.their_folder.close()


@pytest.fixture(params=["redis", "amqp"])
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(request.getfixturevalue(f"{request.param}_url"), tmp_path)
    yield fleet
    fleet.close()


def test_both_share_a_queue(fleet: Fleet) -> None:
    ours, theirs = fleet.start_ours(), fleet.start_theirs()
    fleet.send(200, 0.01)
    fleet.wait_for_all()
    assert set(fleet.ledger.count("end").values()) == {1}, "each ran once"
    assert fleet.ledger.count("by-ours")
    assert fleet.ledger.count("by-theirs")
    assert ours.stop() == 0
    theirs.stop()


@pytest.mark.parametrize("victim", ["ours", "theirs"])
def test_what_a_killed_worker_held_is_done_by_the_other_kind(fleet: Fleet, victim: str) -> None:
    start = {"ours": fleet.start_ours, "theirs": fleet.start_theirs}
    doomed = start.pop(victim)()
    fleet.send(60, 0.05)
    eventually(lambda: len(fleet.ledger.count("end")) >= 10, "some are done")
    doomed.kill_all()
    doomed.wait()
    (start_heir,) = start.values()
    heir = start_heir()
    # Celery's worker on Redis loses what it has popped and not written down yet.
    fleet.wait_for_all(but=1 if victim == "theirs" and fleet.options else 0)
    heir.stop()
    assert fleet.ledger.count(f"by-{'theirs' if victim == 'ours' else 'ours'}")


def test_celery_does_not_take_a_long_task_from_us(fleet: Fleet) -> None:
    ours = fleet.start_ours()
    fleet.send(2, 4.0 * VISIBILITY)
    eventually(lambda: len(fleet.ledger.count("start")) == 2, "both run with us")
    theirs = fleet.start_theirs()
    fleet.wait_for_all()
    theirs.stop()
    assert ours.stop() == 0
    assert set(fleet.ledger.count("start").values()) == {1}
