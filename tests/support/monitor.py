"""Follows the event stream of an app."""

from __future__ import annotations

import threading

from flask_taskworker import events
from flask_taskworker.app import TaskApp
from flask_taskworker.broker import broker_connection
from flask_taskworker.events import Event
from flask_taskworker.worker.supervisor import Worker

from .shapes import captured
from .waiting import wait_until

_PATIENCE = 20.0


class Monitor:
    """Collects the events of one app."""

    def __init__(self, task_app: TaskApp) -> None:
        self.task_app = task_app
        self.seen: list[Event] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def _listen(self) -> None:
        for event in events.receive(self.task_app, on_ready=self._ready.set):
            if event["type"] == "test-end":
                return
            self.seen.append(event)

    def __enter__(self) -> Monitor:
        self._thread.start()
        assert self._ready.wait(_PATIENCE)
        return self

    def __exit__(self, *exc_info: object) -> None:
        with broker_connection(self.task_app.config, role="publish") as connection:
            end = events.event("test-end", "test", 0, {})
            events.publish(connection.default_channel, end, "test.end", "test")
        self._thread.join(_PATIENCE)
        assert not self._thread.is_alive()

    def of(self, worker: Worker) -> list[Event]:
        return [event for event in self.seen if event["hostname"] == worker.hostname]

    def wait_for(self, type: str, uuid: str | None = None) -> Event:
        def found() -> Event | None:
            for event in list(self.seen):
                if event["type"] == type and uuid in (None, event.get("uuid")):
                    return event
            return None

        event = wait_until(found, f"{type} of {uuid}", _PATIENCE)
        assert event is not None
        return event


def assert_form(event: Event) -> None:
    """An event has the fields of Celery's, and values of their types."""
    known = captured("events", event["type"])
    assert sorted(event) in known["field_sets"], event
    examples = [example for example in known["examples"] if sorted(example) == sorted(event)]
    for name, value in event.items():
        types = {type(example[name]).__name__ for example in examples} | {"float", "NoneType"}
        assert type(value).__name__ in types, (name, value)
