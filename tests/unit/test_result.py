"""The handle to a task that was sent."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from flask_taskworker import (
    AsyncResult,
    ResultTimeoutError,
    TaskFailedError,
    TaskRevokedError,
    states,
)
from flask_taskworker.backends.base import TaskRecord
from flask_taskworker.backends.encoding import encode_exception
from flask_taskworker.backends.memory import MemoryBackend
from flask_taskworker.config import Config

DONE = datetime(2026, 3, 4, tzinfo=timezone.utc)


class Counting(MemoryBackend):
    """Counts how often it is asked."""

    asked = 0

    def fetch(self, task_id: str) -> TaskRecord | None:
        self.asked += 1
        return super().fetch(task_id)


@pytest.fixture
def backend() -> Counting:
    return Counting(
        Config.from_mapping({"TASKER_ENGINE": "memory"}, debug=False, instance_path="/nowhere")
    )


@pytest.fixture
def handle(backend: Counting) -> AsyncResult[int]:
    return AsyncResult("a", backend)


def store(backend: MemoryBackend, status: str, result: object = None, **fields: object) -> None:
    if isinstance(result, BaseException):
        result = encode_exception(result)
    backend.store(TaskRecord("a", status, result, date_done=DONE, **fields))  # type: ignore[arg-type]


def test_before_anything_is_known(handle: AsyncResult[int]) -> None:
    assert handle.state == handle.status == states.PENDING
    assert handle.result is handle.info is None
    assert handle.traceback is None
    assert handle.date_done is None
    assert not handle.ready()
    assert not handle.successful()
    assert not handle.failed()
    with pytest.raises(ResultTimeoutError, match="task a was not done within 0 s"):
        handle.get(timeout=0)


def test_after_success(handle: AsyncResult[int], backend: Counting) -> None:
    store(backend, states.SUCCESS, 5)
    assert handle.get(timeout=0) == handle.wait(timeout=0) == handle.result == 5
    assert handle.state == states.SUCCESS
    assert handle.date_done == DONE
    assert handle.ready()
    assert handle.successful()
    assert not handle.failed()


def test_after_failure_the_tasks_own_exception_is_raised(
    handle: AsyncResult[int], backend: Counting
) -> None:
    store(backend, states.FAILURE, KeyError("x"), traceback="File tasks.py, line 5\nKeyError: 'x'")
    with pytest.raises(KeyError, match="x") as caught:
        handle.get(timeout=0)
    shown = "\n".join(getattr(caught.value, "__notes__", [str(caught.value.__cause__)]))
    assert "Traceback of the worker:\nFile tasks.py, line 5" in shown
    assert handle.failed()
    assert handle.ready()
    assert not handle.successful()
    assert isinstance(handle.result, KeyError)
    assert handle.traceback is not None


def test_a_failure_may_be_returned_instead(handle: AsyncResult[int], backend: Counting) -> None:
    store(backend, states.FAILURE, ValueError("bad"))
    assert repr(handle.get(timeout=0, propagate=False)) == "ValueError('bad')"


def test_an_exception_that_nobody_knows_here(handle: AsyncResult[int], backend: Counting) -> None:
    stored = {"exc_type": "Odd", "exc_message": ["x", 5], "exc_module": "not.here"}
    backend.store(TaskRecord("a", states.FAILURE, stored))
    with pytest.raises(TaskFailedError, match=r"Odd\(x, 5\)") as caught:
        handle.get(timeout=0)
    assert caught.value.exc_module == "not.here"


def test_a_revoked_task_raises_so(handle: AsyncResult[int], backend: Counting) -> None:
    store(backend, states.REVOKED, TaskRevokedError("expired"))
    with pytest.raises(TaskRevokedError, match="expired"):
        handle.get(timeout=0)
    assert handle.ready()
    assert not handle.failed()


def test_a_retry_is_no_end(handle: AsyncResult[int], backend: Counting) -> None:
    store(backend, states.RETRY, OSError("down"))
    assert handle.state == states.RETRY
    assert isinstance(handle.result, OSError)
    assert not handle.ready()
    store(backend, states.SUCCESS, 1)
    assert handle.get(timeout=0) == 1


def test_a_state_of_the_tasks_own_shows_what_it_stored(
    handle: AsyncResult[int], backend: Counting
) -> None:
    store(backend, "PROGRESS", {"done": 5})
    assert handle.state == "PROGRESS"
    assert handle.info == {"done": 5}
    assert not handle.ready()


def test_a_task_that_is_done_is_not_asked_for_again(
    handle: AsyncResult[int], backend: Counting
) -> None:
    store(backend, states.SUCCESS, 5)
    assert handle.ready()
    asked = backend.asked
    assert (handle.get(), handle.state, handle.result) == (5, states.SUCCESS, 5)
    assert backend.asked == asked


def test_forget_deletes_what_is_stored(handle: AsyncResult[int], backend: Counting) -> None:
    store(backend, states.SUCCESS, 5)
    assert handle.get() == 5
    handle.forget()
    assert handle.state == states.PENDING


def test_a_handle_is_its_id(backend: Counting) -> None:
    one, same, other = (AsyncResult[int](task_id, backend) for task_id in "aab")
    assert one == same != other
    assert one == "a"
    assert one != "b"
    assert one != 5
    assert len({one, same, other}) == 2
    assert str(one) == "a"
    assert repr(one) == "<AsyncResult: a>"
    with pytest.raises(ValueError, match="needs the id of a task, got ''"):
        AsyncResult("", backend)
