"""Killed at any moment, the worker and the producer lose nothing.

What happened stands in a ledger that the tasks write; see :mod:`support.ledger`.
"""

from __future__ import annotations

import signal
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flask_taskworker import failpoints
from flask_taskworker.transports.sql import dead_letters
from flask_taskworker.transports.sql.engine import database_for
from flask_taskworker.worker.supervisor import Worker
from support.app_folder import AppFolder
from support.processes import PATIENCE, eventually

pytestmark = pytest.mark.timeout(120)

APP = """
    task_worker = BaseTaskWorker(app)

    @task_worker.define_task(bind=True)
    def work(self, name, seconds=0.0):
        ledger.write("start", name)
        if seconds:
            time.sleep(seconds)
        ledger.write("end", name)
        return name

    @task_worker.define_task(bind=True, max_retries=5)
    def retried(self, name):
        ledger.write("start", name)
        if self.request.retries == 0:
            raise self.retry(countdown=0)
        ledger.write("end", name)
        return name

    @task_worker.define_task(bind=True)
    def sent_back(self, name):
        ledger.write("start", name)
        if self.request.delivery_count == 1:
            raise Reject("not now", requeue=True)
        ledger.write("end", name)
        return name

    @task_worker.define_task
    def refused(name):
        ledger.write("end", name)
        raise Reject("not wanted")

"""

PRODUCER = """
    import sys
    from lab import ledger, work

    for number in range(int(sys.argv[1])):
        handle = work.delay(f"work-{number}")
        ledger.write("sent", f"work-{number}")
        ledger.write("id", handle.id)
"""


class Lab(AppFolder):
    """The app in a folder, its programs, and what they did."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, APP)
        (folder / "produce.py").write_text(textwrap.dedent(PRODUCER))

    def send_tasks(self, kind: str, count: int, seconds: float = 0.0) -> None:
        """Send tasks from this process, in the way the producer does."""
        task = self.load()[kind]
        for number in range(count):
            task.delay(f"{kind}-{number}", **({"seconds": seconds} if seconds else {}))
            self.ledger.write("sent", f"{kind}-{number}")

    def unsettled(self) -> int:
        """How many messages are neither settled nor parked."""
        ((count,),) = self.query("SELECT count(*) FROM taskworker_message WHERE owner <> -2")
        return int(count)

    def states(self, url: str | None = None) -> dict[str, int]:
        """How many results there are of each state."""
        return dict(
            self.query("SELECT status, count(*) FROM taskworker_result GROUP BY status", url)
        )

    def finish(self, **environment: str) -> None:
        """Let a worker that nobody kills do what is left, and stop it."""
        worker = Worker(self.load(**environment)["task_worker"].task_app())
        thread = threading.Thread(target=worker.run, name="finisher")
        thread.start()
        try:
            self.wait_until_settled()
        finally:
            worker.stop()
            thread.join(PATIENCE)
        assert not thread.is_alive()

    def wait_until_settled(self) -> None:
        eventually(lambda: self.unsettled() == 0, "all messages are settled")

    def lost(self) -> set[str]:
        """What was sent and never ran to its end."""
        return set(self.ledger.count("sent")) - set(self.ledger.count("end"))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def test_a_worker_killed_in_the_middle_of_500_tasks_loses_none(lab: Lab) -> None:
    lab.send_tasks("work", 500, 0.02)
    worker = lab.ready_worker("-q")
    eventually(lambda: len(lab.ledger.count("end")) >= 150, "150 tasks are done")
    worker.kill_all()
    worker.wait()
    done = len(lab.ledger.count("end"))
    assert 150 <= done < 500, "it was killed in the middle"
    lab.finish()
    ends = lab.ledger.count("end")
    assert lab.lost() == set()
    assert len(ends) == 500
    assert lab.states() == {"SUCCESS": 500}
    # Settled and done are one transaction, so only what was on its way may run twice.
    assert sum(ends.values()) - 500 <= 20


def test_a_worker_killed_again_and_again_loses_none(lab: Lab) -> None:
    lab.send_tasks("work", 200, 0.01)
    for kill in range(1, 4):
        worker = lab.ready_worker("-q")
        eventually(lambda aim=kill * 45: len(lab.ledger.count("end")) >= aim, "some are done")
        worker.kill_all()
        worker.wait()
    lab.finish()
    assert lab.lost() == set()
    assert lab.states() == {"SUCCESS": 200}


# -- at each step of the way ------------------------------------------------------------------

PRODUCER_POINTS = ("before_publish", "after_publish")
#: What the worker has to do to come past a point.
TASK_OF = {
    "before_publish": "retried",
    "after_publish": "retried",
    "before_retry": "retried",
    "after_retry": "retried",
    "before_requeue": "sent_back",
    "after_requeue": "sent_back",
    "before_dead_letter": "refused",
    "after_dead_letter": "refused",
}
#: Points that only what is put together comes to: see test_canvas_kill.
CANVAS_POINTS = {"before_continuation", "after_continuation", "before_chord", "after_chord"}
APART = {"FLASK_TASKER_RESULT_BACKEND": "sqlite:///results.db"}


@pytest.mark.parametrize("point", [p for p in failpoints.NAMES if p not in CANVAS_POINTS])
def test_a_worker_killed_at_any_step_loses_nothing(lab: Lab, point: str, tmp_path: Path) -> None:
    apart = APART if point.endswith("_result") else {}
    kind = TASK_OF.get(point, "work")
    count = 6
    lab.send_tasks(kind, count)
    worker = lab.worker("-q", TASKWORKER_FAILPOINTS=f"{point}=kill:2", **apart)
    assert worker.wait() == -signal.SIGKILL, f"never came to {point}:\n{worker.output}"
    lab.finish(**apart)
    assert lab.lost() == set()
    results = f"sqlite:///{tmp_path / 'results.db'}" if apart else lab.url
    letters = dead_letters.list(database_for(lab.url))
    if kind == "refused":
        assert len(letters) == count
        assert lab.states(results) == {"FAILURE": count}
    else:
        assert len(letters) == 0
        assert lab.states(results) == {"SUCCESS": count}
    if apart:
        database_for(results).dispose()


@pytest.mark.parametrize("point", PRODUCER_POINTS)
def test_a_killed_producer_loses_nothing_that_it_was_told_is_sent(lab: Lab, point: str) -> None:
    producer = lab.python("produce.py", "20", TASKWORKER_FAILPOINTS=f"{point}=kill:7")
    assert producer.wait() == -signal.SIGKILL, producer.output
    sent = lab.ledger.count("sent")
    assert len(sent) == 6
    lab.finish()
    assert lab.lost() == set()
    extra = set(lab.ledger.count("end")) - set(sent)
    assert extra == ({"work-6"} if point == "after_publish" else set())


def test_killed_producers_leave_no_message_half_written(lab: Lab) -> None:
    """Killed from outside, at whatever they do just then, while a worker runs."""
    worker = lab.ready_worker("-q")
    for number in range(4):
        before = len(lab.ledger.count("id"))
        producer = lab.python("produce.py", "100000")
        aim = before + 20 + 11 * number
        eventually(lambda aim=aim: len(lab.ledger.count("id")) >= aim, "it sends")
        producer.kill_all()
        producer.wait()
    lab.wait_until_settled()
    assert worker.stop() == 0
    steps = lab.ledger.lines()
    sent = sum(1 for step, _ in steps if step == "id")
    states = lab.states()
    assert set(states) == {"SUCCESS"}
    assert sent <= states["SUCCESS"] <= sent + 4, "at most one more for each kill"
    assert dead_letters.list(database_for(lab.url)) == ()
    ids = set(lab.ledger.count("id"))
    rows = lab.query("SELECT task_id FROM taskworker_result")
    assert ids <= {row[0] for row in rows}, "every id that delay() returned has run"


def test_a_task_that_kills_its_worker_each_time_is_parked(lab: Lab) -> None:
    lab.write(
        APP,
        """
        @task_worker.define_task
        def deadly():
            ledger.write("start", "deadly")
            os.kill(os.getpid(), 9)
        """,
    )
    app = lab.load()
    app["deadly"].delay()
    app["work"].delay("good")
    most = 3
    for _ in range(most):
        worker = lab.worker("-q", "-P", "solo", FLASK_TASKER_MAX_DELIVERIES=str(most))
        assert worker.wait() == -signal.SIGKILL, worker.output
    lab.finish(FLASK_TASKER_MAX_DELIVERIES=str(most))
    assert lab.ledger.count("start")["deadly"] == most
    assert lab.ledger.count("end")["good"] >= 1
    (letter,) = dead_letters.list(database_for(lab.url))
    assert f"delivered {most} times" in letter.reason
