"""What tasks can do to the process they run in: it costs them, and nobody else.

Child processes are killed, exit, crash and hang; the worker lives, says what happened, settles
the message by the policy of the task, and loses nothing.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_taskworker.dead_letters import listing
from flask_taskworker.transports.sql import dead_letters
from flask_taskworker.transports.sql.engine import database_for
from support.app_folder import AppFolder
from support.processes import Program, eventually

pytestmark = pytest.mark.timeout(120)

APP = """
    import ctypes, signal, subprocess, sys, threading

    task_worker = BlockingTaskWorker(app)
    define = task_worker.define_task

    @define
    def work(name, seconds=0.0):
        ledger.write("start", name)
        time.sleep(seconds)
        ledger.write("end", name)
        return name

    @define
    def pid():
        ledger.write("pid", os.getpid())
        return os.getpid()

    @define
    def killed():
        ledger.write("start", "killed")
        os.kill(os.getpid(), signal.SIGKILL)

    @define(reject_on_worker_lost=False)
    def killed_for_good():
        os.kill(os.getpid(), signal.SIGKILL)

    @define
    def crashes():
        ledger.write("start", "crashes")
        ctypes.string_at(0)

    @define
    def exits():
        ledger.write("start", "exits")
        os._exit(0)

    @define
    def leaves():
        sys.exit(3)

    @define
    def forks():
        if os.fork() == 0:
            ledger.write("forked", os.getpid())
            return "of the fork"
        os.wait()
        return "of the task"

    @define
    def leaks_threads():
        for _ in range(20):
            threading.Thread(target=time.sleep, args=(600,)).start()
        return "leaked"

    @define
    def is_loud():
        for _ in range(5000):
            print("x" * 200)
        return "loud"

    @define
    def closes_everything():
        ledger.write("start", "closes_everything")
        os.closerange(3, 1000)

    @define
    def recurses():
        return recurses.run()

    class Unpicklable(Exception):
        def __init__(self, lock, text):
            super().__init__(lock, text)

        def __reduce__(self):
            raise TypeError("not this one")

    @define
    def raises_badly():
        raise Unpicklable(threading.Lock(), "bad")

    @define
    def returns_badly():
        return threading.Lock()

    @define
    def stops():
        raise StopIteration("no more")

    @define
    def scribbles():
        ledger.write("start", "scribbles")
        import gc, socket
        for thing in gc.get_objects():
            if isinstance(thing, socket.socket) and thing.family == socket.AF_UNIX:
                try:
                    thing.send(b"nonsense" * 10)
                except OSError:
                    pass
        time.sleep(600)
"""


class Lab(AppFolder):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, APP)

    def processes(self, *options: str, **environment: str) -> Program:
        """A worker with two child processes."""
        return self.ready_worker("-P", "processes", "-c", "2", *options, **environment)

    def result_of(self, call: str, **environment: str) -> Any:
        """Send a call from here, wait for its end, and return the record of it."""
        loaded = self.load(**environment)
        handle = eval(call, loaded)
        return loaded["task_worker"].task_app().backend.wait(handle.id, timeout=30)

    def pids(self) -> set[int]:
        return {int(pid) for pid in self.steps("pid")}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def alive(pid: int) -> bool:
    """Whether a process runs, and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def descendants(pid: int) -> list[int]:
    """The processes below another, zombies included."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


# -- what a task does to itself ---------------------------------------------------------------

SURVIVED = {
    "leaves": ("FAILURE", {"exc_type": "SystemExit", "exc_message": [3]}),
    "forks": ("SUCCESS", "of the task"),
    "leaks_threads": ("SUCCESS", "leaked"),
    "is_loud": ("SUCCESS", "loud"),
    "recurses": ("FAILURE", {"exc_type": "RecursionError"}),
    "raises_badly": ("FAILURE", {"exc_type": "Unpicklable"}),
    "returns_badly": ("FAILURE", {"exc_type": "EncodeError"}),
    "stops": ("FAILURE", {"exc_type": "StopIteration", "exc_message": ["no more"]}),
}


@pytest.mark.parametrize("pool", ["threads", "processes"])
def test_what_a_task_does_costs_nobody_else(lab: Lab, pool: str) -> None:
    worker = lab.ready_worker("-P", pool, "-c", "2", "-q")
    for call, (state, result) in SURVIVED.items():
        record = lab.result_of(f"{call}.delay()")
        assert record.status == state, call
        if isinstance(result, dict):
            assert result.items() <= record.result.items()
        else:
            assert record.result == result
        assert lab.result_of(f"work.delay('after {call}')").status == "SUCCESS"
    assert worker.running
    for pid in lab.steps("forked"):
        eventually(lambda pid=pid: not alive(int(pid)), "the fork is gone")
    assert worker.stop(timeout=60) == 0


DEADLY = {
    "killed": r"signal 9 \(SIGKILL\)",
    "crashes": r"signal 11 \(SIGSEGV\)",
    "exits": "exitcode 0",
    "closes_everything": r"exitcode 1|signal 9 \(SIGKILL\)",
    "scribbles": r"signal 9 \(SIGKILL\)",
}


@pytest.mark.parametrize("call", DEADLY)
def test_a_task_that_ends_its_process_is_parked_in_the_end(lab: Lab, call: str) -> None:
    worker = lab.processes("-q", FLASK_TASKER_MAX_DELIVERIES="3")
    lab.send(f"{call}.delay()", *[f"work.delay('n{n}')" for n in range(20)])
    eventually(lambda: len(lab.ledger.count("end")) == 20, "the others are done")
    database = database_for(lab.url)
    eventually(lambda: len(dead_letters.list(database)) == 1, "it is parked")
    assert lab.ledger.count("start")[call] == 3
    worker.wait_for(f"Worker exited prematurely: (?:{DEADLY[call]}) Job: ")
    assert lab.result_of("work.delay('still here')").status == "SUCCESS"
    assert worker.stop() == 0


def test_without_requeue_a_lost_process_is_a_failure_as_celery_writes_it(lab: Lab) -> None:
    worker = lab.processes("-q")
    record = lab.result_of("killed_for_good.delay()")
    assert record.status == "FAILURE"
    assert record.result["exc_type"] == "WorkerLostError"
    assert record.result["exc_module"] == "billiard.exceptions"
    (text,) = record.result["exc_message"]
    assert text == "Worker exited prematurely: signal 9 (SIGKILL) Job: 1."
    assert worker.stop() == 0


BROKERS = [pytest.param(name, marks=pytest.mark.services) for name in ("redis", "amqp")]


@pytest.mark.parametrize("broker", BROKERS)
def test_a_task_that_kills_its_process_is_parked_on_other_brokers_too(
    lab: Lab, broker: str, request: pytest.FixtureRequest, unique: str
) -> None:
    settings = {
        "FLASK_TASKER_BROKER_URL": request.getfixturevalue(f"{broker}_url"),
        "FLASK_TASKER_RESULT_BACKEND": f"sqlite:///{lab.cwd / 'results.db'}",
        "FLASK_TASKER_DEFAULT_QUEUE": unique,
        "FLASK_TASKER_MAX_DELIVERIES": "3",
    }
    worker = lab.processes("-q", **settings)
    loaded = lab.load(**settings)
    loaded["killed"].delay()
    task_app = loaded["task_worker"].task_app()
    (letter,) = eventually(lambda: listing(task_app, unique), "it is parked")
    assert "delivered 3 times" in letter.reason
    # A delivery that goes back unstarted counts too, where the broker does the counting.
    assert lab.ledger.count("start")["killed"] in (2, 3)
    for n in range(3):
        assert lab.result_of(f"work.delay('n{n}')", **settings).status == "SUCCESS"
    record = lab.result_of("killed_for_good.delay()", **settings)
    assert record.result["exc_type"] == "WorkerLostError"
    assert worker.stop() == 0
    database_for(settings["FLASK_TASKER_RESULT_BACKEND"]).dispose()


# -- kills ------------------------------------------------------------------------------------


def lost(lab: Lab, count: int) -> set[str]:
    return {f"n{n}" for n in range(count)} - set(lab.ledger.count("end"))


def test_children_killed_in_the_middle_of_500_tasks_lose_none(lab: Lab) -> None:
    lab.send("for n in range(500): work.delay(f'n{n}', 0.01)", *["pid.delay()"] * 4)
    worker = lab.processes("-q")
    for kill in range(1, 6):
        eventually(lambda aim=kill * 60: len(lab.ledger.count("end")) >= aim, "some are done")
        below = descendants(worker.pid)
        children = [pid for pid in below if os.getpgid(pid) == pid]
        os.kill(children[0], signal.SIGKILL)
    eventually(lambda: not lost(lab, 500), "all are done", 60)
    eventually(lambda: lab.query("SELECT count(*) FROM taskworker_message") == [(0,)], "settled")
    assert sum(lab.ledger.count("end").values()) <= 505
    assert worker.stop() == 0


def test_a_parent_killed_in_the_middle_of_500_tasks_loses_none(lab: Lab) -> None:
    lab.send("for n in range(500): work.delay(f'n{n}', 0.01)")
    worker = lab.processes("-q")
    eventually(lambda: len(lab.ledger.count("end")) >= 150, "150 tasks are done")
    below = descendants(worker.pid)
    assert len(below) == 3
    os.kill(worker.pid, signal.SIGKILL)
    worker.process.wait()
    eventually(lambda: not any(map(alive, below)), "no child stays", 5)
    assert lost(lab, 500), "it was killed in the middle"
    second = lab.processes("-q")
    eventually(lambda: not lost(lab, 500), "all are done", 60)
    eventually(lambda: lab.query("SELECT count(*) FROM taskworker_message") == [(0,)], "settled")
    assert second.stop() == 0


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
@pytest.mark.parametrize("what", ["parent", "group"])
def test_no_process_outlives_its_worker(lab: Lab, what: str, busy: bool) -> None:
    worker = lab.processes("-q")
    lab.send("work.delay('first')", *(["work.delay('long', 600)"] if busy else []))
    lab.wait_for_steps("start", 2 if busy else 1)
    eventually(lambda: len(descendants(worker.pid)) == 3, "the template and two children")
    below = descendants(worker.pid)
    if what == "group":
        worker.kill_all()
    else:
        os.kill(worker.pid, signal.SIGKILL)
    worker.process.wait()
    eventually(lambda: not any(map(alive, below)), "no child stays", 5)


def test_a_killed_template_is_replaced(lab: Lab) -> None:
    worker = lab.processes("-q")
    assert lab.result_of("work.delay('before')").status == "SUCCESS"
    below = descendants(worker.pid)
    (template,) = (pid for pid in below if os.getpgid(pid) != pid)
    os.kill(template, signal.SIGKILL)
    assert lab.result_of("work.delay('after')").status == "SUCCESS"
    eventually(lambda: not any(map(alive, below)), "the old ones are gone", 5)
    assert worker.stop() == 0


def test_the_end_of_a_worker_leaves_neither_process_nor_zombie(lab: Lab) -> None:
    worker = lab.processes("-q")
    lab.send("killed_for_good.delay()", "pid.delay()")
    lab.wait_for_steps("pid", 1)
    eventually(lambda: len([pid for pid in descendants(worker.pid) if alive(pid)]) == 3, "replaced")
    eventually(lambda: len(descendants(worker.pid)) == 3, "no zombie is left")
    below = descendants(worker.pid)
    assert worker.stop() == 0
    assert not any(map(alive, below))


# -- limits -----------------------------------------------------------------------------------


def test_what_a_task_started_ends_with_its_time(lab: Lab) -> None:
    lab.write(
        APP,
        """
        @define(time_limit=1)
        def starts():
            child = subprocess.Popen(["sleep", "600"])
            ledger.write("grandchild", child.pid)
            child.wait()
        """,
    )
    worker = lab.processes("-q")
    record = lab.result_of("starts.delay()")
    assert record.result["exc_type"] == "TimeLimitExceeded"
    (pid,) = lab.steps("grandchild")
    eventually(lambda: not alive(int(pid)), "it is gone", 5)
    assert worker.stop() == 0


def test_a_hard_limit_comes_on_time_and_is_written_as_celery_does(lab: Lab) -> None:
    worker = lab.processes("-q")
    lab.result_of("work.delay('warm')")
    record = lab.result_of("work.apply_async(['b', 600], time_limit=2)")
    assert record.status == "FAILURE"
    assert record.result == {
        "exc_type": "TimeLimitExceeded",
        "exc_message": [2],
        "exc_module": "billiard.exceptions",
    }
    assert lab.ledger.count("start")["b"] == 1
    assert worker.stop() == 0


def test_a_terminal_or_supervisor_that_signals_the_whole_family_ends_no_run(lab: Lab) -> None:
    worker = lab.processes("-q")
    lab.send("work.delay('running', 1.5)")
    lab.wait_for_steps("start", 1)
    family = [worker.pid, *descendants(worker.pid)]
    for pid in family:
        os.kill(pid, signal.SIGTERM)
    assert worker.wait() == 0
    assert lab.steps("end") == ["running"]
    (row,) = lab.query("SELECT status FROM taskworker_result")
    assert row == ("SUCCESS",)


def test_a_stopping_worker_gives_back_what_runs_too_long_and_kills_it(lab: Lab) -> None:
    worker = lab.processes("-q", FLASK_TASKER_DRAIN_TIMEOUT="0.5")
    lab.send("work.delay('long', 600)")
    lab.wait_for_steps("start", 1)
    below = descendants(worker.pid)
    began = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - began < 20
    assert not any(map(alive, below))
    assert lab.waiting() == 1


# -- recycling --------------------------------------------------------------------------------


def test_children_are_replaced_after_so_many_tasks_and_lose_none(lab: Lab) -> None:
    lab.send("for n in range(40): work.delay(f'n{n}')", "for n in range(12): pid.delay()")
    worker = lab.processes("-q", "--max-tasks-per-child", "5")
    eventually(lambda: not lost(lab, 40) and len(lab.steps("pid")) == 12, "all are done")
    assert len(lab.pids()) >= 3
    assert max(lab.steps("pid").count(pid) for pid in lab.steps("pid")) <= 5
    assert worker.stop() == 0
    assert "replaced" not in worker.output, "that is no trouble"


def test_a_child_that_grew_too_large_is_replaced(lab: Lab) -> None:
    lab.write(
        APP,
        """
        kept = []

        @define
        def eats():
            kept.append(bytearray(os.urandom(1)) * (80 << 20))
            return os.getpid()
        """,
    )
    worker = lab.processes("-q", "--max-memory-per-child", "120000")
    first = lab.result_of("eats.delay()").result
    worker.wait_for(rf"child {first} has used \d+ KiB, more than 120000; it is replaced")
    eventually(lambda: not alive(first), "it is gone")
    assert lab.result_of("pid.delay()").result != first
    assert worker.stop() == 0


# -- which app --------------------------------------------------------------------------------


def test_an_app_that_a_child_cannot_load_ends_the_worker_with_the_reason(lab: Lab) -> None:
    lab.write(
        APP,
        """
        if os.environ.get("TASKWORKER_LOADING"):
            raise RuntimeError("not in children")
        """,
    )
    worker = lab.worker("-P", "processes", "-q")
    assert worker.wait() == 2
    assert "RuntimeError: not in children" in worker.output


def test_another_app_in_the_child_is_refused(lab: Lab) -> None:
    lab.write(
        APP,
        """
        if os.environ.get("TASKWORKER_LOADING"):
            task_worker.registry._tasks.pop("lab.work")
        """,
    )
    worker = lab.worker("-P", "processes", "-q")
    assert worker.wait() == 2
    assert "it has no task lab.work" in worker.output
    assert "TASKER_APP" in worker.output


def test_a_blocking_worker_in_a_script_without_guard_can_use_processes(lab: Lab) -> None:
    lab.write(APP, "task_worker.start()")
    (lab.cwd / "sender.py").write_text(
        "import os\nos.environ['TASKWORKER_LOADING'] = '1'\nimport lab\nlab.pid.delay()\n"
    )
    sender = lab.python("sender.py", FLASK_TASKER_POOL="processes")
    assert sender.wait() == 0, sender.output
    worker = lab.python("lab.py", FLASK_TASKER_POOL="prefork")
    (pid,) = lab.wait_for_steps("pid", 1)
    assert int(pid) != worker.pid
    eventually(lambda: lab.query("SELECT count(*) FROM taskworker_message") == [(0,)], "settled")
    assert worker.stop() == 0


def test_what_the_app_opened_while_it_was_imported_is_shared_by_no_two_children(lab: Lab) -> None:
    lab.write(
        APP,
        """
        import sqlalchemy
        engine = sqlalchemy.create_engine(f"sqlite:///{HERE}/own.db")
        with engine.connect() as connection:
            connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS t (x)")

        @define
        def opened():
            here = os.path.join(HERE, "own.db")
            links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
            return links.count(here)
        """,
    )
    worker = lab.processes("-q")
    assert lab.result_of("opened.delay()").result == 0
    assert worker.stop() == 0


def test_a_message_whose_body_is_junk_is_parked_by_the_child(lab: Lab) -> None:
    lab.send("work.delay('x')")
    lab.query("SELECT 1")
    connection = database_for(lab.url).connect()
    connection.execute("UPDATE taskworker_message SET body = ?", (json.dumps([1, 2]).encode(),))
    connection.close()
    worker = lab.processes("-q")
    database = database_for(lab.url)
    eventually(lambda: len(dead_letters.list(database)) == 1, "it is parked")
    (letter,) = dead_letters.list(database)
    assert "the body is not [args, kwargs, embed]" in letter.reason
    assert lab.result_of("work.delay('good')").status == "SUCCESS"
    assert worker.stop() == 0
