"""huey on SQLite as it comes: WAL, every commit on the disk, at most once."""

from __future__ import annotations

from functools import partial

from flask import Flask
from huey import SqliteHuey

from .. import bodies
from ..system import APP_MODULE, Client, Place, System

_WORKER = ["huey.bin.huey_consumer", f"{APP_MODULE}.app"]

SYSTEMS = [
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
    )
]


def build(place: Place) -> Client:
    app = SqliteHuey(place.queue, filename=f"{place.folder}/huey.db")
    inside = partial(bodies.in_app_context, Flask(__name__))
    return Client(
        app=app,
        send=app.task()(inside(bodies.noop)),  # a result of None is not stored
        send_stored=app.task()(inside(bodies.stored)),
        send_nap=app.task()(inside(bodies.nap)),
        get=lambda handle, timeout: handle.get(blocking=True, timeout=timeout),
    )
