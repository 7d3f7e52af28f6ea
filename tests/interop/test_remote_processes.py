"""Celery's command line and Flower steer our worker with child processes."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.app_folder import AppFolder
from support.processes import PATIENCE, eventually
from support.servers import free_port
from support.shapes import answer_of, shape

celery = pytest.importorskip("celery", reason="Celery is not installed")

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(240)]

APP = """
    task_worker = BackgroundTaskWorker(app)

    @task_worker.define_task(name="proj.sleepy")
    def sleepy(name, seconds=600):
        ledger.write("start", name)
        time.sleep(seconds)
"""
CELERY_APP = """
from celery import Celery

app = Celery("proj", broker={url!r}, backend={backend!r})
app.conf.update(task_default_queue={queue!r}, broker_connection_retry_on_startup=True)

@app.task(name="proj.sleepy")  # Flower limits only tasks that its own app knows
def sleepy(name, seconds=600): ...
"""


class Site:
    """Our worker, Celery's command line, and Flower."""

    def __init__(self, url: str, backend: str, folder: Path) -> None:
        queue = f"iop-{uuid.uuid4().hex[:8]}"
        self.node = f"w1@{queue}"
        self.folder = AppFolder(folder, APP)
        (folder / "theirs.py").write_text(CELERY_APP.format(url=url, backend=backend, queue=queue))
        settings = {
            "FLASK_TASKER_BROKER_URL": url,
            "FLASK_TASKER_RESULT_BACKEND": backend,
            "FLASK_TASKER_DEFAULT_QUEUE": queue,
        }
        options = ("-P", "processes", "-c", "2", "-E", "-n", self.node)
        self.worker = self.folder.ready_worker(*options, **settings)
        self.client = celery.Celery("proj", broker=url, backend=backend, set_as_current=False)
        self.client.conf.task_default_queue = queue
        self.flower = f"http://127.0.0.1:{free_port()}"
        port = self.flower.rsplit(":", 1)[1]
        self.folder.python(
            *("-m", "celery", "-A", "theirs", "flower", f"--port={port}", "--address=127.0.0.1"),
            FLOWER_UNAUTHENTICATED_API="true",
        )
        eventually(lambda: self.page("/api/workers?refresh=1")[0] == 200, "Flower is up", 90)
        eventually(
            lambda: self.node in json.loads(self.page("/api/workers?refresh=1")[1]),
            "Flower knows the worker",
        )

    def started(self, name: str) -> Any:
        """A task that runs for long, sent by Celery."""
        result = self.client.send_task("proj.sleepy", (name,))
        eventually(lambda: name in self.folder.steps("start"), f"{name} runs")
        return result

    def celery(self, *words: str) -> Any:
        """What our worker answers to Celery's command line."""
        command = [sys.executable, "-m", "celery", "-A", "theirs", *words]
        done = subprocess.run(
            [*command, "-d", self.node, "-t", "5", "--json"],
            cwd=self.folder.cwd,
            capture_output=True,
            text=True,
            timeout=PATIENCE * 2,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        replies = json.loads(done.stdout)
        return (replies[0] if isinstance(replies, list) else replies)[self.node]

    def page(self, path: str, **form: str) -> tuple[int, str]:
        """A page of Flower's, posted to if there is a form."""
        data = urllib.parse.urlencode(form).encode() if form else None
        try:
            with urllib.request.urlopen(self.flower + path, data, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""


@pytest.fixture(scope="module", params=["redis", "amqp"])
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    pytest.importorskip("flower", reason="Flower is not installed")
    url = request.getfixturevalue(f"{request.param}_url")
    site = Site(url, request.getfixturevalue("redis_url"), tmp_path_factory.mktemp("interop"))
    yield site
    site.client.close()
    site.folder.close()


def test_stats_are_those_of_celerys_prefork(site: Site) -> None:
    pool = site.celery("inspect", "stats")["pool"]
    assert shape(pool) == shape(answer_of("stats")["pool"])


def test_celery_terminates_a_task(site: Site) -> None:
    result = site.started("by-celery")
    told = site.celery("control", "terminate", "KILL", result.id)
    assert told == {"ok": f"terminate: {result.id}"}
    with pytest.raises(celery.exceptions.TaskRevokedError, match="terminated"):
        result.get(timeout=PATIENCE)


def test_flowers_terminate_button_ends_a_task(site: Site) -> None:
    result = site.started("by-flower")
    status, text = site.page(f"/api/task/revoke/{result.id}?terminate=true", signal="SIGTERM")
    assert status == 200, text
    with pytest.raises(celery.exceptions.TaskRevokedError, match="terminated"):
        result.get(timeout=PATIENCE)

    def seen() -> Any:
        status, text = site.page(f"/api/task/info/{result.id}")
        return status == 200 and json.loads(text)["state"] == "REVOKED"

    eventually(seen, "Flower shows it as revoked")


def test_flowers_time_limit_button_sets_limits(site: Site) -> None:
    limits = {"workername": site.node, "soft": "1", "hard": "30"}
    status, text = site.page("/api/task/timeout/proj.sleepy", **limits)
    assert (status, json.loads(text)) == (200, {"message": "time limits set successfully"})
    with pytest.raises(celery.exceptions.SoftTimeLimitExceeded):
        site.started("limited").get(timeout=PATIENCE)


def test_flowers_restart_button_replaces_the_children(site: Site) -> None:
    def children() -> set[int]:
        return set(site.celery("inspect", "stats")["pool"]["processes"])

    before = children()
    status, text = site.page(f"/api/worker/pool/restart/{site.node}", _="")
    assert status == 200, text
    eventually(lambda: len(children()) == 2 and not children() & before, "all are new", 60)
