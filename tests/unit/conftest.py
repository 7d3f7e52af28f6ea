"""Fixtures of the tests that need nothing but this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flask_taskworker import failpoints
from support import AppRoom, Bench, FakeClock, make_task_app


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """A clock that stands still until the test moves it."""
    return FakeClock(monkeypatch)


@pytest.fixture
def room() -> AppRoom:
    """A Flask app with its task worker; what it publishes is recorded."""
    return make_task_app()


@pytest.fixture
def bench(room: AppRoom) -> Bench:
    """Runs functions as tasks of that app."""
    return Bench(room)


@pytest.fixture
def no_failpoints() -> Iterator[None]:
    """Whatever is armed in a test is disarmed after it."""
    failpoints.disarm()
    yield
    failpoints.disarm()
