"""An app with an executor, which runs functions as a worker would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask_taskworker import AsyncResult, Task
from flask_taskworker.backends.base import TaskRecord
from flask_taskworker.worker.delivery import Outcome
from flask_taskworker.worker.executor import Executor

from .apps import AppRoom
from .messages import deliver


class Bench:
    """An app with an executor; runs functions as tasks."""

    def __init__(self, room: AppRoom) -> None:
        self.app, self.task_worker, self.task_app, self.publisher = room
        self.executor = Executor(self.task_app, "worker@test")

    def task(self, function: Callable[..., Any], **options: Any) -> Task[..., Any]:
        options = {"name": f"t.{function.__name__}", "max_retries": 3, **options}
        task: Task[..., Any] = self.task_worker.define_task(**options)(function)
        return task

    def run(self, function: Any, *args: Any, **fields: Any) -> Outcome:
        """Run a function, or a task, once; the message has these fields."""
        task = function if isinstance(function, (Task, str)) else self.task(function)
        self.delivery = deliver(task, *args, **fields)
        return self.executor.run(self.delivery)

    @property
    def record(self) -> TaskRecord | None:
        """What is stored about the last run."""
        return self.task_app.backend.fetch(self.delivery.message.id)

    @property
    def handle(self) -> AsyncResult[Any]:
        return self.task_app.result(self.delivery.message.id)

    def stored(self) -> tuple[str, Any]:
        record = self.record
        assert record is not None
        return record.status, record.result
