"""A clock that moves only when it is told to."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from flask_taskworker import clock

START = datetime(2026, 3, 4, 5, 6, 7, tzinfo=timezone.utc)


class FakeClock:
    """Stands in for ``flask_taskworker.clock`` until the test ends.

    :param monkeypatch: puts the real clock back.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, start: datetime = START) -> None:
        self.now = start.timestamp()
        self.ticks = 1000.0
        monkeypatch.setattr(clock, "wall", lambda: self.now)
        monkeypatch.setattr(clock, "monotonic", lambda: self.ticks)

    def advance(self, seconds: float) -> None:
        """Let time pass on both clocks."""
        self.now += seconds
        self.ticks += seconds

    def set(self, moment: datetime) -> None:
        """Move the wall clock alone, as an administrator would."""
        self.now = moment.timestamp()

    def at(self, seconds: float) -> datetime:
        """The aware UTC time in so many seconds."""
        return datetime.fromtimestamp(self.now, timezone.utc) + timedelta(seconds=seconds)
