"""Background tasks for Flask: no server to start with, nothing lost, and Celery's wire format.

::

    from flask import Flask
    from flask_taskworker import BackgroundTaskWorker

    app = Flask(__name__)
    task_worker = BackgroundTaskWorker(app)

    @task_worker.define_task
    def send_email(to): ...

    send_email.delay(to="a@example.org")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .exceptions import (
    BrokerUnavailableError,
    ChordError,
    ConfigurationError,
    Ignore,
    MaxRetriesExceededError,
    Reject,
    ResultTimeoutError,
    Retry,
    SoftTimeLimitExceeded,
    TaskFailedError,
    TaskRevokedError,
    TaskWorkerError,
    TimeLimitExceeded,
    WorkerLostError,
)
from .extension import BackgroundTaskWorker, BaseTaskWorker, BlockingTaskWorker
from .logs import get_task_logger
from .result import AsyncResult, GroupResult, ResultSet
from .task import Request, Task, current_request

if TYPE_CHECKING:
    from .canvas import chain, chord, chunks, group
    from .canvas.signature import Signature, signature

#: The name that the first releases gave to a task.
BaseTask = Task

__version__ = "0.1.0"

#: Loaded when they are asked for: an app that sends single tasks needs none of them.
_CANVAS = frozenset({"Signature", "chain", "chord", "chunks", "group", "signature"})

__all__ = [
    "AsyncResult",
    "BackgroundTaskWorker",
    "BaseTask",
    "BaseTaskWorker",
    "BlockingTaskWorker",
    "BrokerUnavailableError",
    "ChordError",
    "ConfigurationError",
    "GroupResult",
    "Ignore",
    "MaxRetriesExceededError",
    "Reject",
    "Request",
    "ResultSet",
    "ResultTimeoutError",
    "Retry",
    "Signature",
    "SoftTimeLimitExceeded",
    "Task",
    "TaskFailedError",
    "TaskRevokedError",
    "TaskWorkerError",
    "TimeLimitExceeded",
    "WorkerLostError",
    "chain",
    "chord",
    "chunks",
    "current_request",
    "get_task_logger",
    "group",
    "signature",
]


def __getattr__(name: str) -> Any:
    if name in _CANVAS:
        from . import canvas

        return getattr(canvas, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
