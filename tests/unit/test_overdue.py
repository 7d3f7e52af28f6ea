"""Operations that take too long are cut, others are left alone."""

from __future__ import annotations

import threading

import pytest

from flask_taskworker import clock, overdue
from flask_taskworker.overdue import Overdue
from support.waiting import wait_until


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overdue, "_LOOK", 0.005)


def in_seconds(seconds: float) -> float:
    return clock.monotonic() + seconds


def test_what_is_not_done_in_time_is_cut_once_and_nothing_else_is() -> None:
    cuts: list[str] = []
    watch: Overdue[str] = Overdue(cuts.append)
    with watch.watched("slow", in_seconds(0.01)), watch.watched("patient", in_seconds(60)):
        wait_until(lambda: cuts, "a cut")
        with watch.watched("slow too", in_seconds(0.01)):
            wait_until(lambda: len(cuts) == 2, "the next cut")
    assert cuts == ["slow", "slow too"]


def test_its_thread_ends_when_there_is_nothing_to_watch_and_comes_back() -> None:
    before = set(threading.enumerate())
    cuts: list[str] = []
    watch: Overdue[str] = Overdue(cuts.append)
    for _ in range(2):
        with watch.watched("in time", in_seconds(60)):
            assert len(set(threading.enumerate()) - before) == 1
        wait_until(lambda: not set(threading.enumerate()) - before, "the end of the thread")
    with watch.watched("slow", in_seconds(0)):
        wait_until(lambda: cuts, "a cut")
    wait_until(lambda: not set(threading.enumerate()) - before, "the end of the thread")
