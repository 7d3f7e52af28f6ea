"""Flask apps whose messages and results stay in this process, and a worker for them."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from flask import Flask

from flask_taskworker import BaseTaskWorker
from flask_taskworker.app import TaskApp
from flask_taskworker.worker.supervisor import PoolName, Worker

from .messages import RecordingPublisher


def make_app(name: str = "shop", **settings: Any) -> Flask:
    """A Flask app with the memory engine and a queue of its own (memory is shared by all)."""
    app = Flask(name)
    app.config.update(TASKER_ENGINE="memory", TASKER_DEFAULT_QUEUE=f"q-{uuid.uuid4().hex[:8]}")
    app.config.update(settings)
    return app


class AppRoom(NamedTuple):
    """An app, its extension, and what it publishes."""

    app: Flask
    task_worker: BaseTaskWorker
    task_app: TaskApp
    publisher: RecordingPublisher


def make_task_app(**settings: Any) -> AppRoom:
    """An app whose publisher only records what it is given."""
    app = make_app(**settings)
    task_worker = BaseTaskWorker(app)
    task_app = task_worker.task_app()
    publisher = RecordingPublisher()
    task_app.__dict__["publisher"] = publisher  # where the cached property keeps it
    return AppRoom(app, task_worker, task_app, publisher)


@contextmanager
def run_worker(task_app: TaskApp, pool: PoolName = "threads", size: int = 2) -> Iterator[Worker]:
    """A worker that reads the app's queues in another thread until the block ends."""
    worker = Worker(task_app, pool=pool, concurrency=size)
    thread = threading.Thread(target=worker.run, name="test-worker")
    thread.start()
    try:
        assert worker.ready.wait(5), "the worker did not get ready"
        yield worker
    finally:
        worker.stop(5)
        thread.join(10)
        task_app.close()
        assert not thread.is_alive(), "the worker did not stop"
