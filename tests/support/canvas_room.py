"""An app whose tasks are made to be put together, on any broker and result backend."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flask import Flask

from flask_taskworker import BaseTaskWorker, Task, group
from flask_taskworker.worker.supervisor import Worker


class CanvasRoom:
    """Tasks, what they did, and workers for them.

    :param settings: ``TASKER_*`` settings.
    :param folder: the instance folder.
    :param queue: the default queue.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path, queue: str) -> None:
        self.app = Flask("canvas", instance_path=str(folder))
        self.app.config.update(settings, TASKER_DEFAULT_QUEUE=queue)
        self.task_worker = BaseTaskWorker(self.app)
        self.task_app = self.task_worker.task_app()
        self.queue = queue
        self._lock = threading.Lock()
        #: Names and values of what happened.
        self.events: list[tuple[str, Any]] = []
        #: Holds the tasks ``meet`` until it is set.
        self.gate = threading.Event()
        self._define()

    def note(self, name: str, value: Any) -> None:
        with self._lock:
            self.events.append((name, value))

    def count(self, name: str) -> Counter[Any]:
        """How often each value was noted under a name."""
        with self._lock:
            return Counter(value for noted, value in self.events if noted == name)

    def _define(self) -> None:
        room = self

        def define(**options: Any) -> Any:
            return self.task_worker.define_task(**options)

        @define(name="add")
        def add(x: int, y: int) -> int:
            return x + y

        @define(name="xsum")
        def xsum(numbers: Any) -> int:
            room.note("xsum", room.xsum.request.id)
            return sum(n if isinstance(n, int) else sum(n) for n in numbers)

        @define(name="ident")
        def ident(value: Any) -> Any:
            return value

        @define(name="noted")
        def noted(value: Any) -> Any:
            room.note("noted", value)
            return value

        @define(name="silent", ignore_result=True)
        def silent(value: Any) -> Any:
            return value

        @define(name="fail")
        def fail(*args: Any) -> None:
            raise ValueError("boom", *args)

        @define(name="meet")
        def meet(value: Any) -> Any:
            room.gate.wait(20)
            return value

        @define(name="errback")
        def errback(request: Any, exc: Exception, traceback: str | None) -> None:
            room.note("errback", (request.id, repr(exc)))

        @define(name="errback_old")
        def errback_old(task_id: str) -> str:
            state = room.task_app.result(task_id).state
            room.note("errback_old", (task_id, state))
            return task_id

        @define(name="again", bind=True, max_retries=5)
        def again(self: Task[..., Any], value: int, times: int = 2) -> int:
            if self.request.retries < times:
                raise self.retry(countdown=0)
            return value

        @define(name="replaced", bind=True)
        def replaced(self: Task[..., Any], x: int) -> Any:
            return self.replace(room.add.s(x, 1))

        @define(name="replaced_by_group", bind=True)
        def replaced_by_group(self: Task[..., Any], x: int) -> Any:
            return self.replace(group(room.add.s(x, 1), room.add.s(x, 2)))

        @define(name="replaced_by_chain", bind=True)
        def replaced_by_chain(self: Task[..., Any], x: int) -> Any:
            return self.replace(room.add.s(x, 1) | room.add.s(10))

        @define(name="joined", bind=True)
        def joined(self: Task[..., Any], x: int) -> int:
            self.add_to_chord(room.add.si(x, 100))
            return x

        @define(name="spawn")
        def spawn(n: int) -> int:
            for i in range(n):
                room.add.delay(i, i)
            return n

        self.add, self.xsum, self.ident, self.noted = add, xsum, ident, noted
        self.silent, self.fail, self.meet = silent, fail, meet
        self.errback, self.errback_old, self.again = errback, errback_old, again
        self.replaced, self.replaced_by_group = replaced, replaced_by_group
        self.replaced_by_chain, self.joined, self.spawn = replaced_by_chain, joined, spawn

    @contextmanager
    def working(self, workers: int = 1, concurrency: int = 4) -> Iterator[list[Worker]]:
        """Workers that run in this process until the block ends."""
        started = [Worker(self.task_app, concurrency=concurrency) for _ in range(workers)]
        threads = [threading.Thread(target=worker.run) for worker in started]
        for thread in threads:
            thread.start()
        try:
            for worker in started:
                assert worker.ready.wait(20), "a worker did not get ready"
            yield started
        finally:
            self.gate.set()
            for worker in started:
                worker.stop(5)
            for thread in threads:
                thread.join(20)
            assert not any(thread.is_alive() for thread in threads), "a worker did not stop"

    def close(self) -> None:
        self.task_app.close()
