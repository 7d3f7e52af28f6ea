"""dramatiq on Redis and RabbitMQ, with the app context from a middleware."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from flask import Flask

from .. import bodies, stores
from ..system import APP_MODULE, Client, Place, System

_WORKER = ["dramatiq", APP_MODULE]
_REDIS = 14


def systems(store: str) -> Sequence[System]:
    if store == "redis":
        return [_system("dramatiq", store)]
    if store == "rabbitmq":  # as it comes it does not wait until the server has a message
        confirmed = _system("dramatiq-confirmed", store, frozenset({"enqueue"}))
        return [_system("dramatiq", store), confirmed]
    return []


def _system(name: str, store: str, measures: frozenset[str] | None = None) -> System:
    return System(
        name=name,
        adapter="dramatiq",
        workers={
            "threads8": [*_WORKER, "-p", "1", "-t", "8"],
            "processes2": [*_WORKER, "-p", "2", "-t", "8"],
        },
        steady="processes2",
        wide=[*_WORKER, "-p", "1", "-t", "20"],
        ready="Worker process is ready for action",
        import_statement="import dramatiq",
        options={"store": store, "confirm": "yes" if name.endswith("confirmed") else ""},
        measures=measures,
    )


def build(place: Place) -> Client:
    broker, clean_up = _broker(place)
    broker.add_middleware(Results(backend=RedisBackend(url=stores.redis_database(_REDIS))))
    dramatiq.set_broker(broker)
    inside = partial(bodies.in_app_context, Flask(__name__))
    actor = partial(dramatiq.actor, queue_name=place.queue)
    return Client(
        app=broker,
        send=actor(inside(bodies.noop)).send,
        send_stored=actor(inside(bodies.stored), store_results=True).send,
        send_nap=actor(inside(bodies.nap)).send,
        get=lambda handle, timeout: handle.get_result(block=True, timeout=int(timeout * 1000)),
        clean_up=clean_up,
    )


def _broker(place: Place) -> tuple[dramatiq.Broker, Callable[[], object]]:
    def clean_up() -> None:
        stores.empty_redis(_REDIS)  # the results are there in any case
        if place.options["store"] == "rabbitmq":
            stores.delete_queues(place.queue, f"{place.queue}.DQ", f"{place.queue}.XQ")

    if place.options["store"] == "redis":
        return RedisBroker(url=stores.redis_database(_REDIS), namespace=place.queue), clean_up
    confirm = bool(place.options["confirm"])
    return RabbitmqBroker(url=stores.server("rabbitmq"), confirm_delivery=confirm), clean_up
