"""Results in memory behave as results in a store."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from flask_taskworker import ResultTimeoutError, states
from flask_taskworker.backends import create_backend
from flask_taskworker.backends.base import DisabledBackend, TaskRecord
from flask_taskworker.backends.memory import MemoryBackend
from flask_taskworker.config import Config
from flask_taskworker.exceptions import EncodeError, NoResultBackendError
from support import FakeClock, wait_until


def config(**settings: Any) -> Config:
    return Config.from_mapping(
        {"TASKER_ENGINE": "memory", **settings}, debug=False, instance_path="/nowhere"
    )


@pytest.fixture
def backend() -> MemoryBackend:
    made = create_backend(config(), lambda queue, wire: None)
    assert isinstance(made, MemoryBackend)
    return made


def test_what_is_stored_is_fetched(backend: MemoryBackend, clock: FakeClock) -> None:
    assert backend.fetch("a") is None
    backend.store(TaskRecord("a", states.SUCCESS, {"x": [1, None]}, group_id="g"))
    assert backend.fetch("a") == TaskRecord(
        "a", states.SUCCESS, {"x": [1, None]}, group_id="g", date_done=clock.at(0)
    )
    assert backend.fetch("b") is None


def test_only_a_final_state_has_a_time(backend: MemoryBackend) -> None:
    for state in sorted(states.ALL_STATES):
        backend.store(TaskRecord(state, state))
        record = backend.fetch(state)
        assert record is not None
        assert (record.date_done is not None) is (state in states.READY_STATES)


def test_a_reader_cannot_change_what_is_stored(backend: MemoryBackend) -> None:
    given = [1]
    backend.store(TaskRecord("a", states.SUCCESS, given))
    given.append(2)
    backend.wait("a", 1).result.append(3)
    record = backend.fetch("a")
    assert record is not None
    assert record.result == [1]


def test_a_result_goes_through_the_serializer(backend: MemoryBackend) -> None:
    backend.store(TaskRecord("a", states.SUCCESS, (1, 2)))
    assert backend.wait("a", 0).result == [1, 2]
    with pytest.raises(EncodeError, match="the result cannot be serialized as json"):
        backend.store(TaskRecord("b", states.SUCCESS, {1, 2}))
    assert backend.fetch("b") is None


def test_success_is_final_and_failure_is_not(backend: MemoryBackend) -> None:
    backend.store(TaskRecord("a", states.STARTED))
    backend.store(TaskRecord("a", states.FAILURE, "boom"))
    backend.store(TaskRecord("a", states.STARTED))
    backend.store(TaskRecord("a", states.SUCCESS, 1))
    for later in (states.FAILURE, states.STARTED, states.RETRY, states.REVOKED):
        backend.store(TaskRecord("a", later, "late"))
    record = backend.fetch("a")
    assert record is not None
    assert (record.status, record.result) == (states.SUCCESS, 1)
    backend.store(TaskRecord("a", states.SUCCESS, 2))
    assert backend.wait("a").result == 2


def test_a_waiting_reader_is_woken(backend: MemoryBackend) -> None:
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(backend.wait, "a", 5)
        backend.store(TaskRecord("other", states.SUCCESS, 0))
        backend.store(TaskRecord("a", states.STARTED))
        backend.store(TaskRecord("a", states.SUCCESS, 7))
        assert waiting.result(5).result == 7


def test_who_waits_too_long_is_told_so(backend: MemoryBackend) -> None:
    backend.store(TaskRecord("a", states.STARTED))
    with pytest.raises(ResultTimeoutError, match=r"task a was not done within 0\.01 s; it goes on"):
        backend.wait("a", 0.01)
    assert isinstance(ResultTimeoutError(), TimeoutError)


def test_forget_deletes_a_record(backend: MemoryBackend) -> None:
    backend.store(TaskRecord("a", states.SUCCESS, 1))
    backend.forget("a")
    backend.forget("a")
    assert backend.fetch("a") is None


def test_cleanup_deletes_what_has_expired(clock: FakeClock) -> None:
    backend = MemoryBackend(config(TASKER_RESULT_EXPIRES=60))
    backend.store(TaskRecord("old", states.SUCCESS, 1))
    backend.store(TaskRecord("running", states.STARTED))
    clock.advance(50)
    backend.store(TaskRecord("new", states.FAILURE, 2))
    assert backend.cleanup() == 0
    clock.advance(11)
    assert backend.cleanup() == 1
    assert backend.fetch("old") is None
    assert backend.fetch("running") is not None
    assert backend.fetch("new") is not None


@pytest.mark.parametrize("expires", [0, None])
def test_results_may_be_kept_for_ever(expires: Any, clock: FakeClock) -> None:
    backend = MemoryBackend(config(TASKER_RESULT_EXPIRES=expires))
    backend.store(TaskRecord("a", states.SUCCESS, 1))
    clock.advance(10**9)
    assert backend.cleanup() == 0
    assert backend.fetch("a") is not None


def test_many_threads_store_and_read_at_once(backend: MemoryBackend) -> None:
    done: list[int] = []

    def reader(number: int) -> None:
        done.append(backend.wait(f"t{number}", 5).result)

    threads = [threading.Thread(target=reader, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for number in range(8):
        backend.store(TaskRecord(f"t{number}", states.SUCCESS, number))
    wait_until(lambda: len(done) == 8, "eight readers")
    assert sorted(done) == list(range(8))


def test_no_backend_says_how_to_get_one() -> None:
    backend = create_backend(config(TASKER_RESULT_BACKEND="disabled"), lambda queue, wire: None)
    assert isinstance(backend, DisabledBackend)
    assert not backend.enabled
    backend.store(TaskRecord("a", states.SUCCESS, 1))
    backend.forget("a")
    assert backend.cleanup() == 0
    assert backend.reply_queue() is None
    for ask in (lambda: backend.fetch("a"), lambda: backend.wait("a", 1)):
        with pytest.raises(NoResultBackendError, match="Set TASKER_RESULT_BACKEND"):
            ask()
