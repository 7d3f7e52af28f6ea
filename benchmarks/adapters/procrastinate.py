"""procrastinate on PostgreSQL; it stores no results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import procrastinate
from flask import Flask

from .. import bodies, stores
from ..system import APP_MODULE, Client, Place, System

_WORKER = ["procrastinate", f"--app={APP_MODULE}.app"]
_MEASURES = frozenset({"imports", "enqueue", "drain", "startup", "idle", "sleeps", "crash"})


def systems(store: str) -> Sequence[System]:
    if store != "postgresql":
        return []
    return [
        System(
            name="procrastinate",
            adapter="procrastinate",
            workers={"c1": _command("1"), "c10": _command("10")},
            steady="c10",
            wide=_command("20"),
            ready="Starting worker on",
            import_statement="import procrastinate",
            measures=_MEASURES,
        )
    ]


def _command(concurrency: str) -> list[str]:
    return [*_WORKER, "worker", "-c", concurrency]


def build(place: Place) -> Client:
    url = stores.postgresql_schema(place.queue)
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url))
    inside = partial(bodies.in_app_context, Flask(__name__))
    noop = app.task(queue=place.queue, name="noop")(inside(bodies.noop))
    nap = app.task(queue=place.queue, name="nap")(inside(bodies.nap))

    @cache
    def open_once() -> None:  # a worker opens the app itself, in its event loop
        app.open()
        app.schema_manager.apply_schema()

    def send(number: int) -> object:
        open_once()
        return noop.defer(number=number)

    def send_nap(number: int, seconds: float) -> object:
        open_once()
        return nap.defer(number=number, seconds=seconds)

    def refuse(number: int) -> object:
        raise NotImplementedError("procrastinate stores no results")

    def clean_up() -> None:
        if open_once.cache_info().currsize:
            app.close()
        stores.drop_schema(place.queue)

    return Client(
        app=app,
        send=send,
        send_stored=refuse,
        send_nap=send_nap,
        get=lambda handle, timeout: None,
        clean_up=clean_up,
    )
