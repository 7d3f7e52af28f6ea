"""Waking sleepers."""

from __future__ import annotations

import os
import select
import threading
import time

import pytest

from flask_taskworker.transports.sql import doorbell
from flask_taskworker.transports.sql.doorbell import MESSAGES, RESULTS, Doorbell, path_for


@pytest.fixture
def bell(tmp_path):
    bell = Doorbell(str(tmp_path / "bell"))
    yield bell
    bell.close()


def _rung(slot, timeout: float = 0.0) -> bool:
    return bool(select.select([slot], [], [], timeout)[0])


def test_an_armed_sleeper_is_woken_once(bell):
    with bell.slot(MESSAGES) as slot:
        slot.arm()
        bell.ring(MESSAGES)
        assert _rung(slot, 5)
        slot.drain()
        bell.ring(MESSAGES)
        assert not _rung(slot)


def test_a_sleeper_that_is_not_armed_is_left_alone(bell):
    with bell.slot(MESSAGES) as slot:
        bell.ring(MESSAGES)
        slot.arm()
        slot.disarm()
        bell.ring(MESSAGES)
        assert not _rung(slot)


def test_kinds_are_rung_apart(bell):
    with bell.slot(MESSAGES) as worker, bell.slot(RESULTS) as waiter:
        worker.arm()
        waiter.arm()
        bell.ring(RESULTS)
        assert _rung(waiter, 5)
        assert not _rung(worker)


def test_two_bells_on_one_file_are_one_bell(bell):
    other = Doorbell(bell.path)
    with bell.slot(MESSAGES) as slot:
        slot.arm()
        other.ring(MESSAGES)
        assert _rung(slot, 5)
    other.close()


def test_the_file_is_for_its_owner_only(bell):
    assert os.stat(bell.path).st_mode & 0o777 == 0o600


def test_places_of_dead_processes_are_used_again(bell, monkeypatch):
    monkeypatch.setattr(doorbell, "_SLOTS", 4)
    pid = os.fork()
    if pid == 0:
        try:
            for _ in range(4):
                bell.slot(MESSAGES)._receiver.detach()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    slots = [bell.slot(MESSAGES) for _ in range(4)]
    with pytest.raises(OSError, match="places"):
        bell.slot(MESSAGES)
    for slot in slots:
        slot.close()


def test_a_file_that_cannot_be_had_makes_a_dumb_bell(tmp_path, caplog):
    bell = Doorbell(str(tmp_path / "missing" / "bell"))
    assert not bell.available
    bell.ring(MESSAGES)
    with pytest.raises(OSError, match="doorbell"):
        bell.slot(MESSAGES)
    assert "no doorbell" in caplog.text


def test_a_file_of_something_else_is_not_written_to(tmp_path):
    path = tmp_path / "bell"
    path.write_bytes(b"precious" * 1000)
    assert not Doorbell(str(path)).available
    assert path.read_bytes() == b"precious" * 1000


def test_a_link_is_not_followed(tmp_path):
    target = tmp_path / "target"
    target.touch()
    (tmp_path / "bell").symlink_to(target)
    assert not Doorbell(str(tmp_path / "bell")).available


def test_ringing_nobody_takes_no_time(bell):
    with bell.slot(MESSAGES):
        rounds = 20_000
        best = min(_time(bell, rounds) for _ in range(5))
    assert best / rounds < 2e-6


def _time(bell, rounds: int) -> float:
    start = time.perf_counter()
    for _ in range(rounds):
        bell.ring(MESSAGES)
    return time.perf_counter() - start


def test_no_wake_up_is_lost_between_arming_and_looking(bell):
    """The sleeper arms, looks, sleeps; the other side commits, rings. 10,000 races."""
    committed = seen = 0
    rounds = 10_000
    lost = []
    with bell.slot(MESSAGES) as slot:
        go = threading.Semaphore(0)

        def publisher() -> None:
            nonlocal committed
            for _ in range(rounds):
                go.acquire()
                committed += 1
                bell.ring(MESSAGES)

        thread = threading.Thread(target=publisher, daemon=True)
        thread.start()
        for number in range(rounds):
            go.release()
            slot.arm()
            while committed <= seen:
                if not _rung(slot, 5):
                    lost.append(number)
                    break
                slot.drain()
                slot.arm()
            seen += 1
        thread.join()
    assert lost == []


def test_the_bell_of_a_file_lies_next_to_it():
    assert path_for("", "taskworker_", "/data/app.db") == "/data/app.db-taskworker-bell"
    assert path_for("x", "a_", None) != path_for("x", "b_", None)
