"""What the tests share: a clock that stands still, waiting, messages, apps with a worker.

Everything here uses the package as its users do, or as its own parts do.
"""

from __future__ import annotations

from .apps import AppRoom, make_app, make_task_app, run_worker
from .bench import Bench
from .clocks import FakeClock
from .messages import RecordingPublisher, deliver, received
from .waiting import wait_until

__all__ = [
    "AppRoom",
    "Bench",
    "FakeClock",
    "RecordingPublisher",
    "deliver",
    "make_app",
    "make_task_app",
    "received",
    "run_worker",
    "wait_until",
]
