"""Celery, set up as Flask's documentation says; the broker keeps the results where it can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery, Task
from flask import Flask

from .. import bodies, stores
from ..system import APP_MODULE, Client, Place, System

_WORKER = ["celery", "-A", f"{APP_MODULE}:app", "worker"]
_REDIS = 12


def systems(store: str) -> Sequence[System]:
    found = [_system("celery", store)]
    if store == "rabbitmq":  # as it comes it does not wait until the server has a message
        found.append(_system("celery-confirmed", store, frozenset({"enqueue"})))
    return found


def _system(name: str, store: str, measures: frozenset[str] | None = None) -> System:
    return System(
        name=name,
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
        options={"store": store, "confirm": "yes" if name.endswith("confirmed") else ""},
        measures=measures,
    )


def build(place: Place) -> Client:
    flask_app = Flask(__name__)

    class FlaskTask(Task):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with flask_app.app_context():
                return self.run(*args, **kwargs)

    broker, results, clean_up = _addresses(place)
    app = Celery(flask_app.name, task_cls=FlaskTask)
    app.conf.update(
        broker_url=broker,
        result_backend=results,
        task_default_queue=place.queue,
        broker_connection_retry_on_startup=True,
    )
    if place.options["confirm"]:
        app.conf.broker_transport_options = {"confirm_publish": True}
    app.set_default()
    return Client(
        app=app,
        send=app.task(bodies.noop, ignore_result=True).delay,
        send_stored=app.task(bodies.stored).delay,
        send_nap=app.task(bodies.nap, ignore_result=True).delay,
        get=lambda handle, timeout: handle.get(timeout=timeout),
        clean_up=clean_up,
    )


def _addresses(place: Place) -> tuple[str, str, Callable[[], object]]:
    """Of the broker and of the results, and what removes a run's traces."""
    store = place.options["store"]
    if store == "postgresql":
        url = stores.postgresql_schema(place.queue, "postgresql+psycopg2")
        return f"sqla+{url}", f"db+{url}", lambda: stores.drop_schema(place.queue)
    if store == "redis":
        url = stores.redis_database(_REDIS)
        return url, url, lambda: stores.empty_redis(_REDIS)
    if store == "rabbitmq":
        return stores.server(store), "rpc://", lambda: stores.delete_queues(place.queue)
    return (
        f"sqla+sqlite:///{place.folder}/broker.db",
        f"db+sqlite:///{place.folder}/results.db",
        lambda: None,
    )
