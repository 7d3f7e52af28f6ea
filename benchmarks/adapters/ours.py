"""Flask-TaskWorker: SQLite by default, another transport with ``--broker``."""

from __future__ import annotations

import os

import kombu
from flask import Flask

from flask_taskworker import BackgroundTaskWorker

from .. import bodies
from ..system import APP_MODULE, Client, Place, System

_WORKER = ["flask_taskworker", "-A", f"{APP_MODULE}:app", "worker", "-q"]


def _system(name: str, durability: str, measures: frozenset[str] | None) -> System:
    return System(
        name=name,
        adapter="ours",
        workers={
            "threads4": [*_WORKER, "-c", "4"],
            "threads1": [*_WORKER, "-c", "1"],
            "solo": [*_WORKER, "-P", "solo"],
        },
        steady="threads4",
        wide=[*_WORKER, "-c", "20"],
        ready="ready, reading",
        talkative=["-l", "info"],
        quiet=["-l", "warning"],  # Celery's default
        import_statement="import flask_taskworker",
        options={"durability": durability, "broker": os.environ.get("BENCH_BROKER", "")},
        measures=measures,
    )


SYSTEMS = [
    _system("ours", "full", None),
    _system("ours-normal", "normal", frozenset({"enqueue"})),
]


def build(place: Place) -> Client:
    app = Flask(__name__)
    app.config.update(
        TASKER_DATABASE_URI=f"sqlite:///{place.folder}/ours.db",
        TASKER_DURABILITY=place.options["durability"],
        TASKER_DEFAULT_QUEUE=place.queue,
        TASKER_RESULT_EXPIRES=600,
    )
    broker = place.options["broker"]
    if broker:
        del app.config["TASKER_DATABASE_URI"]
        app.config["TASKER_BROKER_URL"] = broker
    worker = BackgroundTaskWorker(app)
    noop = worker.define_task(ignore_result=True)(bodies.noop)
    nap = worker.define_task(ignore_result=True)(bodies.nap)
    stored = worker.define_task(bodies.stored)

    def delete_queue() -> None:
        if broker:
            with kombu.Connection(broker) as connection:
                connection.default_channel.queue_delete(place.queue)

    return Client(
        app=app,
        send=noop.delay,
        send_stored=stored.delay,
        send_nap=nap.delay,
        get=lambda handle, timeout: handle.get(timeout=timeout),
        clean_up=delete_queue,
    )
