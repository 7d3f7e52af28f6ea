"""A worker as a program: what it may use of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flask_taskworker.worker.program import is_at_work, usable_cpus
from flask_taskworker.worker.supervisor import Worker
from support import FakeClock, make_task_app


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ("max 100000", 8),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("9900000 100000", 8),
        ("100000 0", 8),
        ("nonsense", 8),
        (None, 8),
    ],
)
def test_a_container_may_use_what_its_quota_allows(
    quota: str | None, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(f"{quota}\n")
    assert usable_cpus(str(file)) == cpus


def test_where_nothing_binds_a_process_all_processors_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus(str(tmp_path / "none")) == 1


@pytest.mark.parametrize(("interval", "still_well"), [(5, 59), (100, 199)])
def test_a_loop_that_stands_still_is_not_at_work(
    clock: FakeClock, interval: float, still_well: float
) -> None:
    worker = Worker(make_task_app(TASKER_LOOP_INTERVAL=interval).task_app, pool="solo")
    assert is_at_work(worker)
    clock.advance(still_well)
    assert is_at_work(worker)
    clock.advance(2)
    assert not is_at_work(worker)
    worker.consumer.in_task = True  # that may take as long as it likes
    assert is_at_work(worker)
    worker._waker.close()
