"""Flask-TaskWorker, with one setting changed for each store."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from flask import Flask

from flask_taskworker import BackgroundTaskWorker

from .. import bodies, stores
from ..system import APP_MODULE, Client, Place, System

_WORKER = ["flask_taskworker", "-A", f"{APP_MODULE}:app", "worker", "-q"]
_REDIS = 11


def _system(name: str, durability: str, measures: frozenset[str] | None, store: str) -> System:
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
        options={
            "durability": durability,
            "store": store,
            "unconfirmed": "yes" if name.endswith("unconfirmed") else "",
        },
        measures=measures,
    )


def systems(store: str) -> Sequence[System]:
    found = [_system("ours", "full", None, store)]
    if store == "sqlite":
        found.append(_system("ours-normal", "normal", frozenset({"enqueue"}), store))
    if store == "rabbitmq":  # for comparison with those that do not wait for the server
        found.append(_system("ours-unconfirmed", "full", frozenset({"enqueue"}), store))
    return found


def build(place: Place) -> Client:
    app = Flask(__name__)
    app.config.update(
        TASKER_DURABILITY=place.options["durability"],
        TASKER_DEFAULT_QUEUE=place.queue,
        TASKER_RESULT_EXPIRES=600,
    )
    clean_up = _choose_broker(app.config, place)
    worker = BackgroundTaskWorker(app)
    noop = worker.define_task(ignore_result=True)(bodies.noop)
    nap = worker.define_task(ignore_result=True)(bodies.nap)
    stored = worker.define_task(bodies.stored)
    return Client(
        app=app,
        send=noop.delay,
        send_stored=stored.delay,
        send_nap=nap.delay,
        get=lambda handle, timeout: handle.get(timeout=timeout),
        clean_up=clean_up,
    )


def _choose_broker(config: MutableMapping[str, Any], place: Place) -> Callable[[], object]:
    """Set the broker's address; returns what removes a run's traces."""
    store = place.options["store"]
    if store == "postgresql":
        config["TASKER_DATABASE_URI"] = stores.postgresql_schema(place.queue, "postgresql+psycopg")
        return lambda: stores.drop_schema(place.queue)
    if store == "redis":
        config["TASKER_BROKER_URL"] = stores.redis_database(_REDIS)
        return lambda: stores.empty_redis(_REDIS)
    if store == "rabbitmq":
        config["TASKER_BROKER_URL"] = stores.server(store)
        if place.options["unconfirmed"]:
            config["TASKER_TRANSPORT_OPTIONS"] = {"confirm_publish": False}
        return lambda: stores.delete_queues(place.queue)
    config["TASKER_DATABASE_URI"] = f"sqlite:///{place.folder}/ours.db"
    return lambda: None
