"""Workers as processes: the command line, the blocking and the background worker, forks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, current_app

from flask_taskworker import BackgroundTaskWorker, BlockingTaskWorker, __version__
from support.app_folder import TESTS, AppFolder
from support.processes import PATIENCE, eventually

LAB = """
    task_worker = {kind}(app)

    @task_worker.define_task(bind=True)
    def work(self, name, seconds=0.0):
        ledger.write("start", name)
        time.sleep(seconds)
        ledger.write("end", name)
        ledger.write("pid", os.getpid())
        ledger.write("host", self.request.hostname)

    @task_worker.define_task(queue="mail")
    def mail(name):
        ledger.write("mail", name)

    @app.post("/send/<int:count>")
    def send(count):
        for number in range(count):
            work.delay(f"n{{number}}")
        return {{"pid": os.getpid()}}
"""
BACKGROUND = LAB.format(kind="BackgroundTaskWorker")
BLOCKING = LAB.format(kind="BlockingTaskWorker")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[AppFolder]:
    lab = AppFolder(tmp_path, BACKGROUND)
    yield lab
    lab.close()


# -- the command line -------------------------------------------------------------------------

DOORS = {
    "flask taskworker": ("-m", "flask", "--app", "lab", "taskworker"),
    "taskworker": ("-m", "flask_taskworker", "-A", "lab"),
}


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return DOORS[request.param]


def test_both_doors_run_tasks_until_sigterm(lab: AppFolder, door: tuple[str, ...]) -> None:
    worker = lab.python(*door, "worker", apart=True)
    worker.wait_for(" ready, reading ")
    lab.send("work.delay('one')")
    lab.wait_for_steps("end", 1)
    began = time.monotonic()
    assert worker.stop(signal.SIGTERM) == 0
    assert time.monotonic() - began < 5
    assert worker.lines == [], "stdout is for data"
    assert re.search(r" stopped$", worker.errors[-1])


def test_the_installed_commands_are_the_same_program(lab: AppFolder) -> None:
    for command in (["flask", "--app", "lab", "taskworker"], ["taskworker", "-A", "lab"]):
        path = Path(sys.executable).parent / command[0]
        done = subprocess.run(
            [path, *command[1:], "--version"],
            cwd=lab.cwd,
            env=os.environ | {"PYTHONPATH": TESTS},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert (done.returncode, done.stdout.strip()) == (
            0,
            f"Flask-TaskWorker, version {__version__}",
        )


def test_the_banner_is_short_and_says_what_runs(lab: AppFolder) -> None:
    worker = lab.worker("-c", "3", "-n", "mailer@%h", "-Q", "mail, celery", "--burst")
    assert worker.wait() == 0, worker.output
    banner = worker.lines[: worker.lines.index("  Ctrl-C to stop") + 1]
    assert len(banner) <= 10
    text = "\n".join(banner)
    assert f"Flask-TaskWorker {__version__}" in text
    assert f"mailer@{os.uname().nodename}" in text
    assert "threads, 3 at once" in text
    assert "mail, celery" in text
    assert "lab.work" in text
    assert str(lab.cwd / "taskworker.db") in text


def test_quiet_shows_no_banner(lab: AppFolder) -> None:
    worker = lab.worker("-q", "-l", "error", "--burst")
    assert (worker.wait(), worker.output) == (0, "")


def test_no_password_is_shown(lab: AppFolder, unique: str) -> None:
    url = f"redis://:{unique}@127.0.0.1:1/0"
    worker = lab.worker(FLASK_TASKER_BROKER_URL=url, FLASK_TASKER_RESULT_BACKEND=url)
    worker.wait_for("no connection to the broker")
    assert worker.stop() == 0
    assert "redis://" in worker.output
    assert unique not in worker.output


def test_burst_runs_what_is_there_and_ends(lab: AppFolder) -> None:
    lab.send("for n in range(12): work.delay(f'n{n}', 0.01)", "mail.delay('m')")
    worker = lab.worker("--burst", "-q")
    assert worker.wait() == 0, worker.output
    assert len(lab.steps("end")) == 12
    assert lab.steps("mail") == ["m"]
    assert lab.waiting() == 0


def test_queues_are_those_that_were_named(lab: AppFolder) -> None:
    lab.send("work.delay('w')", "mail.delay('m')")
    assert lab.worker("--burst", "-q", "-Q", "mail").wait() == 0
    assert (lab.steps("mail"), lab.steps("end")) == (["m"], [])
    assert lab.waiting() == 1


@pytest.mark.parametrize(
    ("options", "most"), [(("-c", "3"), 3), (("-c", "1"), 1), (("-P", "solo"), 1)]
)
def test_as_many_tasks_run_at_once_as_was_asked(
    lab: AppFolder, options: tuple[str, ...], most: int
) -> None:
    lab.send("for n in range(6): work.delay(f'n{n}', 0.1)")
    assert lab.worker("--burst", "-q", *options).wait() == 0
    running = peak = 0
    for step, _ in lab.ledger.lines():
        running += {"start": 1, "end": -1}.get(step, 0)
        peak = max(peak, running)
    assert peak == most
    assert len(lab.steps("end")) == 6


def test_tasks_see_the_node_name(lab: AppFolder) -> None:
    lab.send("work.delay('w')")
    assert lab.worker("--burst", "-q", "-n", "blue").wait() == 0
    assert lab.steps("host") == [f"blue@{os.uname().nodename}"]


@pytest.mark.parametrize(
    ("level", "shown", "hidden"),
    [
        ("debug", ["starts", "succeeded", "ready"], []),
        ("INFO", ["succeeded", "ready"], ["starts"]),
        ("warning", [], ["succeeded", "ready"]),
    ],
)
def test_the_log_level_is_what_was_asked(
    lab: AppFolder, level: str, shown: list[str], hidden: list[str]
) -> None:
    lab.send("work.delay('w')")
    worker = lab.worker("--burst", "-q", "-l", level)
    assert worker.wait() == 0
    assert [word for word in shown if word not in worker.output] == []
    assert [word for word in hidden if word in worker.output] == []


def test_the_root_logger_is_left_alone(lab: AppFolder) -> None:
    lab.write(
        BACKGROUND,
        """
        import logging

        @task_worker.define_task
        def report():
            root = logging.getLogger()
            ledger.write("root", f"{root.level} {len(root.handlers)}")
        """,
    )
    lab.send("report.delay()")
    assert lab.worker("--burst", "-l", "debug").wait() == 0
    assert lab.steps("root") == ["30 0"]


# -- errors of the command line ---------------------------------------------------------------

PLAIN = "from flask import Flask\napp = Flask(__name__)\n"
FAULTY = """
from flask import Flask
from flask_taskworker import BackgroundTaskWorker
app = Flask(__name__)
app.config.update(TASKER_ENGINE="rabbit", TASKER_CONCURRENCY=0, TASKER_LOOP_INTERVAL="x")
task_worker = BackgroundTaskWorker(app)
"""
ERRORS: dict[str, tuple[tuple[str, ...], int, list[str]]] = {
    "an app without a task worker": (
        ("flask_taskworker", "-A", "plain", "worker"),
        2,
        ["'plain' has a Flask app but no task worker", "task_worker = BackgroundTaskWorker(app)"],
    ),
    "the same by flask": (
        ("flask", "--app", "plain", "taskworker", "worker"),
        2,
        ["'plain' has a Flask app but no task worker", "init_app(app)"],
    ),
    "no such module": (
        ("flask_taskworker", "-A", "lap", "worker"),
        2,
        ["no module 'lap'", "Did you mean 'lab'?"],
    ),
    "no such attribute": (
        ("flask_taskworker", "-A", "lab:nothing", "worker"),
        2,
        ["'lab' has no 'nothing'"],
    ),
    "a module that fails": (
        ("flask_taskworker", "-A", "broken", "worker"),
        2,
        ["importing 'broken' failed", "broken.py:1", "ZeroDivisionError"],
    ),
    "a module that needs another": (
        ("flask_taskworker", "-A", "needy", "worker"),
        2,
        ["'needy' was found", "no_such_module"],
    ),
    "no app to be found": (
        ("flask_taskworker", "worker"),
        2,
        ["taskworker -A module:app worker"],
    ),
    "all faults of the configuration": (
        ("flask_taskworker", "-A", "faulty", "worker"),
        2,
        ["3 faults", "TASKER_ENGINE = 'rabbit'", "TASKER_CONCURRENCY = 0", "TASKER_LOOP_INTERVAL"],
    ),
    "the same faults by flask": (
        ("flask", "--app", "faulty", "taskworker", "worker"),
        2,
        ["3 faults", "TASKER_ENGINE = 'rabbit'", "TASKER_CONCURRENCY = 0", "TASKER_LOOP_INTERVAL"],
    ),
    "no queue": (("flask_taskworker", "-A", "lab", "worker", "-Q", ","), 2, ["-Q names no queue"]),
    "no such pool": (("flask_taskworker", "-A", "lab", "worker", "-P", "x"), 2, ["'x' is not one"]),
    "no concurrency": (("flask_taskworker", "-A", "lab", "worker", "-c", "0"), 2, ["'-c'"]),
    "no such option": (("flask_taskworker", "-A", "lab", "worker", "--brust"), 2, ["--burst"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do_in_a_line(lab: AppFolder, case: str) -> None:
    (lab.cwd / "plain.py").write_text(PLAIN)
    (lab.cwd / "broken.py").write_text("1 / 0\n")
    (lab.cwd / "needy.py").write_text("import no_such_module\n")
    (lab.cwd / "faulty.py").write_text(FAULTY)
    (module, *arguments), code, texts = ERRORS[case]
    program = lab.python("-m", module, *arguments, apart=True)
    assert program.wait() == code, program.output
    assert program.lines == []
    errors = "\n".join(program.errors)
    assert [text for text in texts if text not in errors] == [], errors
    assert "Traceback" not in errors


# -- signals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_running_tasks_end(lab: AppFolder, number: signal.Signals) -> None:
    worker = lab.ready_worker("-c", "1")
    lab.send("work.delay('running', 0.7)", "work.delay('waiting')")
    lab.wait_for_steps("start", 1)
    assert worker.stop(number) == 0, worker.output
    assert lab.steps("end") == ["running"]
    assert lab.waiting() == 1


def test_the_second_signal_stops_at_once_and_loses_nothing(lab: AppFolder) -> None:
    worker = lab.ready_worker()
    lab.send("work.delay('long', 60)")
    lab.wait_for_steps("start", 1)
    worker.send(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):  # it waits for the task
        worker.process.wait(0.3)
    began = time.monotonic()
    worker.send(signal.SIGINT)
    worker.wait()
    assert time.monotonic() - began < 3
    assert "goes back to the queue" in worker.output
    assert lab.waiting() == 1


def test_what_outlives_the_drain_time_goes_back(lab: AppFolder) -> None:
    worker = lab.ready_worker(FLASK_TASKER_DRAIN_TIMEOUT="0.3")
    lab.send("work.delay('long', 60)")
    lab.wait_for_steps("start", 1)
    began = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - began < 5
    assert lab.waiting() == 1


# -- BlockingTaskWorker -----------------------------------------------------------------------


def test_the_blocking_worker_runs_until_a_signal_and_ends_what_it_holds(lab: AppFolder) -> None:
    lab.write(
        BLOCKING,
        """
        if __name__ == "__main__":
            work.delay("sent before")
            task_worker.start()
            ledger.write("returned", "from start")
        """,
    )
    program = lab.python("lab.py")
    lab.wait_for_steps("end", 1)
    lab.send("work.delay('running', 0.7)")
    lab.wait_for_steps("start", 2)
    assert program.running
    assert lab.steps("returned") == []
    assert program.stop(signal.SIGTERM) == 0, program.output
    assert lab.steps("end") == ["sent before", "running"]
    assert lab.steps("returned") == ["from start"]


def test_the_blocking_worker_ends_by_stop_from_elsewhere(tmp_path: Path) -> None:
    app = Flask("blocking", instance_path=str(tmp_path))
    task_worker = BlockingTaskWorker(app)
    ran = threading.Event()
    task = task_worker.define_task(name="set")(ran.set)
    runner = threading.Thread(target=task_worker.start)
    runner.start()
    task.delay()
    assert ran.wait(PATIENCE)
    task_worker.stop()
    runner.join(PATIENCE)
    assert not runner.is_alive()
    task_worker.task_app().close()


# -- BackgroundTaskWorker ---------------------------------------------------------------------


def threads_of_ours() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("taskworker")}


@pytest.fixture
def background(tmp_path: Path) -> Iterator[Callable[..., BackgroundTaskWorker]]:
    before = threads_of_ours()
    made: list[BackgroundTaskWorker] = []

    def make(*apps: Flask) -> BackgroundTaskWorker:
        task_worker = BackgroundTaskWorker()
        for app in apps:
            task_worker.init_app(app)
        made.append(task_worker)
        return task_worker

    yield make
    for task_worker in made:
        task_worker.stop(0)
        for app in task_worker.apps():
            task_worker.task_app(app).close()
    eventually(lambda: not threads_of_ours() - before, "no thread is left")


def test_start_and_stop_may_be_called_again_and_again(background: Any, tmp_path: Path) -> None:
    task_worker = background(Flask("again", instance_path=str(tmp_path)))
    task = task_worker.define_task(name="double")(lambda n: 2 * n)
    task_worker.stop()
    for _ in range(2):
        task_worker.start()
        task_worker.start()
        assert len([t for t in threads_of_ours() if t.name == "taskworker"]) == 1
        assert task.delay(21).get(timeout=PATIENCE) == 42
        task_worker.stop()
        task_worker.stop()
        assert not [t for t in threads_of_ours() if t.name == "taskworker"]
    waiting = task.delay(1)
    assert not waiting.ready()


def test_start_returns_at_once_even_when_the_broker_is_away(
    background: Any, tmp_path: Path
) -> None:
    app = Flask("away", instance_path=str(tmp_path))
    app.config.update(TASKER_BROKER_URL="amqp://127.0.0.1:1//", TASKER_RESULT_BACKEND="disabled")
    task_worker = background(app)
    began = time.monotonic()
    task_worker.start()
    assert time.monotonic() - began < 1
    began = time.monotonic()
    task_worker.stop()
    assert time.monotonic() - began < 5


def test_each_app_has_a_worker_and_settings_of_its_own(background: Any, tmp_path: Path) -> None:
    apps = []
    for name, concurrency in (("shop", 1), ("blog", 3)):
        app = Flask(name, instance_path=str(tmp_path / name))
        app.config["TASKER_CONCURRENCY"] = concurrency
        apps.append(app)
    task_worker = background(*apps)

    @task_worker.define_task(name="who")
    def who() -> str:
        return current_app.name

    task_worker.start()
    handles = {}
    for app in apps:
        with app.app_context():
            handles[app.name] = [who.delay() for _ in range(3)]
    for name, sent in handles.items():
        assert [handle.get(timeout=PATIENCE) for handle in sent] == [name] * 3
    states = [task_worker.state(app) for app in apps]
    assert [state.worker.pool.size for state in states] == [1, 3]
    for app in apps:
        assert (Path(app.instance_path) / "taskworker.db").exists()
    task_worker.stop()
    assert [state.thread.is_alive() for state in states] == [False, False]


def test_a_worker_that_ended_leaves_nothing_open(background: Any, tmp_path: Path) -> None:
    app = Flask("tidy", instance_path=str(tmp_path))
    task_worker = background(app)
    task = task_worker.define_task(name="one")(lambda: 1)

    def cycle() -> int:
        task_worker.start()
        task.delay().get(timeout=PATIENCE)
        task_worker.stop()
        eventually(lambda: not threads_of_ours(), "its threads end")
        return len(os.listdir("/proc/self/fd"))

    first = cycle()
    assert [cycle() for _ in range(3)] == [first] * 3


def test_a_task_still_running_when_the_program_ends_runs_again(lab: AppFolder) -> None:
    lab.write(
        BACKGROUND,
        """
        if __name__ == "__main__":
            app.config["TASKER_DRAIN_TIMEOUT"] = 0.2
            task_worker.start()
            work.delay("long", 60)
            while not ledger.count("start"):
                time.sleep(0.01)
        """,
    )
    program = lab.python("lab.py", FLASK_TASKER_DRAIN_TIMEOUT="0.2")
    assert program.wait() == 0, program.output
    assert lab.waiting() == 1


# -- the reloader -----------------------------------------------------------------------------

SERVERS = {
    "python app.py": ("lab.py",),
    "flask run --debug": ("-m", "flask", "--app", "lab", "run", "--debug", "--port", "0"),
}
SERVE = """
    ledger.write("import", os.getpid())
    task_worker.start()
    if __name__ == "__main__":
        app.run(debug=True, port=0)
"""


def post(address: str, path: str) -> Any:
    request = urllib.request.Request(address + path, method="POST")
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.load(answer)


@pytest.mark.parametrize("server", SERVERS)
def test_under_the_reloader_one_process_runs_the_tasks(lab: AppFolder, server: str) -> None:
    lab.write(BACKGROUND, SERVE)
    program = lab.python(*SERVERS[server])
    address = program.wait_for(r"Running on (http://\S+)")[1]
    served_by = str(post(address, "/send/20")["pid"])
    assert set(lab.wait_for_steps("pid", 20)) == {served_by}
    assert lab.query("SELECT count(DISTINCT pid) FROM taskworker_consumer") == [(1,)]

    lab.write(BACKGROUND, SERVE, "# changed")
    eventually(lambda: lab.steps("import")[-1] not in ("", served_by), "the app is loaded anew")

    def answer() -> Any:
        try:
            return post(address, "/send/20")
        except OSError:
            return None

    served_by = str(eventually(answer, "the new process serves")["pid"])
    assert set(lab.wait_for_steps("pid", 40)[20:]) == {served_by}
    program.stop(signal.SIGINT)


# -- forks ------------------------------------------------------------------------------------

FORK = """
    import sys, threading
    from flask_taskworker.transports.sql import engine

    def in_children(count, function):
        pids = []
        for _ in range(count):
            pid = os.fork()
            if pid == 0:
                try:
                    function()
                except BaseException as exc:
                    print("child failed:", repr(exc), flush=True)
                    sys.exit(1)
                sys.exit(0)
            pids.append(pid)
        return pids

    def join(pids):
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print("children", codes, flush=True)
"""
TRANSPORTS = {
    "sqlite": None,
    "postgresql": "postgresql_url",
    "mysql": "mysql_url",
    "redis": "redis_url",
    "amqp": "amqp_url",
}


@pytest.fixture(
    params=[
        pytest.param(name, id=name, marks=[pytest.mark.services] if fixture else [])
        for name, fixture in TRANSPORTS.items()
    ]
)
def broker(request: pytest.FixtureRequest, unique: str) -> dict[str, str]:
    """The environment that chooses a broker, and a queue of this test's own."""
    fixture = TRANSPORTS[request.param]
    environment = {"FLASK_TASKER_DEFAULT_QUEUE": unique}
    if fixture is not None:
        environment["FLASK_TASKER_BROKER_URL"] = request.getfixturevalue(fixture)
    return environment


def test_a_forked_child_uses_no_connection_of_its_parent(
    lab: AppFolder, broker: dict[str, str]
) -> None:
    """Parent and children talk at once: a shared socket would mix up their answers."""
    lab.write(
        BACKGROUND,
        FORK,
        """
    @task_worker.define_task
    def echo(value):
        return value

    def talk():
        me = os.getpid()
        for number in range(20):
            assert echo.delay([me, number]).get(timeout=20) == [me, number]

    def talk_together():
        ledger.write("there", os.getpid())
        while ledger.count("there").total() < 4:
            time.sleep(0.001)
        talk()

    if __name__ == "__main__":
        task_worker.start()
        talk()
        pids = in_children(3, talk_together)
        talk_together()
        join(pids)
        talk()
        print("parent done", flush=True)
    """,
    )
    program = lab.python("lab.py", **broker)
    assert program.wait(60) == 0, program.output
    assert "children [0, 0, 0]" in program.lines, program.output
    assert "parent done" in program.lines
    assert "Traceback" not in program.output


def test_forked_children_run_workers_of_their_own(lab: AppFolder, broker: dict[str, str]) -> None:
    lab.write(
        BACKGROUND,
        FORK,
        """
    def serve():
        task_worker.start()
        ledger.write("child", os.getpid())
        while ledger.count("end").total() < 40:
            time.sleep(0.01)

    if __name__ == "__main__":
        work.delay("before the fork")
        pids = in_children(2, serve)
        while ledger.count("child").total() < 2:
            time.sleep(0.01)
        for number in range(39):
            work.delay(f"n{number}", 0.02)
        join(pids)
    """,
    )
    program = lab.python("lab.py", FLASK_TASKER_CONCURRENCY="2", **broker)
    assert program.wait(60) == 0, program.output
    assert "children [0, 0]" in program.lines, program.output
    ends = lab.ledger.count("end")
    assert len(ends) == 40
    assert set(ends.values()) == {1}
    assert set(lab.steps("pid")) <= set(lab.steps("child"))
    assert len(set(lab.steps("pid"))) == 2, "both took part"


def test_a_child_of_a_process_with_a_worker_starts_its_own(lab: AppFolder) -> None:
    lab.write(
        BACKGROUND,
        FORK,
        """
    def serve():
        task_worker.start()
        ledger.write("child", os.getpid())
        work.delay("in the child", 0.05)
        while not ledger.count("stop"):
            time.sleep(0.01)

    if __name__ == "__main__":
        task_worker.start()
        work.delay("first")
        while not ledger.count("end"):
            time.sleep(0.01)
        pids = in_children(1, serve)
        while not ledger.count("child"):
            time.sleep(0.01)
        while len(ledger.count("pid")) < 2:
            work.delay("more", 0.01)
            time.sleep(0.005)
        ledger.write("stop", "child")
        join(pids)
        work.delay("last")
        while not ledger.count("end")["last"]:
            time.sleep(0.01)
        print("parent's worker goes on", flush=True)
    """,
    )
    # A writer that others do not let through at once is not what this is about.
    patient = {"FLASK_TASKER_PUBLISH_TIMEOUT": "30", "FLASK_TASKER_DURABILITY": "normal"}
    program = lab.python("lab.py", **patient)
    assert program.wait(60) == 0, program.output
    assert "children [0]" in program.lines, program.output
    assert "parent's worker goes on" in program.lines
