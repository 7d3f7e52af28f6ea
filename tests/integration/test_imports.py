"""Importing the package costs little: what an app does not use is not loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    "kombu", "sqlalchemy", "redis", "amqp", "celery", "flask_taskworker.worker",
    "flask_taskworker.canvas",
)  # fmt: skip

LOADED = """
import sys
{before}
print(*[name for name in {heavy!r} if name in sys.modules])
"""


def loaded_by(program: str, root: Path, environment: dict[str, str]) -> set[str]:
    """The heavy modules that a program has loaded in the end."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOADED.format(before=program, heavy=HEAVY)],
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


DEFINE = """
from flask import Flask
from flask_taskworker import BackgroundTaskWorker
app = Flask("shop")
task_worker = BackgroundTaskWorker(app)
@task_worker.define_task(queue="mail", max_retries=5)
def send(to): ...
assert send.name == "__main__.send" and send("a") is None
"""


@pytest.mark.parametrize(
    "program",
    ["import flask_taskworker", DEFINE + "task_worker.stop()"],
    ids=["import", "define"],
)
def test_nothing_heavy_is_loaded_before_it_is_used(
    program: str, root: Path, child_environment: dict[str, str]
) -> None:
    assert loaded_by(program, root, child_environment) == set()


def test_sending_loads_what_it_needs_and_not_the_worker(
    root: Path, child_environment: dict[str, str]
) -> None:
    program = DEFINE.replace('"shop")', '"shop"); app.config["TASKER_ENGINE"] = "memory"')
    loaded = loaded_by(program + 'send.delay("a")', root, child_environment)
    assert "kombu" in loaded  # so the test above would notice
    assert not loaded & {"flask_taskworker.worker", "sqlalchemy", "redis", "celery"}
