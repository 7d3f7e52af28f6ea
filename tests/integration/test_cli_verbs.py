"""Every verb of the command line, in this process, on a queue in a SQLite file or in memory."""

from __future__ import annotations

import inspect
import json
import logging
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from flask_taskworker.app import TaskApp
from flask_taskworker.cli import root, taskworker
from flask_taskworker.cli.elsewhere import INSTEAD
from flask_taskworker.transports.sql.engine import database_for
from flask_taskworker.worker import consumer

ROOT = Path(__file__).resolve().parent.parent.parent

MODULE = """
from flask import Flask
from flask_taskworker import BackgroundTaskWorker
app = Flask(__name__, instance_path={folder!r})
app.config.update(TASKER_DEFAULT_QUEUE="verbs", **{settings!r})
task_worker = BackgroundTaskWorker(app)

@task_worker.define_task
def add(a, b=0):
    return a + b

@task_worker.define_task(queue="mail", max_retries=7, name="post.fail")
def fail():
    raise ValueError("no such address")
"""

APART: dict[str, Any] = (
    {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
)


class Shop:
    """A program in the current folder, and the command line that is pointed at it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write()

    def write(self, **settings: Any) -> None:
        text = MODULE.format(folder=str(self.folder), settings=settings)
        (self.folder / "verbs.py").write_text(text)

    def run(self, *words: str, code: int | None = 0, stdin: str | None = None) -> Result:
        """Run a command; None takes any exit code."""
        # Each command is a program of its own: it imports the app anew.
        sys.modules.pop("verbs", None)
        result = CliRunner(**APART).invoke(taskworker, ["-A", "verbs", *words], input=stdin)
        loaded = sys.modules.get("verbs")
        if loaded is not None:
            loaded.task_worker.task_app().close()
        assert result.exception is None or isinstance(result.exception, SystemExit), result
        if code is not None:
            assert result.exit_code == code, result.output + result.stderr
        return result

    def json(self, *words: str, code: int = 0) -> Any:
        """The document that a command prints."""
        return json.loads(self.run(*words, "--json", code=code).stdout)

    def call(self, *words: str) -> str:
        """Send a task; its id."""
        return self.run("-q", "call", *words).stdout.strip()

    def work(self, *words: str) -> Result:
        return self.run("-q", "worker", "--burst", "-P", "solo", "-l", "critical", *words)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(consumer, "BURST_PATIENCE", 0.0)
    monkeypatch.delenv("FLASK_APP", raising=False)
    logger = logging.getLogger("flask_taskworker")
    kept = list(logger.handlers), logger.level, logger.propagate
    yield Shop(tmp_path)
    logger.handlers[:], logger.propagate = kept[0], kept[2]
    logger.setLevel(kept[1])
    sys.modules.pop("verbs", None)
    database_for(f"sqlite:///{tmp_path / 'taskworker.db'}").dispose()


# -- calling and results ---------------------------------------------


def test_a_call_prints_the_id_and_a_result_what_became_of_it(shop: Shop) -> None:
    task_id = shop.call("verbs.add", "-a", "[1, 2]")
    assert len(task_id) == 36
    assert shop.run("result", task_id, code=root.UNKNOWN).stdout == ""
    shop.work()
    assert shop.run("result", task_id).stdout == "3\n"
    found = shop.json("result", task_id)
    assert (found["id"], found["state"], found["result"]) == (task_id, "SUCCESS", 3)


def test_a_text_is_printed_as_it_is(shop: Shop) -> None:
    task_id = shop.call("verbs.add", "-k", '{"a": "x", "b": "y"}')
    shop.work()
    assert shop.run("result", task_id).stdout == "xy\n"


def test_a_failed_task_shows_its_own_traceback_and_nothing_else(shop: Shop) -> None:
    task_id = shop.call("post.fail")
    shop.work()
    result = shop.run("result", task_id, code=root.FAILED)
    assert result.stdout == ""
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("ValueError: no such address\n")
    assert "click" not in result.stderr
    shown = shop.run("result", task_id, "--traceback", code=root.FAILED)
    assert shown.stdout == result.stderr
    found = shop.json("result", task_id, code=root.FAILED)
    assert (found["state"], found["result"]) == ("FAILURE", "ValueError: no such address")


def test_what_is_not_done_has_an_exit_code_of_its_own(shop: Shop) -> None:
    from flask_taskworker.backends.base import TaskRecord

    task_id = shop.call("verbs.add", "-a", "[1]")
    task_app: TaskApp = runpy.run_path("verbs.py")["task_worker"].task_app()
    task_app.backend.store(TaskRecord(task_id, "STARTED"))
    task_app.close()
    result = shop.run("result", task_id, code=root.NOT_READY)
    assert (result.stdout, result.stderr) == ("", f"{task_id}: STARTED, not done yet\n")


def test_a_task_that_only_others_know_is_sent_with_a_note(shop: Shop) -> None:
    result = shop.run("call", "verbs.ad", "-a", "[1]")
    assert "task 'verbs.ad' is not registered. Did you mean 'verbs.add'?" in result.stderr
    assert "sent all the same" in result.stderr
    assert len(result.stdout) == 37
    assert shop.json("queues", "-Q", "verbs")[0]["waiting"] == 1


def test_the_options_of_a_call_are_those_of_apply_async(shop: Shop) -> None:
    words = ("verbs.add", "-a", "[1]", "--queue", "later", "--id", "my-id", "--priority", "9")
    assert shop.call(*words, "--countdown", "100") == "my-id"
    shop.call("verbs.add", "-a", "[1]", "--eta", "2000-01-01T00:00:00Z", "--expires", "60")
    shop.call("verbs.add", "-a", "[1]", "--expires", "2100-01-01T00:00:00+01:00")
    states = {row["name"]: row for row in shop.json("queues")}
    assert (states["later"]["delayed"], states["later"]["waiting"]) == (1, 0)
    assert states["verbs"]["waiting"] + states["verbs"]["delayed"] == 2


def test_a_call_may_wait_for_its_result(shop: Shop) -> None:
    shop.write(TASKER_ALWAYS_EAGER=True, TASKER_RESULT_BACKEND="cache+memory://")
    assert shop.run("-q", "call", "verbs.add", "-a", "[4]", "--wait", "5").stdout == "4\n"
    assert shop.run("call", "post.fail", "--wait", "5", code=root.FAILED).stdout == ""


def test_waiting_in_vain_ends_with_a_code_of_its_own(shop: Shop) -> None:
    result = shop.run("call", "verbs.add", "-a", "[4]", "--wait", "0", code=root.TIMED_OUT)
    assert "was not done within 0" in result.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("call",), "Missing argument 'NAME'"),
        (("call", "verbs.add", "-a", "1"), "1 is no JSON array; write for example '[1, \"two\"]'"),
        (("call", "verbs.add", "-a", "[1"), "'[1' is no JSON ("),
        (("call", "verbs.add", "-k", "[]"), "[] is no JSON object"),
        (("call", "verbs.add", "-a", "[1,2,3]"), "verbs.add"),
        (("call", "verbs.add", "-a", "[1]", "--eta", "soon"), "'soon' is no time; write for"),
        (("call", "verbs.add", "-a", "[1]", "--eta", "2030-01-01"), "has no time zone"),
        (("call", "verbs.add", "-a", "[1]", "--expires", "x"), "'x' is no time"),
        (("call", "verbs.add", "-a", "[1]", "--countdown", "-1"), "must be a number of seconds"),
        (("call", "verbs.add", "-a", "[1]", "--priority", "12"), "from 0 to 9"),
        (("call", "verbs.add", "-a", "[1]", "--queue", ""), "must be a queue name"),
        (("call", "verbs.add", "-a", "[1]", "--serializer", "xml"), "no serializer 'xml'"),
        (("call", "", "-a", "[1]"), "must be a text of 1-255"),
        (("purge", "-X", "verbs,mail"), "no queue is left to empty"),
        (("dead", "replay"), "name some ids, of the message or its task, or say --all"),
        (("dead", "delete", "1", "--all"), "name some ids"),
        (("health",), "nothing says what to probe"),
        (("health", "ftp://x"), "ftp://x cannot be probed"),
        (("health", "redis://x:y"), "the port is no number"),
        (("multi", "start"), "name the workers, or say how many"),
        (("multi", "start", "2", "-c:3", "9"), "an option is meant for '3', but the workers are"),
        (("multi", "stop", "2", "-NOPE"), "there is no signal -NOPE"),
        (("completion", "tcsh"), "'tcsh' is not one of"),
        (("result",), "Missing argument 'TASK_ID'"),
    ],
)
def test_a_mistake_is_explained_and_is_exit_code_2(
    shop: Shop, words: tuple[str, ...], text: str
) -> None:
    result = shop.run(*words, code=root.USAGE)
    assert text in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_results_that_are_switched_off_are_explained(shop: Shop) -> None:
    shop.write(TASKER_RESULT_BACKEND="disabled")
    assert "results are switched off" in shop.run("result", "x", code=root.USAGE).stderr


# -- tasks and queues ---------------------------------------------


def test_tasks_are_listed_with_their_place(shop: Shop) -> None:
    lines = shop.run("tasks").stdout.splitlines()
    file = shop.folder / "verbs.py"
    assert [line.split() for line in lines] == [
        ["name", "queue", "options", "defined"],
        ["post.fail", "mail", "max_retries=7", f"{file}:12"],
        ["verbs.add", "verbs", "-", f"{file}:8"],
    ]
    assert shop.json("tasks")[0]["options"] == {"max_retries": 7}


def test_queues_show_what_is_in_them(shop: Shop) -> None:
    shop.call("verbs.add", "-a", "[1]")
    shop.call("verbs.add", "-a", "[1]", "--countdown", "99")
    lines = [line.split() for line in shop.run("queues").stdout.splitlines()]
    assert lines[0] == ["name", "waiting", "delayed", "unacked", "dead", "consumers", "paused"]
    assert ["verbs", "1", "1", "0", "0", "-", "no"] in lines
    assert ["mail", "0", "0", "0", "0", "-", "no"] in lines
    assert len(shop.json("queues", "-Q", "verbs, other")) == 2


def test_purge_asks_first_and_says_how_many(shop: Shop) -> None:
    for _ in range(3):
        shop.call("verbs.add", "-a", "[1]")
    shop.call("post.fail")
    asked = shop.run("purge", "-X", "mail", code=1, stdin="n\n")
    assert "Delete 3 messages from queue verbs?" in asked.stderr
    assert shop.run("purge", "-X", "mail", stdin="y\n").stdout.endswith(
        "3 messages deleted from queue verbs\n"
    )
    assert shop.run("purge", "-f").stdout == "1 messages deleted from queues verbs, mail\n"
    assert shop.run("purge", "-f", "-Q", "nowhere").stdout.startswith("0 messages")


def test_a_worker_may_purge_first(shop: Shop) -> None:
    task_id = shop.call("verbs.add", "-a", "[1]")
    shop.work("--purge")
    shop.run("result", task_id, code=root.UNKNOWN)


def test_a_paused_queue_hands_out_nothing_until_it_is_resumed(shop: Shop) -> None:
    task_id = shop.call("verbs.add", "-a", "[1]")
    assert shop.run("pause", "verbs").stdout == "queue verbs is paused\n"
    shop.work()
    shop.run("result", task_id, code=root.UNKNOWN)
    assert shop.json("queues", "-Q", "verbs")[0]["paused"] is True
    assert shop.run("resume", "verbs").stdout == "queue verbs is not paused\n"
    shop.work()
    shop.run("result", task_id)


def test_a_broker_that_cannot_pause_says_so(shop: Shop) -> None:
    shop.write(TASKER_ENGINE="filesystem")
    result = shop.run("pause", "verbs", code=root.USAGE)
    assert "filesystem:// cannot pause a queue for all workers" in result.stderr


def test_queues_of_a_simple_broker_show_what_it_can_say(shop: Shop) -> None:
    shop.write(TASKER_ENGINE="filesystem")
    shop.call("verbs.add", "-a", "[1]")
    assert shop.json("queues", "-Q", "verbs") == [
        {
            "name": "verbs", "waiting": 1, "delayed": None, "unacked": None, "dead": 0,
            "consumers": None, "paused": None,
        }
    ]  # fmt: skip
    assert shop.run("purge", "-f").stdout.startswith("1 messages deleted")


# -- dead letters ---------------------------------------------


@pytest.mark.parametrize("engine", ["sqlalchemy", "filesystem"])
def test_dead_letters_are_shown_replayed_and_deleted(shop: Shop, engine: str) -> None:
    shop.write(TASKER_ENGINE=engine)
    first, second = (shop.call("verbs.gone", "-a", f"[{number}]") for number in (1, 2))
    shop.work()
    letters = shop.json("dead", "list")
    assert sorted(letter["task_id"] for letter in letters) == sorted([first, second])
    assert {letter["task"] for letter in letters} == {"verbs.gone"}
    assert {letter["queue"] for letter in letters} == {"verbs"}
    assert all("verbs.gone" in letter["reason"] for letter in letters)
    table = shop.run("dead", "list", "--limit", "1").stdout.splitlines()
    assert len(table) == 2
    assert table[0].split()[:3] == ["id", "queue", "task"]

    assert shop.run("dead", "replay", first).stdout == "1 messages put back\n"
    assert [letter["task_id"] for letter in shop.json("dead", "list")] == [second]
    assert shop.json("queues", "-Q", "verbs")[0]["waiting"] == 1
    missing = shop.run("dead", "delete", second, "no-such-id", code=root.FAILED)
    assert missing.stdout == "1 messages deleted\n"
    assert "1 of the ids" in missing.stderr
    assert shop.json("dead", "list", "-Q", "verbs") == []
    shop.work()  # what was put back was delivered anew, and set aside anew
    (letter,) = shop.json("dead", "list")
    assert letter["task_id"] == first
    assert shop.run("dead", "delete", letter["id"]).stdout == "1 messages deleted\n"
    assert shop.run("dead", "replay", "--all").stdout == "0 messages put back\n"


def test_a_replayed_message_runs_when_a_worker_knows_the_task(shop: Shop) -> None:
    task_id = shop.call("verbs.later", "-a", "[5]")
    shop.work()
    with (shop.folder / "verbs.py").open("a") as program:
        program.write("\n@task_worker.define_task\ndef later(x): return x * 2\n")
    shop.run("dead", "replay", "--all", "-Q", "verbs")
    shop.work()
    assert shop.run("result", task_id).stdout == "10\n"


# -- about the installation ---------------------------------------------


def test_a_report_shows_versions_and_settings_and_no_password(shop: Shop) -> None:
    shop.write(TASKER_RESULT_BACKEND="redis://:s3cret@127.0.0.1/1")
    text = shop.run("report").stdout
    assert "flask-taskworker" in text
    assert "redis://:***@127.0.0.1/1" in text
    assert "s3cret" not in text
    found = shop.json("report")
    assert found["tasks"] == ["post.fail", "verbs.add"]
    assert found["settings"]["default_queue"] == "verbs"


def test_a_shell_knows_the_app_and_its_tasks(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    from flask import current_app

    seen: dict[str, Any] = {}

    def interact(banner: str, local: dict[str, Any], exitmsg: str) -> None:
        seen.update(local, current=current_app._get_current_object())  # type: ignore[attr-defined]

    monkeypatch.setattr("code.interact", interact)
    shop.run("shell", "--python")
    assert seen["current"] is seen["app"]
    assert seen["add"] is seen["tasks"]["verbs.add"]
    assert seen["task_worker"].apps() == [seen["app"]]
    seen.clear()
    shop.run("shell", "--python", "-T")
    assert "add" not in seen


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_shells_can_complete(shop: Shop, name: str) -> None:
    assert "_TASKWORKER_COMPLETE" in shop.run("completion", name).stdout


@pytest.mark.parametrize("name", INSTEAD)
def test_a_command_of_celery_without_a_meaning_names_the_alternative(shop: Shop, name: str) -> None:
    result = shop.run(name, "--any", "thing", code=root.USAGE)
    assert result.stderr == f"Error: there is no '{name}' here: {INSTEAD[name]}.\n"


# -- health ---------------------------------------------


def test_health_probes_a_database_file_without_the_app(shop: Shop) -> None:
    (shop.folder / "verbs.py").write_text("raise SystemExit('the app was loaded')")
    path = shop.folder / "queue.db"
    assert shop.run("health", f"sqlite:///{path}", code=1).stdout == ""
    database_for(f"sqlite:///{path}").connect().close()
    database_for(f"sqlite:///{path}").dispose()
    assert shop.run("health", f"sqlite:///{path}").stdout == f"{path} can be used\n"
    assert shop.json("health", f"taskworker+sqlite:///{path}")["ok"] is True


def test_health_takes_the_broker_from_the_environment(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKER_BROKER_URL", "redis://:s3cret@127.0.0.1:1/0")
    result = shop.run("health", code=1)
    assert result.stderr == "redis://:***@127.0.0.1:1/0 does not answer: Connection refused\n"
    monkeypatch.setenv("FLASK_TASKER_BROKER_URL", "beanstalk://127.0.0.1:1")
    assert "beanstalk://127.0.0.1:1 does not" in shop.run("health", code=1).stderr


def test_health_of_a_worker_that_is_not_there(shop: Shop) -> None:
    result = shop.run("health", "--pidfile", "none.pid", code=1)
    assert result.stderr == "no worker holds none.pid\n"


# -- both word orders, and the options of all ---------------------------------------------


def _invoke(*words: str) -> Result:
    sys.modules.pop("verbs", None)
    return CliRunner(**APART).invoke(taskworker, words, prog_name="taskworker")


@pytest.mark.parametrize(
    "words",
    [
        ("-A", "verbs", "tasks"),
        ("--app=verbs", "tasks"),
        ("-Averbs", "tasks"),
        ("tasks", "-A", "verbs"),
        ("tasks", "--app", "verbs"),
        ("dead", "-A", "verbs", "list"),
        ("dead", "list", "-A", "verbs"),
        ("db", "init", "-A", "verbs"),
        ("-A", "verbs", "--loader=app", "--config", "x", "--skip-checks", "tasks", "-q", "-C"),
    ],
)
def test_shared_options_stand_on_either_side(shop: Shop, words: tuple[str, ...]) -> None:
    result = _invoke(*words)
    assert result.exit_code == 0, result.stderr
    assert "options of a command now stand" not in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("-A", "verbs", "--queues=mail", "--burst", "worker"),
        ("-A", "verbs", "-Q", "mail", "--burst", "worker"),
        ("--burst", "-Qmail", "--app", "verbs", "worker", "-l", "info"),
    ],
)
def test_the_word_order_of_celery_3_works_and_is_mentioned_once(
    shop: Shop, words: tuple[str, ...]
) -> None:
    result = _invoke(*words)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("options of a command now stand after its name") == 1
    assert "queues   mail" in result.stderr


def test_an_unknown_option_stays_an_error(shop: Shop) -> None:
    assert "No such option" in _invoke("-A", "verbs", "--nonsense", "tasks").stderr
    assert "No such command 'nonsense'" in _invoke("-A", "verbs", "nonsense").stderr
    assert _invoke("--", "tasks", "-A", "verbs").exit_code == 0


def test_the_broker_and_the_results_can_be_named_anew(shop: Shop) -> None:
    other = shop.folder / "other.db"
    task_id = shop.call("verbs.add", "-a", "[1]", "-b", f"sqlite:///{other}")
    assert other.exists()
    assert not (shop.folder / "taskworker.db").exists()
    shop.work("-b", f"sqlite:///{other}")
    assert shop.run("-b", f"sqlite:///{other}", "result", task_id).stdout == "1\n"
    shop.run("result", task_id, "--result-backend", f"sqlite:///{other}")
    database_for(f"sqlite:///{other}").dispose()


def test_the_folder_can_be_changed_first(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert _invoke("--workdir", str(shop.folder), "-A", "verbs", "tasks").exit_code == 0


def test_flask_app_names_the_app_for_this_door_as_well(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASK_APP", "verbs:app")
    assert "verbs.add" in _invoke("tasks").stdout


def test_options_come_from_the_environment(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKER_WORKER_QUEUES", "mail")
    monkeypatch.setenv("TASKER_WORKER_BURST", "1")
    monkeypatch.setenv("TASKER_BROKER", "nonsense")
    assert "queues   mail" in _invoke("-A", "verbs", "worker").stderr


# -- the options of Celery's worker ---------------------------------------------

CELERYS = """
-n x@%h -S state -l INFO -O fair --prefetch-multiplier 4 --disable-prefetch -P solo
--pool-start-method spawn --without-gossip --without-mingle --without-heartbeat
--heartbeat-interval 5 -s beat.db --scheduler x:Y --executable python -B -Q verbs -X mail -I json
--umask 022 --loglevel=FATAL
"""


def test_the_options_of_celerys_worker_are_taken(shop: Shop) -> None:
    result = shop.run("worker", *CELERYS.split(), "--burst")
    (note,) = [line for line in result.stderr.splitlines() if line.startswith("Note:")]
    for option in ("--statedb", "--optimization", "--without-gossip", "--beat", "--executable"):
        assert option in note
    assert "--umask" not in note


def test_quiet_leaves_the_note_out(shop: Shop) -> None:
    assert shop.run("worker", "-q", "-O", "fair", "--burst", "-l", "error").stderr == ""


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_green_threads_are_threads(shop: Shop, pool: str) -> None:
    assert "pool     threads" in shop.run("worker", "-P", pool, "--burst").stderr


def test_what_the_worker_cannot_do_is_refused_in_a_line(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flask_taskworker.worker import supervisor

    class Plain(supervisor.Worker):
        def __init__(self, app: Any, *, queues: Any, hostname: Any, burst: Any) -> None:
            raise AssertionError("it must not come to that")

    monkeypatch.setattr(supervisor, "Worker", Plain)
    result = shop.run("worker", "--autoscale", "3,10", "--burst", code=root.USAGE)
    assert result.stderr == "Error: this worker has no --autoscale yet; leave it out\n"


def test_a_pid_file_keeps_a_second_worker_away(shop: Shop) -> None:
    from flask_taskworker.pidfile import PidFile

    held = PidFile("w.pid")
    held.acquire()
    refused = shop.run("worker", "--pidfile", "%n.pid", "-n", "w", "--burst", code=root.USAGE)
    assert "w.pid is held by process" in refused.stderr
    refused = shop.run("worker", "--pidfile", "%n.pid", "-n", "w", "-D", code=root.USAGE)
    assert "runs already, process" in refused.stderr
    held.release()
    Path("w.pid").write_text("1")  # left behind
    shop.work("--pidfile", "%n.pid", "-n", "w")
    assert not Path("w.pid").exists()


# -- the group itself ---------------------------------------------


def _each_command() -> Iterator[click.Command]:
    ctx = click.Context(taskworker)
    for name in taskworker.list_commands(ctx):
        command = taskworker.get_command(ctx, name)
        assert command is not None, name
        yield command
        if isinstance(command, click.Group):
            yield from command.commands.values()


def test_every_command_explains_itself_and_its_options() -> None:
    for command in _each_command():
        assert command.help, command.name
        for param in command.params:
            if isinstance(param, click.Option):
                assert param.help, (command.name, param.name)


def test_every_command_that_reads_has_json() -> None:
    reading = {"queues", "tasks", "report", "result", "list", "health"}
    have = {
        str(command.name)
        for command in _each_command()
        if any("--json" in param.opts for param in command.params)
    }
    assert reading <= have


def test_the_table_of_commands_is_the_commands() -> None:
    found = {name for name, module in root.COMMANDS.items()}
    ctx = click.Context(taskworker)
    for name in sorted(found):
        command = taskworker.get_command(ctx, name)
        assert command is not None
        assert str(command.callback.__module__).endswith(f".cli.{root.COMMANDS[name]}")  # type: ignore[union-attr]


def test_ctrl_c_has_an_exit_code_of_its_own(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flask_taskworker.report.describe", interrupt)
    assert shop.run("report", code=root.INTERRUPTED).stderr == "\n"


def test_the_reference_page_is_up_to_date() -> None:
    page: Callable[[], str] = runpy.run_path(str(ROOT / "docs" / "cli_reference.py"))["page"]
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == page(), (
        "run: python docs/cli_reference.py"
    )
