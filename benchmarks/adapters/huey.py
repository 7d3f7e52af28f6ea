"""huey as it comes: at most once; on SQLite in WAL mode with every commit on the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from flask import Flask
from huey import Huey, PostgresHuey, RedisHuey, SqliteHuey

from .. import bodies, stores
from ..system import APP_MODULE, Client, Place, System

_WORKER = ["huey.bin.huey_consumer", f"{APP_MODULE}.app"]
_REDIS = 13


def systems(store: str) -> Sequence[System]:
    if store == "rabbitmq":
        return []
    return [
        System(
            name="huey",
            adapter="huey",
            workers={
                "threads1": [*_WORKER, "-k", "thread", "-w", "1"],
                "processes2": [*_WORKER, "-k", "process", "-w", "2"],
            },
            steady="threads1",
            wide=[*_WORKER, "-k", "thread", "-w", "20"],
            ready="Huey consumer started",
            quiet=["-q"],
            import_statement="import huey; huey.SqliteHuey",
            options={"store": store},
        )
    ]


def build(place: Place) -> Client:
    app, clean_up = _huey(place)
    inside = partial(bodies.in_app_context, Flask(__name__))
    return Client(
        app=app,
        send=app.task()(inside(bodies.noop)),  # a result of None is not stored
        send_stored=app.task()(inside(bodies.stored)),
        send_nap=app.task()(inside(bodies.nap)),
        get=lambda handle, timeout: handle.get(blocking=True, timeout=timeout),
        clean_up=clean_up,
    )


def _huey(place: Place) -> tuple[Huey, Callable[[], object]]:
    store = place.options["store"]
    if store == "postgresql":
        app = PostgresHuey(place.queue, dsn=stores.postgresql_schema(place.queue))
        return app, lambda: stores.drop_schema(place.queue)
    if store == "redis":
        app = RedisHuey(place.queue, url=stores.redis_database(_REDIS))
        return app, lambda: stores.empty_redis(_REDIS)
    return SqliteHuey(place.queue, filename=f"{place.folder}/huey.db"), lambda: None
