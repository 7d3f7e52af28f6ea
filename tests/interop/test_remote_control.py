"""Celery's own command line and Flower, with our worker on the other side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.app_folder import AppFolder
from support.celery_client import celery_client
from support.processes import PATIENCE, Program, eventually
from support.servers import free_port
from support.shapes import answer_of, captured, shape

celery = pytest.importorskip("celery", reason="Celery is not installed")

pytestmark = [
    pytest.mark.services,
    pytest.mark.slow,
    pytest.mark.timeout(240),
]

APP = """
    task_worker = BackgroundTaskWorker(app)

    @task_worker.define_task(name="proj.add")
    def add(a, b):
        return a + b

    @task_worker.define_task(name="proj.sleepy")
    def sleepy(seconds):
        ledger.write("sleepy", seconds)
        while not os.path.exists(os.path.join(HERE, "wake")):
            time.sleep(0.02)
        return seconds

    @task_worker.define_task(name="proj.fail")
    def fail():
        raise ValueError("boom", 42)
"""
CELERY_APP = """
import os
from celery import Celery

app = Celery("proj", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
app.conf.update(task_default_queue=os.environ["QUEUE"], broker_connection_retry_on_startup=True)

@app.task(name="proj.add")  # Flower limits only tasks that its own app knows
def add(a, b): ...
"""


class Site:
    """Our worker, and a folder in which Celery's programs run."""

    def __init__(self, url: str, backend: str, folder: Path) -> None:
        self.queue = f"iop-{uuid.uuid4().hex[:8]}"
        self.node = f"w1@{self.queue}"
        self.environment = {"BROKER": url, "BACKEND": backend, "QUEUE": self.queue}
        self.folder = AppFolder(folder, APP)
        (folder / "theirs.py").write_text(CELERY_APP)
        self.settings = {
            "FLASK_TASKER_BROKER_URL": url,
            "FLASK_TASKER_RESULT_BACKEND": backend,
            "FLASK_TASKER_DEFAULT_QUEUE": self.queue,
        }
        self.worker = self.start()
        self._stack = ExitStack()
        self.client = self._stack.enter_context(celery_client(url, backend, self.queue))

    def start(self, *options: str) -> Program:
        worker = self.folder.ready_worker("-n", self.node, "-c", "2", *options, **self.settings)
        eventually(lambda: self.celery("inspect", "ping").returncode == 0, "it answers")
        return worker

    def celery(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run ``celery`` for our worker alone."""
        command = [sys.executable, "-m", "celery", "-A", "theirs", *words]
        if words[0] in ("inspect", "control", "status") and "-d" not in words:
            command += ["-d", self.node, "-t", "5"]
        return subprocess.run(
            command,
            cwd=self.folder.cwd,
            env={**os.environ, **self.environment, "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            timeout=PATIENCE * 2,
        )

    def ask(self, *words: str) -> Any:
        """What our worker answers to Celery's command line, read as JSON."""
        done = self.celery(*words, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        replies = json.loads(done.stdout)
        return (replies[0] if isinstance(replies, list) else replies)[self.node]

    def close(self) -> None:
        self._stack.close()
        self.folder.close()


@pytest.fixture(scope="module", params=["redis", "amqp"])
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    site = Site(
        request.getfixturevalue(f"{request.param}_url"),
        request.getfixturevalue("redis_url"),
        tmp_path_factory.mktemp("interop"),
    )
    yield site
    site.close()


# -- the command line -------------------------------------------------------------------------


def test_status_and_ping_show_our_worker(site: Site) -> None:
    expected = captured("pidbox", "_cli_output")["inspect ping"]["stdout"]
    assert site.celery("inspect", "ping").stdout == expected.replace("w1@cap", site.node)
    status = site.celery("status")
    assert (status.returncode, status.stdout) == (0, f"->  {site.node}: OK\n\n1 node online.\n")


def test_what_celery_asks_has_the_form_it_knows(site: Site) -> None:
    for name in ("stats", "active_queues", "clock", "ping", "report"):
        ours, celerys = shape(site.ask("inspect", name)), shape(answer_of(name))
        if name == "stats":
            assert ours.keys() == celerys.keys()
            assert ours["broker"].keys() == celerys["broker"].keys()
        else:
            assert ours == celerys, name
    assert site.ask("inspect", "registered") == ["proj.add", "proj.fail", "proj.sleepy"]
    assert site.ask("inspect", "conf")["broker_url"].startswith(("redis://", "amqp://"))
    assert site.ask("inspect", "memsample").endswith("MB")
    for name in ("active", "reserved", "scheduled"):
        assert site.ask("inspect", name) == []


def test_celery_sees_what_runs(site: Site) -> None:
    running = site.client.send_task("proj.sleepy", (6,))
    eventually(lambda: site.ask("inspect", "active"), "it runs")
    (active,) = site.ask("inspect", "active")
    assert shape(active) == shape(answer_of("active")[0])
    assert (active["id"], active["args"]) == (running.id, [6])
    found = site.ask("inspect", "query_task", running.id, "unknown")
    assert [(key, word) for key, (word, _) in found.items()] == [(running.id, "active")]
    (site.folder.cwd / "wake").touch()
    assert running.get(timeout=PATIENCE) == 6


#: In this order: some depend on what those before them did.
CONTROL = [
    (("rate_limit", "proj.add", "100/s"), "rate_limit"),
    (("rate_limit", "nope", "1/s"), "rate_limit_unknown"),
    (("rate_limit", "proj.add", "x/y"), "rate_limit_invalid"),
    (("pool_grow", "1"), "pool_grow"),
    (("pool_shrink", "1"), "pool_shrink"),
    (("add_consumer", "extra"), "add_consumer"),
    (("cancel_consumer", "extra"), "cancel_consumer"),
    (("enable_events",), "enable_events"),
    (("enable_events",), "enable_events_again"),
    (("disable_events",), "disable_events"),
    (("autoscale", "4", "2"), "autoscale_not_enabled"),
    (("pool_restart",), "pool_restart_not_enabled"),
    (("terminate", "KILL", "unknown"), "terminate_unknown"),
]


def test_celerys_control_commands_are_answered_as_by_its_own_workers(site: Site) -> None:
    for words, answer in CONTROL:
        assert site.ask("control", *words) == answer_of(answer), words


def test_celery_revokes_our_tasks(site: Site) -> None:
    later = site.client.send_task("proj.add", (1, 2), countdown=20)
    told = site.ask("control", "revoke", later.id)
    assert told == {"ok": f"tasks {{{later.id!r}}} flagged as revoked"}
    assert later.id in site.ask("inspect", "revoked")
    with pytest.raises(celery.exceptions.TaskRevokedError):
        later.get(timeout=PATIENCE)


def test_celery_prints_our_events(site: Site) -> None:
    events = site.folder.python(
        *("-m", "celery", "-A", "theirs", "events", "--dump"), **site.environment
    )
    events.wait_for(rf"^{site.node} .* heartbeat: active=0")
    assert site.ask("control", "enable_events")["ok"]
    result = site.client.send_task("proj.add", (20, 22))
    events.wait_for(rf"task received: proj\.add\({result.id}\) args=\(20, 22\)")
    events.wait_for(rf"task succeeded: proj\.add\({result.id}\).* result=42")
    events.process.terminate()


def test_a_greeting_of_a_celery_worker_is_answered(site: Site) -> None:
    site.client.control.revoke("told-to-newcomers")
    eventually(lambda: "told-to-newcomers" in site.ask("inspect", "revoked"), "it is known")
    told = site.client.control.inspect(destination=[site.node], timeout=5).hello("other@host")
    assert shape(told[site.node]) == shape(answer_of("hello"))
    assert "told-to-newcomers" in told[site.node]["revoked"]


# -- Flower -----------------------------------------------------------------------------------


class Flower:
    """Flower, looking at the site."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.base = f"http://127.0.0.1:{free_port()}"
        port = self.base.rsplit(":", 1)[1]
        self.program = site.folder.python(
            *("-m", "celery", "-A", "theirs", "flower", f"--port={port}", "--address=127.0.0.1"),
            FLOWER_UNAUTHENTICATED_API="true",
            **site.environment,
        )
        eventually(lambda: self.page("/healthcheck")[0] == 200, "Flower is up", PATIENCE * 2)

    def page(self, path: str, **form: str) -> tuple[int, str]:
        """A page, posted to if there is a form."""
        data = urllib.parse.urlencode(form).encode() if form else None
        try:
            with urllib.request.urlopen(self.base + path, data, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def data(self, path: str) -> Any:
        status, text = self.page(path)
        assert status == 200, (path, status, text[-500:])
        return json.loads(text)

    def act(self, path: str, **form: str) -> str:
        """Use a button of Flower's; what it says."""
        status, text = self.page(path, **(form or {"_": ""}))
        assert status == 200, (path, status, text[-500:])
        return text


@pytest.fixture(scope="module")
def flower(site: Site) -> Iterator[Flower]:
    pytest.importorskip("flower", reason="Flower is not installed")
    flower = Flower(site)
    yield flower
    flower.program.close()


@pytest.fixture(scope="module")
def seen(site: Site, flower: Flower) -> str:
    """The id of a task that Flower has seen to its end."""
    eventually(
        lambda: site.node in flower.data("/api/workers?refresh=1"), "Flower knows the worker"
    )

    def seen() -> str | None:
        result = site.client.send_task("proj.add", (1, 2))
        result.get(timeout=PATIENCE)
        time.sleep(0.5)
        task = flower.data("/api/tasks").get(result.id)
        return result.id if task and task["state"] == "SUCCESS" else None

    return eventually(seen, "Flower has seen a task", PATIENCE * 2)


def test_every_page_of_flower_shows(site: Site, flower: Flower, seen: str) -> None:
    for path in (
        "/", "/workers", f"/worker/{site.node}", "/tasks", f"/task/{seen}", "/metrics",
        f"/api/workers?workername={site.node}", "/api/task/types", f"/api/task/info/{seen}",
        f"/api/task/result/{seen}",
    ):  # fmt: skip
        status, text = flower.page(path)
        assert status == 200, (path, text[-500:])
    assert site.node in flower.page(f"/worker/{site.node}")[1]
    assert "proj.add" in flower.page(f"/task/{seen}")[1]
    status, _ = flower.page("/broker")
    assert status == 200


def test_flower_knows_our_worker_as_it_knows_celerys(site: Site, flower: Flower, seen: str) -> None:
    ours = flower.data("/api/workers?refresh=1")[site.node]
    assert {"active_queues", "registered", "conf", "stats"} <= set(ours)
    assert "proj.sleepy" in ours["registered"]
    task = flower.data(f"/api/task/info/{seen}")
    assert (task["worker"], task["result"], task["args"]) == (site.node, "3", "(1, 2)")


def test_the_buttons_of_flower_work(site: Site, flower: Flower, seen: str) -> None:
    node = site.node
    flower.act(f"/api/worker/pool/grow/{node}", n="2")
    eventually(lambda: site.ask("inspect", "stats")["pool"]["max-concurrency"] == 4, "it grew")
    flower.act(f"/api/worker/pool/shrink/{node}", n="2")
    eventually(lambda: site.ask("inspect", "stats")["pool"]["max-concurrency"] == 2, "it shrank")
    flower.act(f"/api/worker/queue/add-consumer/{node}", queue="fl")

    def queues() -> list[str]:
        return [queue["name"] for queue in site.ask("inspect", "active_queues")]

    eventually(lambda: "fl" in queues(), "the queue is read")
    flower.act(f"/api/worker/queue/cancel-consumer/{node}", queue="fl")
    eventually(lambda: "fl" not in queues(), "the queue is read no more")
    flower.act("/api/task/rate-limit/proj.add", workername=node, ratelimit="50/s")
    assert "proj.add [rate_limit=50/s]" in site.ask("inspect", "registered")
    later = site.client.send_task("proj.add", (1, 2), countdown=100)
    flower.act(f"/api/task/revoke/{later.id}")
    eventually(lambda: later.id in site.ask("inspect", "revoked"), "it is revoked")
    sent = json.loads(
        urllib.request.urlopen(
            urllib.request.Request(
                f"{flower.base}/api/task/send-task/proj.add",
                json.dumps({"args": [3, 4], "options": {"queue": site.queue}}).encode(),
            ),
            timeout=PATIENCE,
        ).read()
    )
    result = site.client.AsyncResult(sent["task-id"])
    assert result.get(timeout=PATIENCE) == 7


def test_flower_stops_our_worker(site: Site, flower: Flower, seen: str) -> None:
    flower.act(f"/api/worker/shutdown/{site.node}")
    assert site.worker.wait() == 0
