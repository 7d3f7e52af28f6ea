"""Celery with the broker and the results in SQLite, set up as Flask's documentation says."""

from __future__ import annotations

from typing import Any

from celery import Celery, Task
from flask import Flask

from .. import bodies
from ..system import APP_MODULE, Client, Place, System

_WORKER = ["celery", "-A", f"{APP_MODULE}:app", "worker"]

SYSTEMS = [
    System(
        name="celery",
        adapter="celery",
        workers={
            "solo": [*_WORKER, "-P", "solo"],
            "prefork2": [*_WORKER, "-P", "prefork", "-c", "2"],
        },
        steady="prefork2",
        wide=[*_WORKER, "-P", "threads", "-c", "20"],
        ready=" ready.",
        talkative=["-l", "INFO"],
        import_statement="import celery; celery.Celery('x').task(lambda: 1, name='x')",
    )
]


def build(place: Place) -> Client:
    flask_app = Flask(__name__)

    class FlaskTask(Task):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with flask_app.app_context():
                return self.run(*args, **kwargs)

    app = Celery(flask_app.name, task_cls=FlaskTask)
    app.conf.update(
        broker_url=f"sqla+sqlite:///{place.folder}/broker.db",
        result_backend=f"db+sqlite:///{place.folder}/results.db",
        task_default_queue=place.queue,
        broker_connection_retry_on_startup=True,
    )
    app.set_default()
    return Client(
        app=app,
        send=app.task(bodies.noop, ignore_result=True).delay,
        send_stored=app.task(bodies.stored).delay,
        send_nap=app.task(bodies.nap, ignore_result=True).delay,
        get=lambda handle, timeout: handle.get(timeout=timeout),
    )
