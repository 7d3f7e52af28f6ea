"""``inspect``, ``control``, ``status`` and ``events`` as programs, through both doors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.app_folder import AppFolder
from support.processes import Program, eventually
from support.shapes import captured

NODE = "w1@cap"
TASKS = """
    task_worker = BackgroundTaskWorker(app)

    @task_worker.define_task(name="proj.add")
    def add(a, b):
        return a + b

    @task_worker.define_task(name="proj.fail")
    def fail():
        raise ValueError("boom", 42)
"""
OUTPUT = captured("pidbox", "_cli_output")


class Site(AppFolder):
    """A worker named as the one whose answers were captured, and commands for it."""

    def run(self, *words: str, door: str = "taskworker") -> Program:
        """Run a command to its end."""
        module = {"taskworker": "flask_taskworker", "flask": "flask"}[door]
        before = ["taskworker"] if door == "flask" else []
        program = self.python(
            "-m", module, "-A" if door == "taskworker" else "--app", "lab", *before, *words,
            apart=True,
        )  # fmt: skip
        program.wait()
        return program


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("remote"), TASKS)
    site.ready_worker("-n", NODE, "-c", "2")
    eventually(lambda: site.run("status").process.returncode == 0, "it answers")
    yield site
    site.close()


@pytest.mark.parametrize(
    "command",
    [
        "inspect ping", "inspect active", "inspect active_queues", "control add_consumer extra3",
        "control cancel_consumer extra3", "control pool_grow 1", "control pool_shrink 1",
        "control rate_limit proj.add 5/s", "status",
    ],
)  # fmt: skip
def test_the_output_is_celerys_to_the_letter(site: Site, command: str) -> None:
    program = site.run(*command.split(), "-d", NODE, "-t", "10")
    assert program.process.returncode == 0
    assert program.lines == OUTPUT[command]["stdout"].splitlines()
    assert program.errors == []


@pytest.mark.parametrize("command", ["inspect ping", "status"])
def test_flasks_door_opens_as_well(site: Site, command: str) -> None:
    program = site.run(*command.split(), "-d", NODE, "-t", "10", door="flask")
    assert program.lines == OUTPUT[command]["stdout"].splitlines()


def test_json_is_one_document(site: Site) -> None:
    asked = site.run("inspect", "ping", "--json", "-d", NODE)
    assert json.loads("\n".join(asked.lines)) == {NODE: {"ok": "pong"}}
    told = site.run("control", "enable_events", "-j", "-d", NODE)
    assert NODE in json.loads("\n".join(told.lines))[0]
    status = site.run("status", "-j")
    assert json.loads("\n".join(status.lines)) == {NODE: {"ok": "pong"}}


def test_nobody_who_answers_has_a_code_of_its_own(site: Site) -> None:
    for words in (("inspect", "ping"), ("control", "pool_grow"), ("status",)):
        program = site.run(*words, "-d", "nobody@cap", "-t", "0.3")
        assert program.process.returncode == OUTPUT["inspect ping -d nobody@cap"]["rc"]
        assert program.errors == ["Error: No nodes replied within time constraint"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["control", "nonsense"], "Command nonsense not recognized. Available control commands"),
        (["inspect", "pool_grow"], "Command pool_grow not recognized"),
        (["control", "pool_grow", "many"], "n of 'pool_grow' cannot be 'many'"),
        (["control", "pool_grow", "1", "2"], "Command 'pool_grow' takes arguments: [N=1]"),
        (["inspect"], "Missing argument"),
        (["inspect", "ping", "-t", "0"], "Invalid value for '-t'"),
    ],
)
def test_a_wrong_command_is_named_before_anybody_is_asked(
    site: Site, words: list[str], says: str
) -> None:
    program = site.run(*words)
    assert program.process.returncode == 2
    assert says in " ".join(program.errors)


def test_all_commands_are_listed(site: Site) -> None:
    for verb in ("inspect", "control"):
        listed = {line.split()[0] for line in site.run(verb, "--list").lines[1:] if line[2] != " "}
        celerys = OUTPUT[f"{verb} --list"]["stdout"].splitlines()[1:]
        assert listed >= {line.split()[0] for line in celerys if line[2:3].strip()}


def test_a_broker_that_is_not_there_has_a_code_of_its_own(site: Site) -> None:
    program = site.run("status", "-b", "redis://127.0.0.1:1/0")
    assert program.process.returncode == 75


def test_events_are_printed_a_line_each(site: Site) -> None:
    task_app = site.load()["task_worker"].task_app()
    site.run("control", "enable_events")
    lines = site.python("-m", "flask_taskworker", "-A", "lab", "events")
    objects = site.python("-m", "flask_taskworker", "-A", "lab", "events", "--json", apart=True)
    for program in (lines, objects):
        program.wait_for("heartbeat")
    result = task_app.registry["proj.fail"].delay()
    lines.wait_for(rf"{NODE} \[.*\] task failed: proj\.fail\({result.id}\) .*ValueError")
    objects.wait_for(rf'"uuid": "{result.id}".*"type": "task-failed"')
    for program in (lines, objects):
        program.process.terminate()
    assert all(json.loads(line)["type"] for line in objects.lines)


def test_revoked_and_paused_from_the_command_line(site: Site, tmp_path: Path) -> None:
    task_app = site.load()["task_worker"].task_app()
    result = task_app.registry["proj.add"].apply_async((1, 2), countdown=1000)
    assert site.run("control", "revoke", result.id).process.returncode == 0
    assert result.state == "REVOKED"
    assert site.run("control", "pause_queue", "celery").process.returncode == 0
    assert task_app.control.paused_queues() == {"celery"}
    assert site.run("control", "resume_queue", "celery").process.returncode == 0
    assert task_app.control.paused_queues() == set()
