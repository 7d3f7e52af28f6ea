"""Celery itself, worker and client, with the SQL transport as its broker."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_taskworker.transports.sql.engine import database_for
from support.ledger import Ledger
from support.processes import PATIENCE, Programs, eventually, programs_in

celery = pytest.importorskip("celery", reason="Celery is not installed")

pytestmark = pytest.mark.timeout(120)

APP = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
from celery import Celery
{register}
from support.ledger import Ledger

ledger = Ledger({ledger!r})
app = Celery("lab")
app.conf.update({settings!r})

@app.task(name="add")
def add(a, b):
    ledger.write("ran", f"{{a}}+{{b}}")
    return a + b

@app.task(name="timed")
def timed(name):
    ledger.write("timed", f"{{name}} {{time.time()}}")

@app.task(name="fails", bind=True, max_retries=2)
def fails(self, name):
    ledger.write("try", name)
    if self.request.retries < 2:
        raise self.retry(countdown=0)
    return "third"
"""


def _addressed(url: str, by_class: bool) -> dict[str, Any]:
    """Celery's settings for a database: by our name for the transport, or by its class."""
    if not by_class:
        return {"broker_url": f"taskworker+{url}", "broker_transport": None}
    # Without the driver: kombu takes what is before a "+" for the transport.
    return {
        "broker_url": _plain(url),
        "broker_transport": "flask_taskworker.transports.sql:Transport",
    }


def _plain(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme.partition('+')[0]}://{rest}"


class Lab:
    """A Celery app in a module, its worker as a program, and this process as its client."""

    def __init__(self, folder: Path, programs: Programs, url: str, by_class: bool) -> None:
        self.prefix = f"tw_{uuid.uuid4().hex[:8]}_"
        self.url, self.by_class = url, by_class
        self.options = {"table_prefix": self.prefix}
        self.settings: dict[str, Any] = {
            **_addressed(url, by_class),
            "broker_transport_options": self.options,
            "broker_connection_retry_on_startup": True,
            "result_backend": f"db+sqlite:///{folder}/results.db",
            "worker_hijack_root_logger": False,
            "worker_prefetch_multiplier": 4,
        }
        self.ledger = Ledger(folder / "ledger")
        register = "" if by_class else "import flask_taskworker.transports"
        (folder / "lab.py").write_text(
            APP.format(register=register, ledger=self.ledger.path, settings=self.settings)
        )
        self.app = celery.Celery("client", set_as_current=False)
        # The client reaches the same tables by the other form of the address.
        self.app.conf.update(self.settings | _addressed(url, not by_class))
        self.worker = programs.python(
            "-m", "celery", "-A", "lab", "worker", "-l", "INFO", "-c", "1", "--without-mingle",
            "-n", "w1@lab", C_FORCE_ROOT="1",
            PYTHONPATH=f"{Path(__file__).resolve().parent.parent}",
        )  # fmt: skip
        self.worker.wait_for("w1@lab ready", 60)

    def send(self, name: str, *args: Any, **options: Any) -> Any:
        return self.app.send_task(name, args, **options)

    @property
    def database(self) -> Any:
        return database_for(self.url, self.options)

    def left(self) -> int:
        """How many messages for tasks the tables hold."""
        held = self.database.connect()
        try:
            cursor = held.execute(
                self.database.dialect.sql(
                    "SELECT count(*) FROM {message} m JOIN {queue} q ON q.id = m.queue "
                    "WHERE q.name = 'celery'"
                )
            )
            return int(cursor.fetchone()[0])
        finally:
            held.close()

    def close(self) -> None:
        self.worker.close()
        self.app.close()
        held = self.database.connect()
        for table in reversed(self.database.dialect.names):
            held.execute(f"DROP TABLE IF EXISTS {table}")
        held.close()
        self.database.dispose()


@pytest.fixture(
    params=[
        ("sqlite", False),
        pytest.param(("sqlite", True), marks=pytest.mark.slow),
        pytest.param(("postgresql_url", False), marks=[pytest.mark.services, pytest.mark.slow]),
        pytest.param(("postgresql_url", True), marks=pytest.mark.services),
        pytest.param(("mysql_url", False), marks=pytest.mark.services),
        pytest.param(("mysql_url", True), marks=[pytest.mark.services, pytest.mark.slow]),
    ],
    ids=lambda param: f"{param[0]}-worker_by_{'class' if param[1] else 'url'}",
)
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    database, by_class = request.param
    if database == "sqlite":
        url = f"sqlite:///{tmp_path}/queue.db"
    else:
        url = request.getfixturevalue(database)
    with programs_in(tmp_path) as programs:
        lab = Lab(tmp_path, programs, url, by_class)
        yield lab
        lab.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_celery_runs_tasks_countdowns_retries_and_remote_control(lab: Lab) -> None:
    results = [lab.send("add", number, 1) for number in range(20)]
    assert [result.get(timeout=PATIENCE) for result in results] == list(range(1, 21))
    assert set(lab.ledger.count("ran").values()) == {1}
    assert lab.send("fails", "x").get(timeout=PATIENCE) == "third"
    assert lab.ledger.count("try") == {"x": 3}

    sent = time.time()
    lab.send("timed", "now")
    lab.send("timed", "later", countdown=1.5)
    eventually(lambda: lab.ledger.count("timed").total() == 2, "both have run")
    ran = {line.split()[0]: float(line.split()[1]) for line in lab.ledger.count("timed")}
    assert ran["now"] < ran["later"]
    assert ran["later"] - sent >= 1.4

    control = lab.app.control
    assert control.ping(["w1@lab"], timeout=PATIENCE, limit=1) == [{"w1@lab": {"ok": "pong"}}]
    assert control.ping(timeout=1) == [{"w1@lab": {"ok": "pong"}}]
    inspect = control.inspect(["w1@lab"], timeout=PATIENCE, limit=1)
    assert {"add", "timed", "fails"} <= set(inspect.registered()["w1@lab"])
    assert inspect.stats()["w1@lab"]["total"]["add"] == 20
    assert [queue["name"] for queue in inspect.active_queues()["w1@lab"]] == ["celery"]

    lab.worker.stop()
    assert lab.left() == 0


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("lab", [("sqlite", False)], indirect=True, ids=["sqlite"])
def test_what_a_killed_celery_worker_had_not_begun_is_run_by_the_next(
    lab: Lab, tmp_path: Path
) -> None:
    lab.worker.kill_all()
    lab.worker.wait()
    for number in range(10):
        lab.send("add", number, 0)
    assert lab.left() == 10
    with programs_in(tmp_path) as programs:
        again = Lab.__new__(Lab)
        again.__dict__.update(lab.__dict__)
        again.worker = programs.python(
            "-m", "celery", "-A", "lab", "worker", "-l", "INFO", "-c", "1", "--without-mingle",
            "-n", "w2@lab", C_FORCE_ROOT="1",
            PYTHONPATH=f"{Path(__file__).resolve().parent.parent}",
        )  # fmt: skip
        eventually(lambda: lab.ledger.count("ran").total() == 10, "all have run", 60)
        again.worker.stop()
    assert lab.left() == 0
