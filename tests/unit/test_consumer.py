"""The loop at the moments between its steps."""

import threading
from pathlib import Path

from flask import Flask

from flask_taskworker import BackgroundTaskWorker
from flask_taskworker.worker.delivery import Delivery, Outcome
from flask_taskworker.worker.pool import ThreadPool
from flask_taskworker.worker.supervisor import Worker


def test_a_task_that_ends_while_the_worker_stops_is_settled(tmp_path: Path) -> None:
    app = Flask("shop", instance_path=str(tmp_path))
    task_worker = BackgroundTaskWorker(app)
    started, gate, runs = threading.Event(), threading.Event(), []

    @task_worker.define_task
    def wait() -> None:
        runs.append(1)
        started.set()
        gate.wait(10)

    wait.delay()
    task_app = task_worker.task_app()
    worker = Worker(task_app, concurrency=1)
    consumer = worker.consumer

    class EndsUnseen(ThreadPool):
        """As if the run had ended right after the loop asked for what has ended."""

        hidden = False

        def finished(self) -> list[tuple[Delivery, Outcome]]:
            if consumer._stopping and self._done and not self.hidden:
                self.hidden = True
                return []
            return super().finished()

    consumer.pool = worker.pool = EndsUnseen(1, worker._executor.run, worker._waker.wake)
    thread = threading.Thread(target=worker.run)
    thread.start()
    assert started.wait(10)
    worker.stop(10)
    gate.set()
    thread.join(10)
    assert not thread.is_alive()
    Worker(task_app, concurrency=1, burst=True).run()
    assert runs == [1]
    task_app.close()
