"""Killed between the end of a task and what comes after it, a worker loses neither."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_taskworker import chain, chord, states
from support.app_folder import AppFolder
from support.processes import eventually

pytestmark = pytest.mark.timeout(120)

APP = """
    task_worker = BaseTaskWorker(app)

    @task_worker.define_task
    def step(value):
        ledger.write("step", value)
        return value + 1

    @task_worker.define_task(bind=True)
    def after(self, value):
        ledger.write("after", self.request.id)
        return value

    @task_worker.define_task(bind=True)
    def body(self, values):
        ledger.write("body", values)
        return sum(values)

    @task_worker.define_task
    def fail():
        raise LookupError("gone")

    @task_worker.define_task
    def errback(task_id):
        ledger.write("errback", task_id)
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[AppFolder]:
    lab = AppFolder(tmp_path, APP)
    yield lab
    lab.close()


#: With results elsewhere, what comes next is not sent in the transaction that settles.
APART = {"FLASK_TASKER_RESULT_BACKEND": "sqlite:///results.db"}


def kill_a_worker(lab: AppFolder, point: str, **settings: str) -> None:
    worker = lab.worker("-q", "-c", "1", TASKWORKER_FAILPOINTS=point, **settings)
    assert worker.wait() == -signal.SIGKILL, f"never came to {point}:\n{worker.output}"


def finish(lab: AppFolder, handle: Any, **settings: str) -> None:
    """Empty the queues, with what a dead worker held as soon as it is known to be dead."""

    def done() -> bool:
        lab.burst(**settings)
        return bool(handle.ready())

    eventually(done, "it is done")


@pytest.mark.parametrize(
    "point",
    [
        "before_continuation=kill:2",
        "after_continuation=kill:2",
        "before_publish=kill:2",
        "after_publish=kill:2",
        "before_ack=kill:2",
        "after_ack=kill:2",
    ],
)
def test_a_chain_comes_to_its_end_and_its_callbacks_are_sent(lab: AppFolder, point: str) -> None:
    settings = APART if "publish" in point else {}
    names = lab.load(**settings)
    step, after = names["step"], names["after"]
    handle = chain(step.s(0), step.s(), step.s()).apply_async(link=[after.s(), after.si(4)])
    kill_a_worker(lab, point, **settings)
    finish(lab, handle, **settings)
    assert handle.get(timeout=0) == 3
    assert handle.parent.parent.get(timeout=0) == 1
    assert set(lab.ledger.count("step")) == {"0", "1", "2"}
    # A step that ran twice sends the same calls, not others.
    (callbacks,) = handle.children
    assert set(lab.ledger.count("after")) == {child.id for child in callbacks}
    assert callbacks.get(timeout=0) == [3, 4]


@pytest.mark.parametrize(
    "point",
    [
        "before_chord=kill:1",
        "after_chord=kill:1",
        "before_chord=kill:4",
        "before_publish=kill:1",
        "after_publish=kill:1",
        "after_chord=kill:4",
        "before_ack=kill:4",
        "after_ack=kill:4",
    ],
)
def test_the_body_of_a_chord_is_sent_once(lab: AppFolder, point: str) -> None:
    names = lab.load()
    handle = chord([names["step"].s(i) for i in range(4)])(names["body"].s())
    kill_a_worker(lab, point)
    finish(lab, handle)
    assert handle.get(timeout=0) == 1 + 2 + 3 + 4
    assert lab.ledger.count("body") == {"[1, 2, 3, 4]": 1}
    for table in ("chord", "chord_part"):
        assert lab.query(f"SELECT count(*) FROM taskworker_{table}") == [(0,)]


@pytest.mark.parametrize(
    "point", ["before_chord=kill:2", "after_chord=kill:2", "before_ack=kill:2"]
)
def test_a_chord_that_fails_ends_and_its_errback_is_called(lab: AppFolder, point: str) -> None:
    names: dict[str, Any] = lab.load()
    body = names["body"].s().on_error(names["errback"].s())
    handle = chord([names["step"].s(1), names["fail"].s()])(body)
    kill_a_worker(lab, point)
    finish(lab, handle)
    assert handle.state == states.FAILURE
    assert "gone" in str(handle.get(timeout=0, propagate=False))
    assert set(lab.ledger.count("errback")) == {handle.id}
    assert not lab.ledger.count("body")
