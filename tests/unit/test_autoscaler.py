"""The size of a pool follows its load between two bounds."""

from __future__ import annotations

import pytest

from flask_taskworker.worker.autoscaler import KEEP, Autoscaler
from support import FakeClock


class Pool:
    """Has a size and a load."""

    def __init__(self, size: int) -> None:
        self.size, self.busy = size, 0

    def load(self) -> int:
        return self.busy

    def grow(self, by: int) -> None:
        self.size += by

    def shrink(self, by: int) -> None:
        self.size -= by


@pytest.fixture
def pool() -> Pool:
    return Pool(2)


def test_it_grows_with_the_load_up_to_its_bound(pool: Pool) -> None:
    scaler = Autoscaler(pool, 4, 2)  # type: ignore[arg-type]
    scaler.scale(False)
    assert pool.size == 2
    pool.busy = 2
    scaler.scale(False)
    assert pool.size == 2, "nothing waits"
    scaler.scale(True)
    assert pool.size == 3
    pool.busy = 20
    scaler.scale(True)
    assert pool.size == 4


def test_it_shrinks_when_it_was_not_needed_for_long(pool: Pool, clock: FakeClock) -> None:
    scaler = Autoscaler(pool, 4, 1)  # type: ignore[arg-type]
    pool.busy = 4
    scaler.scale(True)
    assert pool.size == 4
    pool.busy = 0
    scaler.scale(False)
    clock.advance(KEEP / 2)
    scaler.scale(False)
    assert pool.size == 4
    clock.advance(KEEP)
    scaler.scale(False)
    assert pool.size == 1


def test_lower_bounds_hold_at_once(pool: Pool) -> None:
    scaler = Autoscaler(pool, 4, 2)  # type: ignore[arg-type]
    pool.busy = 4
    scaler.scale(True)
    scaler.update(3, 1)
    scaler.scale(True)
    assert pool.size == 3
