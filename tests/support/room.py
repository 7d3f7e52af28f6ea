"""An app on any transport, with tasks that tell what happens to them, and workers for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kombu
from flask import Flask

from flask_taskworker import BaseTaskWorker, Reject
from flask_taskworker.broker import broker_connection
from flask_taskworker.config import Config
from flask_taskworker.publisher import task_queue
from flask_taskworker.worker.supervisor import Worker

from .waiting import wait_until

PATIENCE = 20.0


class Room:
    """An app with a queue of its own, its tasks, and what they did.

    :param settings: ``TASKER_*`` settings.
    :param folder: the instance folder.
    :param queue: the default queue.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path, queue: str) -> None:
        self.app = Flask("room", instance_path=str(folder))
        self.app.config.update(settings, TASKER_DEFAULT_QUEUE=queue)
        self.task_worker = BaseTaskWorker(self.app)
        self.task_app = self.task_worker.task_app()
        self.config: Config = self.task_app.config
        self.queue = queue
        #: (task, argument or id, time) of each start.
        self.started: list[tuple[str, Any, float]] = []
        #: Lets the tasks go on that wait for it.
        self.gate = threading.Event()
        self._workers: list[Worker] = []
        self._define()

    def _define(self) -> None:
        define = self.task_worker.define_task

        @define(name="add")
        def add(a: int, b: int = 0) -> int:
            self._note("add", a)
            return a + b

        @define(name="note")
        def note(value: Any = None) -> Any:
            self._note("note", value)
            return value

        @define(name="fail")
        def fail(text: str) -> None:
            self._note("fail", text)
            raise LookupError(text, 7)

        @define(name="wait", bind=True)
        def wait(task: Any, value: Any = None) -> Any:
            self._note("wait", value)
            assert self.gate.wait(PATIENCE), "the test never opened the gate"
            return value

        @define(name="wait_early", acks_late=False)
        def wait_early(value: Any = None) -> Any:
            self._note("wait_early", value)
            assert self.gate.wait(PATIENCE), "the test never opened the gate"
            return value

        @define(name="retry", bind=True, max_retries=2)
        def retry(task: Any, succeed_at: int) -> int:
            retries: int = task.request.retries
            self._note("retry", retries)
            if retries < succeed_at:
                raise task.retry(ValueError(f"attempt {retries}"), countdown=0)
            return retries

        @define(name="send_back", bind=True)
        def send_back(task: Any) -> int:
            first = not self.starts("send_back")
            self._note("send_back", task.request.id)
            if first:
                raise Reject("not now", requeue=True)
            return len(self.starts("send_back"))

        @define(name="refuse")
        def refuse() -> None:
            self._note("refuse", None)
            raise Reject("not wanted")

        self.add, self.note, self.fail, self.wait = add, note, fail, wait
        self.wait_early, self.retry = wait_early, retry
        self.send_back, self.refuse = send_back, refuse

    def _note(self, task: str, value: Any) -> None:
        self.started.append((task, value, time.time()))

    def starts(self, task: str) -> list[Any]:
        """What the runs of a task were called with, in the order they started."""
        return [value for name, value, _ in self.started if name == task]

    def wait_for_starts(self, task: str, count: int) -> list[Any]:
        """Wait until a task has started so often."""
        wait_until(lambda: len(self.starts(task)) >= count, f"{count} starts of {task}", PATIENCE)
        return self.starts(task)

    # -- workers --------------------------------------------------------------------------

    @contextmanager
    def worker(self, *, drain: float = 10.0, **options: Any) -> Iterator[Worker]:
        """A worker in a thread, until the block ends; its end is waited for."""
        worker = Worker(self.task_app, **{"concurrency": 4, **options})
        self._workers.append(worker)
        thread = threading.Thread(target=worker.run, name="room-worker", daemon=True)
        thread.start()
        try:
            wait_until(worker.ready.is_set, "the worker is ready", PATIENCE)
            yield worker
        finally:
            worker.stop(drain)
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the worker did not stop"

    def burst(self, **options: Any) -> None:
        """Run a worker until the queues are empty."""
        worker = Worker(self.task_app, burst=True, **{"concurrency": 4, **options})
        thread = threading.Thread(target=worker.run, name="room-burst", daemon=True)
        thread.start()
        thread.join(PATIENCE)
        alive = thread.is_alive()
        worker.stop(0)
        thread.join(PATIENCE)
        assert not alive, "the burst did not end"

    # -- the broker -----------------------------------------------------------------------

    @contextmanager
    def connection(self) -> Iterator[kombu.Connection]:
        """A connection of its own to the broker."""
        connection = broker_connection(self.config, role="publish")
        try:
            yield connection
        finally:
            connection.release()

    def send_raw(
        self,
        body: bytes | str,
        *,
        headers: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        content_encoding: str = "utf-8",
        queue: str | None = None,
    ) -> None:
        """Put a message on a queue that no task call would make."""
        queue = queue or self.queue
        with self.connection() as connection:
            producer = kombu.Producer(connection.default_channel)
            producer.publish(
                body,
                exchange="",
                routing_key=queue,
                content_type=content_type,
                content_encoding=content_encoding,
                headers=dict(headers or {}),
                declare=[task_queue(queue)],
                delivery_mode=2,
            )

    def take_all(self, queue: str, count: int) -> Sequence[Any]:
        """Take so many messages out of a queue; fails if they do not come."""
        taken: list[Any] = []
        with self.connection() as connection:
            bound = task_queue(queue)(connection.default_channel)
            bound.declare()

            def take() -> bool:
                message = bound.get(no_ack=True)
                if message is not None:
                    taken.append(message)
                return len(taken) >= count

            wait_until(take, f"{count} messages in {queue}", PATIENCE)
            assert bound.get(no_ack=True) is None, f"more than {count} messages in {queue}"
        return taken

    def close(self) -> None:
        self.gate.set()
        for worker in self._workers:
            # A run that outlived its worker stores its result over a connection of its own.
            wait_until(lambda pool=worker.pool: not pool.running(), "the last runs", PATIENCE)
        self.task_app.close()
