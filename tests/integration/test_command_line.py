"""The command line as programs: both doors, daemons, reloading, several workers, probes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flask_taskworker.pidfile import holder
from support.app_folder import AppFolder
from support.processes import PATIENCE, Program, eventually

APP = """
    task_worker = BackgroundTaskWorker(app)

    @task_worker.define_task
    def work(name):
        ledger.write("work", name)
        return name
"""
DOORS = {
    "flask taskworker": ("-m", "flask", "--app", "lab", "taskworker"),
    "taskworker": ("-m", "flask_taskworker", "-A", "lab"),
}


class Lab(AppFolder):
    """A folder with an app; its daemons end with the test."""

    def tool(self, *words: str, door: str = "taskworker", **environment: str) -> Program:
        """Run a command to its end."""
        program = self.python(*DOORS[door], *words, apart=True, **environment)
        program.wait()
        return program

    def close(self) -> None:
        for path in self.cwd.glob("*.pid"):
            pid = holder(str(path))
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                eventually(lambda path=path: holder(str(path)) is None, "the daemon is gone")
        super().close()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path, APP)
    yield lab
    lab.close()


@pytest.mark.parametrize("door", DOORS)
def test_both_doors_lead_to_the_same_commands(lab: Lab, door: str) -> None:
    called = lab.tool("call", "lab.work", "-a", '["one"]', door=door)
    assert called.process.returncode == 0, called.output
    (task_id,) = called.lines
    assert [line.split()[:2] for line in lab.tool("queues", door=door).lines] == [
        ["name", "waiting"],
        ["celery", "1"],
    ]
    waiting = lab.tool("result", task_id, door=door)
    assert (waiting.process.returncode, waiting.lines) == (4, [])
    worker = lab.tool("-q", "worker", "--burst", "-l", "error", door=door)
    assert (worker.process.returncode, worker.output) == (0, "")
    result = lab.tool("result", task_id, "--json", door=door)
    assert json.loads(result.output)["result"] == "one"
    failed = lab.tool("health", "redis://127.0.0.1:1", door=door)
    assert (failed.process.returncode, failed.lines) == (1, [])


def test_an_unreachable_broker_and_a_silent_result_have_codes_of_their_own(lab: Lab) -> None:
    away = lab.tool("call", "lab.work", "-a", '["x"]', "-b", "redis://127.0.0.1:1/0")
    assert away.process.returncode == 75
    assert away.errors[-1].startswith("Error: broker redis://127.0.0.1:1/0 cannot be used: ")
    late = lab.tool("call", "lab.work", "-a", '["x"]', "--wait", "0.1")
    assert late.process.returncode == 124


def test_a_detached_worker_works_and_logs_until_it_is_stopped(lab: Lab) -> None:
    options = ("-n", "w1", "--pidfile", "%n.pid", "-f", "%n@%h.log", "--log-format", "json")
    started = lab.tool("worker", "-D", *options)
    assert started.process.returncode == 0, started.output
    pid_file = str(lab.cwd / "w1.pid")
    pid = eventually(lambda: holder(pid_file), "the worker has its pid file")
    lab.send("work.delay('one')")
    assert lab.wait_for_steps("work", 1) == ["one"]
    again = lab.tool("worker", "-D", *options)
    assert again.process.returncode == 2
    assert f"runs already, process {pid}" in again.output
    assert lab.tool("health", "--pidfile", "w1.pid").lines == [f"worker {pid} is at work"]
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: not os.path.exists(pid_file), "the worker removed its pid file")
    lines = (lab.cwd / f"w1@{os.uname().nodename}.log").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert any("ready, reading" in entry["message"] for entry in entries)
    assert all(entry.keys() >= {"time", "level", "logger", "message"} for entry in entries)


def test_what_is_wrong_with_a_detached_worker_is_said_at_once(lab: Lab) -> None:
    lab.write("import nothing_of_this_name")
    started = lab.tool("worker", "-D", "--pidfile", "w.pid", "-f", "w.log")
    assert started.process.returncode == 2
    assert "nothing_of_this_name" in started.output
    assert not (lab.cwd / "w.log").exists()


def test_a_killed_worker_leaves_a_file_that_keeps_nobody_away(lab: Lab) -> None:
    worker = lab.ready_worker("--pidfile", "w.pid")
    assert int((lab.cwd / "w.pid").read_text()) == worker.pid
    worker.stop(signal.SIGKILL)
    assert lab.tool("health", "--pidfile", "w.pid").process.returncode == 1
    other = lab.ready_worker("--pidfile", "w.pid")
    assert holder(str(lab.cwd / "w.pid")) == other.pid
    assert other.stop() == 0
    assert not (lab.cwd / "w.pid").exists()


def test_several_workers_start_restart_and_stop_together(lab: Lab) -> None:
    started = lab.tool("multi", "start", "2", "-l", "info", "-c:2", "1")
    assert started.process.returncode == 0, started.output
    assert [line.split(": started, process ")[0].split("@")[0] for line in started.lines] == [
        "worker1",
        "worker2",
    ]
    lab.send("work.delay('one')")
    lab.wait_for_steps("work", 1)
    before = [holder(str(lab.cwd / f"worker{n}.pid")) for n in (1, 2)]
    restarted = lab.tool("multi", "restart", "2", "-l", "info", "-c:2", "1")
    assert restarted.process.returncode == 0, restarted.output
    after = [holder(str(lab.cwd / f"worker{n}.pid")) for n in (1, 2)]
    assert None not in after
    assert not set(before) & set(after)
    killed = lab.tool("multi", "kill", "worker2")
    assert killed.lines[0].endswith(": killed")
    stopped = lab.tool("multi", "stop", "2")
    assert stopped.process.returncode == 1
    assert stopped.lines[0].endswith(": stopped")
    assert stopped.errors[0].endswith(": does not run")
    assert "pool     threads, 1 at once" in (lab.cwd / "worker2.log").read_text()


def test_a_worker_that_cannot_start_among_several_is_named_with_the_reason(lab: Lab) -> None:
    lab.write("import nothing_of_this_name")
    started = lab.tool("multi", "start", "solo")
    assert started.process.returncode == 1
    assert "nothing_of_this_name" in started.output


def test_a_changed_program_runs_anew_and_a_broken_one_waits_for_the_next_change(lab: Lab) -> None:
    worker = lab.worker("--reload", "-q", "--pidfile", "w.pid")
    worker.wait_for(" ready, reading ")
    lab.send("work.delay('one')")
    lab.wait_for_steps("work", 1)

    lab.write(APP.replace('"work", name', '"changed", name'))
    eventually(lambda: sum(" ready, reading " in line for line in worker.lines) > 1, "a new start")
    lab.send("work.delay('two')")
    assert lab.wait_for_steps("changed", 1) == ["two"]

    lab.write(APP, "def broken(:")
    worker.wait_for("Waiting for a change")
    lab.write(APP.replace('"work", name', '"mended", name'))
    lab.send("work.delay('three')")
    assert lab.wait_for_steps("mended", 1) == ["three"]
    assert worker.running
    assert holder(str(lab.cwd / "w.pid")) == worker.pid
    assert worker.stop() == 0


def test_modules_can_be_included(lab: Lab) -> None:
    (lab.cwd / "more.py").write_text(
        "from lab import *\n@task_worker.define_task\ndef extra(): ...\n"
    )
    worker = lab.tool("worker", "--burst", "-I", "more")
    assert "tasks    2 (lab.work, more.extra)" in worker.output


def test_health_answers_without_the_app_and_without_heavy_modules(lab: Lab) -> None:
    lab.write("raise SystemExit('the app was loaded')")
    program = (
        "import sys; from flask_taskworker.cli import taskworker\n"
        "try: taskworker(['health'])\n"
        "except SystemExit as end: print(end.code)\n"
        "print([m for m in ('sqlalchemy', 'kombu', 'redis', 'psycopg') if m in sys.modules])"
    )
    path = lab.cwd / "taskworker.db"
    path.touch()
    done = lab.python("-c", program, FLASK_TASKER_DATABASE_URI=f"sqlite:///{path}")
    assert done.wait() == 0
    assert done.lines == [f"{path} can be used", "0", "[]"]


@pytest.mark.parametrize(
    "service", ["redis_url", "amqp_url", "postgresql_url", "mysql_url", "beanstalk_url"]
)
@pytest.mark.services
def test_health_knows_real_servers(service: str, request: pytest.FixtureRequest) -> None:
    from flask_taskworker.health import of_broker

    found = of_broker(request.getfixturevalue(service), PATIENCE)
    assert found.ok, found


def test_a_worker_whose_loop_stands_still_is_not_well(lab: Lab) -> None:
    worker = lab.ready_worker("--pidfile", "w.pid")
    os.kill(worker.pid, signal.SIGSTOP)
    old = time.time() - 1000
    os.utime(lab.cwd / "w.pid", (old, old))
    found = lab.tool("health", "--pidfile", "w.pid")
    assert found.process.returncode == 1
    assert "is alive, but stands still" in found.output
    os.kill(worker.pid, signal.SIGCONT)
    assert worker.stop() == 0
