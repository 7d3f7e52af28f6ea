"""A loop that stands still is noticed, shown and freed."""

from __future__ import annotations

import socket
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from flask_taskworker import clock
from flask_taskworker.broker import interrupt
from flask_taskworker.worker.watchdog import Watchdog
from support import wait_until


class StuckLoop:
    """Stands as a consumer whose thread waits for a peer that never says a word."""

    def __init__(self) -> None:
        self.app = SimpleNamespace(config=SimpleNamespace(loop_interval=0.01))
        self.turned_at = clock.monotonic()
        self.in_task = False
        self.near, self.far = socket.socketpair()
        opened = SimpleNamespace(transport=SimpleNamespace(sock=self.near))
        self.connection: Any = SimpleNamespace(_connection=opened)

    def run(self, **options: float) -> None:
        with Watchdog(self, **options):  # type: ignore[arg-type]
            self.near.recv(1)


@pytest.fixture
def loop() -> Any:
    loop = StuckLoop()
    yield loop
    loop.near.close()
    loop.far.close()


def test_a_loop_that_stands_still_is_shown_and_its_connection_cut(
    loop: StuckLoop, caplog: pytest.LogCaptureFixture
) -> None:
    loop.run(after=0.05, interval=0.01)  # it ends, because the connection was cut
    (record,) = [r for r in caplog.records if "has stood still" in r.getMessage()]
    assert "self.near.recv(1)" in record.getMessage(), "where it stood"


@pytest.mark.parametrize("why", ["it turns", "a task runs in it"])
def test_a_loop_that_works_is_left_alone(
    why: str, loop: StuckLoop, caplog: pytest.LogCaptureFixture
) -> None:
    looks: list[float] = []

    class Looked(StuckLoop):
        @property
        def turned_at(self) -> float:  # type: ignore[override]
            looks.append(clock.monotonic())
            return looks[-1] if why == "it turns" else 0.0

        @turned_at.setter
        def turned_at(self, value: float) -> None:
            pass

    working = Looked()
    working.in_task = why != "it turns"
    thread = threading.Thread(target=working.run, kwargs={"after": 0.05, "interval": 0.005})
    thread.start()
    wait_until(lambda: len(looks) > 30, "it was looked at often")
    assert thread.is_alive()
    working.far.send(b"!")
    thread.join(5)
    assert not thread.is_alive()
    assert "stood still" not in caplog.text
    working.near.close()
    working.far.close()


def test_a_process_that_was_stopped_has_not_stalled(
    loop: StuckLoop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    looks: list[float] = []

    def jumping() -> float:
        looks.append(now[0])
        now[0] += 100.0  # between two looks, as while the process is stopped
        return now[0]

    loop.turned_at = 0.0
    monkeypatch.setattr(clock, "monotonic", jumping)
    thread = threading.Thread(target=loop.run, kwargs={"after": 60, "interval": 0.001})
    thread.start()
    wait_until(lambda: len(looks) > 20, "it was looked at often")
    loop.far.send(b"!")
    thread.join(5)
    monkeypatch.undo()
    assert "stood still" not in caplog.text


def test_a_connection_that_is_not_open_has_nothing_to_cut() -> None:
    assert not interrupt(SimpleNamespace(_connection=None))  # type: ignore[arg-type]
