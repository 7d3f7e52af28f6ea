"""The loop at the moments between its steps."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

from flask import Flask

from flask_taskworker import BackgroundTaskWorker, clock, signals
from flask_taskworker.message import Payload, TaskMessage, encode
from flask_taskworker.worker.delivery import Delivery, Outcome
from flask_taskworker.worker.pools.threads import ThreadPool
from flask_taskworker.worker.supervisor import Worker
from support import make_app, run_worker, wait_until


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
            if consumer._stop.made and self._done and not self.hidden:
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


def test_many_messages_that_are_not_due_do_not_hold_up_one_that_is() -> None:
    """On a broker that cannot delay, they wait in the worker's memory."""
    app = make_app()
    task_worker = BackgroundTaskWorker(app)
    done = threading.Event()

    @task_worker.define_task
    def later() -> None:
        raise AssertionError("not yet")

    @task_worker.define_task
    def now() -> None:
        done.set()

    for _ in range(100):
        later.apply_async(countdown=3600)
    now.delay()
    task_app = task_worker.task_app()
    with run_worker(task_app) as worker:
        assert done.wait(8)
        assert len(worker.consumer.held()) == 100
    assert task_app.publisher.queue_size(app.config["TASKER_DEFAULT_QUEUE"]) == 100
    task_app.close()


def test_what_comes_due_at_once_starts_as_slots_are_free() -> None:
    app = make_app()
    task_worker = BackgroundTaskWorker(app)
    most, running, lock = [0], [0], threading.Lock()
    runs: list[int] = []

    @task_worker.define_task
    def work(number: int) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.002)
        with lock:
            running[0] -= 1
            runs.append(number)

    for number in range(20):
        work.apply_async([number], countdown=0.3)
    with run_worker(task_worker.task_app(), size=2) as worker:
        wait_until(lambda: len(runs) == 20, "all have run", 8)
        assert worker.consumer.held() == []
    assert sorted(runs) == list(range(20))
    assert most[0] <= 2


def test_messages_of_others_that_are_not_due_wait_in_the_store(tmp_path: Path) -> None:
    """A Celery client's ETA is in the headers alone: the queue hands it out at once."""
    app = make_app(TASKER_ENGINE="sqlalchemy")
    app.instance_path = str(tmp_path)
    task_worker = BackgroundTaskWorker(app)

    @task_worker.define_task(name="later")
    def later() -> None:
        raise AssertionError("not yet")

    done = threading.Event()
    task_worker.define_task(name="now")(done.set)
    task_app = task_worker.task_app()
    queue = app.config["TASKER_DEFAULT_QUEUE"]
    for number in range(30):
        message = TaskMessage(
            "later", str(number), Payload(), eta=clock.utcnow() + timedelta(hours=1)
        )
        task_app.publisher.send(queue, encode(message))
    task_app.registry["now"].delay()
    with run_worker(task_app) as worker:
        assert done.wait(8)
        wait_until(lambda: not worker.consumer.unsettled(), "nothing is held here")
        assert worker.consumer.held() == []


def test_signals_of_a_message_s_way(tmp_path: Path) -> None:
    heard: list[str] = []

    def hearing(name: str) -> Any:
        def hear(sender: Any, **details: Any) -> None:
            heard.append(name)
            if name == "before_task_publish":
                details["headers"]["x-trace"] = "abc"

        return hear

    names = (
        "before_task_publish", "after_task_publish", "worker_init", "worker_ready",
        "task_received", "task_success", "worker_shutting_down", "worker_shutdown",
    )  # fmt: skip
    receivers = {name: hearing(name) for name in names}
    for name, receiver in receivers.items():
        getattr(signals, name).connect(receiver)
    try:
        app = make_app()
        task_worker = BackgroundTaskWorker(app)
        traces: list[Any] = []

        @task_worker.define_task(bind=True)
        def work(self: Any) -> None:
            traces.append(self.request.headers)

        work.delay()
        with run_worker(task_worker.task_app()):
            wait_until(lambda: "task_success" in heard, "it has run")
    finally:
        for name, receiver in receivers.items():
            getattr(signals, name).disconnect(receiver)
    assert heard == list(names)
    assert traces == [{"x-trace": "abc"}]
