"""The options of the command line that concern processes, through both doors, to their effect."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_taskworker.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from support.app_folder import AppFolder
from support.processes import PATIENCE, Program, eventually

pytestmark = pytest.mark.timeout(180)

APP = """
    import flask_taskworker.logs

    task_worker = BackgroundTaskWorker(app)
    log = flask_taskworker.logs.get_task_logger(__name__)

    @task_worker.define_task(bind=True)
    def look(self):
        log.warning("looking around")
        config = task_worker.task_app().config
        return [os.getpid(), config.drain_timeout, config.broker_url, config.result_backend]

    @task_worker.define_task
    def stays(name, deaf=False):
        ledger.write("start", name)
        while True:
            try:
                time.sleep(600)
            except SoftTimeLimitExceeded:
                if not deaf:
                    raise

    @task_worker.define_task
    def grows():
        bytearray(300_000_000)
        return os.getpid()

    @task_worker.define_task
    def waits(name):
        ledger.write("start", name)
        time.sleep(1)
"""
DOORS = {
    "flask taskworker": ("-m", "flask", "--app", "lab", "taskworker"),
    "taskworker": ("-m", "flask_taskworker", "-A", "lab"),
}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[AppFolder]:
    lab = AppFolder(tmp_path, APP)
    yield lab
    lab.close()


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return DOORS[request.param]


def stats(lab: AppFolder, door: tuple[str, ...], *options: str) -> dict[str, Any]:
    """What ``inspect stats`` shows of the one worker."""
    program = lab.python(*door, *options, "-q", "inspect", "stats", "--json", apart=True)
    assert program.wait() == 0, program.output
    (answer,) = json.loads("".join(program.lines)).values()
    assert isinstance(answer, dict)
    return answer


def children(worker: Program) -> dict[str, list[str]]:
    """The lines of the log by process, as far as they are of a task."""
    found: dict[str, list[str]] = {}
    for line in worker.lines:
        entry = json.loads(line)
        if "task_id" in entry:
            found.setdefault(entry["task_id"], []).append(entry["message"])
    return found


def test_children_have_the_settings_and_the_log_of_the_command_line(
    lab: AppFolder, door: tuple[str, ...]
) -> None:
    broker, results = f"sqlite:///{lab.cwd}/other.db", f"sqlite:///{lab.cwd}/results.db"
    options = ("-b", broker, "--result-backend", results)
    worker = lab.python(
        *(*door, *options, "worker", "-P", "prefork", "-c", "auto"),
        *("--drain-timeout", "7", "--log-format", "json"),
    )
    worker.wait_for(" ready, reading ")
    names = lab.load(FLASK_TASKER_BROKER_URL=broker, FLASK_TASKER_RESULT_BACKEND=results)
    handle = names["look"].delay()
    pid, drain_timeout, *urls = handle.get(timeout=PATIENCE)
    assert pid != worker.pid
    assert drain_timeout == 7
    assert [url.rpartition("/")[2] for url in urls] == ["other.db", "results.db"]
    pool = stats(lab, door, *options)["pool"]
    assert pool["max-concurrency"] == len(os.sched_getaffinity(0))
    assert pid in pool["processes"]
    assert worker.stop() == 0
    said = children(worker)[handle.id]  # every line is JSON, those of the child too
    assert "looking around" in said
    assert any(re.match(r"task lab\.look\[.*\] succeeded in ", line) for line in said), said


def test_limits_for_all_tasks_hold(lab: AppFolder, door: tuple[str, ...]) -> None:
    limits = ("--time-limit", "2", "--soft-time-limit", "1")
    worker = lab.python(*door, "worker", "-P", "processes", "-c", "2", *limits)
    worker.wait_for(" ready, reading ")
    stays = lab.load()["stays"]
    soft, hard = stays.delay("soft"), stays.delay("hard", deaf=True)
    with pytest.raises(SoftTimeLimitExceeded):
        soft.get(timeout=PATIENCE)
    with pytest.raises(TimeLimitExceeded):
        hard.get(timeout=PATIENCE)
    assert stats(lab, door)["pool"]["timeouts"] == [1, 2]


def test_children_are_replaced_and_autoscaled_as_asked(
    lab: AppFolder, door: tuple[str, ...]
) -> None:
    worker = lab.python(
        *(*door, "worker", "-P", "prefork", "--autoscale", "3,1"),
        *("--max-tasks-per-child", "2", "--max-memory-per-child", "250000"),
    )
    worker.wait_for(" ready, reading ")
    names = lab.load()
    pids = [names["look"].delay().get(timeout=PATIENCE)[0] for _ in range(4)]
    assert len(set(pids)) == 2, "two runs each"
    large = names["grows"].delay().get(timeout=PATIENCE)
    worker.wait_for(rf"child {large} has used \d+ KiB, more than 250000; it is replaced")
    assert stats(lab, door)["autoscaler"] | {"current": 1} == {
        "max": 3, "min": 1, "current": 1, "qty": 0,
    }  # fmt: skip
    handles = [names["waits"].delay(f"w{n}") for n in range(6)]
    eventually(lambda: stats(lab, door)["pool"]["max-concurrency"] == 3, "it has grown")
    for handle in handles:
        handle.get(timeout=PATIENCE)
