"""The command line: what it runs, what it says, and how it ends."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from flask import Flask

from flask_taskworker import BackgroundTaskWorker, __version__
from flask_taskworker.cli import taskworker
from flask_taskworker.cli.root import UNAVAILABLE, USAGE
from flask_taskworker.cli.worker import banner
from flask_taskworker.queues import known_queues
from flask_taskworker.worker import consumer
from flask_taskworker.worker.consumer import Consumer
from flask_taskworker.worker.supervisor import Worker
from support import make_app, make_task_app

MODULE = """
from flask import Flask
from flask_taskworker import BackgroundTaskWorker
app = Flask("shop")
app.config.update(TASKER_DEFAULT_QUEUE="cli-tests", {settings})
task_worker = BackgroundTaskWorker(app)
done = []
@task_worker.define_task
def work(x):
    done.append(x)
@task_worker.define_task(queue="cli-mail")
def mail(x):
    done.append(-x)
"""


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """The command sets up the log; here it is put back."""
    logger = logging.getLogger("flask_taskworker")
    kept = list(logger.handlers), logger.level, logger.propagate
    yield
    for handler in logger.handlers:
        if handler not in kept[0]:
            handler.close()
    logger.handlers[:], logger.propagate = kept[0], kept[2]
    logger.setLevel(kept[1])


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Writes a program into the current folder and imports nothing yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("FLASK_APP", raising=False)

    def write(settings: str = 'TASKER_ENGINE="memory"') -> None:
        (tmp_path / "cli_program.py").write_text(MODULE.format(settings=settings))

    yield write
    sys.modules.pop("cli_program", None)


#: Both streams apart; click does so by itself from 8.2 on.
APART: dict[str, Any] = (
    {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
)


def run(*arguments: str) -> Result:
    return CliRunner(**APART).invoke(taskworker, arguments, prog_name="taskworker")


def test_the_version_is_shown() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.output == f"Flask-TaskWorker, version {__version__}\n"


@pytest.mark.parametrize("arguments", [("--help",), ("worker", "--help")])
def test_help_needs_no_app(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    assert "Usage: taskworker" in result.output


def test_a_burst_runs_what_is_there_and_ends(module: Any) -> None:
    module()
    sys.path.insert(0, str(Path.cwd()))
    import cli_program  # type: ignore[import-not-found]

    handles = [cli_program.work.delay(1), cli_program.mail.delay(2), cli_program.work.delay(3)]
    result = run("-A", "cli_program", "worker", "--burst", "-P", "solo", "-l", "warning")
    assert result.exit_code == 0, result.output
    assert sorted(cli_program.done) == [-2, 1, 3]
    assert all(handle.successful() for handle in handles)
    assert "queues   cli-tests, cli-mail" in result.stderr
    assert result.stdout == ""
    cli_program.task_worker.task_app().close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-A", "zzz", "worker"), "Error: there is no module 'zzz'"),
        (("-A", "cli_program:nope", "worker"), "Error: module 'cli_program' has no 'nope'"),
        (("-A", "cli_program", "worker", "-Q", " , "), "Error: -Q names no queue; write for"),
        (("-A", "cli_program", "worker", "-c", "0"), "Invalid value for '-c' / '--concurrency'"),
        (("-A", "cli_program", "worker", "-c", "many"), "'many' is neither a number of 1 or"),
        (("-A", "cli_program", "worker", "-P", "fibers"), "Invalid value for '-P' / '--pool'"),
        (("-A", "cli_program", "worker", "-P", "custom"), "this worker has no pool 'custom'"),
        (("-A", "cli_program", "worker", "-X", "cli-tests,cli-mail"), "Error: -X leaves no queue"),
        (("-A", "cli_program", "worker", "--autoscale", "9,x"), "'9,x' is not MOST,LEAST"),
        (("-A", "cli_program", "worker", "--umask", "9"), "--umask '9' is no octal number"),
        (("-A", "cli_program", "worker", "--uid", "nobody-here"), "there is no user 'nobody-here'"),
        (("-A", "cli_program", "worker", "--gid", "nobody-here"), "there is no group 'nobody-here"),
        (("-A", "cli_program", "worker", "-f", "no/x.log"), "the log file no/x.log cannot be"),
        (("-A", "cli_program", "worker", "--pidfile", "no/x"), "the pid file no/x cannot be"),
        (("-A", "cli_program", "-b", "nonsense", "worker"), "TASKER_BROKER_URL"),
        (("--workdir", "/no/such", "worker"), "'/no/such' does not exist"),
        (("-A", "cli_program", "worker", "-l", "loud"), "Invalid value for '-l' / '--loglevel'"),
        (("worker",), "Error: Could not locate a Flask application"),
        (("wrker",), "No such command 'wrker'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], words: str, module: Any
) -> None:
    module()
    result = run(*arguments)
    assert result.exit_code == USAGE == 2
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_faults_of_the_settings_are_shown_together(module: Any) -> None:
    module('TASKER_ENGINE="memory", TASKER_CONCURRENCY="x", TASKER_LEASE=-1')
    result = run("-A", "cli_program", "worker")
    assert result.exit_code == USAGE
    assert "2 faults in the configuration:" in result.stderr
    assert "TASKER_CONCURRENCY" in result.stderr
    assert "TASKER_LEASE" in result.stderr


def test_a_broker_that_cannot_be_reached_has_an_exit_code_of_its_own(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flask_taskworker import BrokerUnavailableError

    def away(self: Consumer) -> None:
        raise BrokerUnavailableError("broker amqp://guest:***@h// cannot be used: refused")

    monkeypatch.setattr(Consumer, "run", away)
    module()
    result = run("-A", "cli_program", "worker", "--quiet")
    assert result.exit_code == UNAVAILABLE == 75
    assert result.stderr.endswith("\nError: broker amqp://guest:***@h// cannot be used: refused\n")


def test_the_same_commands_are_under_flask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumer, "BURST_PATIENCE", 0.0)
    app = make_app()
    BackgroundTaskWorker(app)
    app.cli.add_command(taskworker)
    result = app.test_cli_runner(**APART).invoke(
        args=["taskworker", "worker", "--burst", "-P", "solo"]
    )
    assert result.exit_code == 0, result.output
    assert "tasks    0 (none: is the module with the tasks imported by the app?)" in result.stderr


def test_under_flask_an_app_without_a_worker_is_explained() -> None:
    app = Flask("plain")
    app.cli.add_command(taskworker)
    result = app.test_cli_runner(**APART).invoke(args=["taskworker", "worker"])
    assert result.exit_code == USAGE
    assert "'plain' has a Flask app but no task worker. Add:" in result.stderr


def test_the_log_of_the_app_and_of_the_root_stay_as_they_are(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    before = list(root.handlers), root.level
    module()
    monkeypatch.setattr(consumer, "BURST_PATIENCE", 0.0)
    run("-A", "cli_program", "worker", "--burst", "-P", "solo", "-q", "-l", "DEBUG")
    run("-A", "cli_program", "worker", "--burst", "-P", "solo", "-q")
    logger = logging.getLogger("flask_taskworker")
    assert (list(root.handlers), root.level) == before
    ours = [handler for handler in logger.handlers if handler.get_name() == "taskworker-cli"]
    assert len(ours) == 1
    assert logger.level == logging.INFO


def test_a_banner_is_short_and_shows_no_password() -> None:
    room = make_task_app(TASKER_ENGINE="amqp", TASKER_BROKER_URL="amqp://guest:s3cret@10.0.0.1//")
    for number in range(12):
        room.task_worker.define_task(name=f"task{number:02}", queue="mail")(lambda: None)
    process = Worker(room.task_app, concurrency=3, hostname="mail@%h")
    lines = banner(process).splitlines()
    assert len(lines) <= 10
    assert lines[0] == f"Flask-TaskWorker {__version__}"
    text = "\n".join(lines)
    assert "s3cret" not in text
    assert "amqp://guest:***@10.0.0.1//" in text
    assert "pool     threads, 3 at once" in text
    assert "tasks    12 (task00, task01, " in text
    assert text.count("task0") == 8
    process._waker.close()


def test_a_worker_reads_the_queues_that_tasks_name() -> None:
    room = make_task_app(TASKER_DEFAULT_QUEUE="main")
    for name, queue in (("a", "mail"), ("b", "mail"), ("c", "audit"), ("d", "main")):
        room.task_worker.define_task(name=name, queue=queue)(lambda: None)
    assert known_queues(room.task_app) == ["main", "audit", "mail"]
