"""Tells what happens in a worker to the event stream.

The consumer's thread only notes what happened; the thread of remote control, which has a
connection of its own, sends it. A broken connection costs events and nothing else.

What is noted is JSON already, written by hand: each task has three events, and a dictionary
for each would cost more than a task that does little. Times go to the microsecond: to write
all digits of a number takes twice as long.
"""

from __future__ import annotations

import json
import os
import platform
from collections import deque
from collections.abc import Callable
from json.encoder import encode_basestring_ascii as _json
from typing import TYPE_CHECKING, Any

from .. import clock, events, states
from .delivery import Delivery, Outcome, Settlement
from .state import version, words

if TYPE_CHECKING:
    from .state import WorkerState

#: How often a worker gives a sign of life, in seconds.
HEARTBEAT = 2.0
#: How many events wait to be sent; older ones are dropped.
WAITING = 20_000
#: How much is sent as one message, in characters, unless one event is longer.
TOGETHER = 1 << 18
#: How long the first of them waits for others, in seconds.
PATIENCE = 0.05

SOFTWARE = {
    "sw_ident": "flask-taskworker",
    "sw_ver": version(),
    "sw_sys": platform.system(),
}


class EventSender:
    """Follows the deliveries of a worker; an :class:`~.observer.Observer`.

    :param state: the worker's.
    :param wake: called when there is something to send; must be fast and safe in any thread.
    :param tasks: whether to tell about tasks from the start.
    """

    def __init__(self, state: WorkerState, wake: Callable[[], None], tasks: bool) -> None:
        self._state = state
        self._wake = wake
        #: Whether it was switched on for good, and whether it is on now.
        self.always, self.tasks = tasks, tasks
        #: Whether anybody sends what is noted.
        self.open = False
        self._noted: deque[str] = deque(maxlen=WAITING)
        self._clock = state.app.clock

    # -- the consumer's thread ------------------------------------------------------------

    def received(self, delivery: Delivery) -> None:
        if not (self.tasks and self.open):
            return
        delivery.watched = True
        message = delivery.message
        args = words(message.argsrepr, message.payload.args)
        kwargs = words(message.kwargsrepr, message.payload.kwargs)
        eta = None if message.eta is None else message.eta.isoformat()
        expires = None if message.expires is None else message.expires.isoformat()
        self._note(
            f'"uuid": {_json(message.id)}, "name": {_json(message.task)}, "args": {_json(args)}, '
            f'"kwargs": {_json(kwargs)}, "root_id": {_or_null(message.root_id)}, '
            f'"parent_id": {_or_null(message.parent_id)}, "retries": {message.retries}, '
            f'"eta": {_or_null(eta)}, "expires": {_or_null(expires)}, '
            f'"timestamp": {clock.wall():.6f}, "type": "task-received"}}'
        )

    def started(self, delivery: Delivery) -> None:
        if not delivery.announced:
            delivery.announced = True
            self._note(
                f'"uuid": {_json(delivery.message.id)}, '
                f'"timestamp": {delivery.started or clock.wall():.6f}, "type": "task-started"}}'
            )

    def ended(self, delivery: Delivery, outcome: Outcome) -> None:
        state = self._state
        if delivery.started is not None:
            state.ended[delivery.message.task] += 1
        if not delivery.watched:
            return
        if delivery.started is not None:
            self.started(delivery)  # a run may end before its start was told
        told = _END.get(outcome.state)
        if told is not None:
            type, fields = told
            self._note(
                f'"uuid": {_json(delivery.message.id)}, {fields(delivery, outcome)}, '
                f'"timestamp": {clock.wall():.6f}, "type": "{type}"}}'
            )

    def _note(self, text: str) -> None:
        noted = self._noted
        noted.append(text)
        if len(noted) == 1:
            self._wake()

    # -- the thread that sends ------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """How many events are to be sent."""
        return len(self._noted)

    def send(self, channel: Any) -> None:
        """Send what was noted."""
        hostname, noted = self._state.hostname, self._noted
        while noted:
            batch, size = [], 0
            while noted and size < TOGETHER:
                text = noted.popleft()
                batch.append(text)
                size += len(text)
            body = events.written(hostname, self._count(len(batch)), batch)
            events.publish(channel, body, events.MULTI, hostname)

    def _count(self, events: int) -> int:
        """Move the logical clock for so many events; its value at the first of them."""
        with self._clock.mutex:
            first: int = self._clock.value + 1
            self._clock.value += events
        return first

    def send_about_worker(self, channel: Any, type: str) -> None:
        """Send ``worker-online``, ``worker-heartbeat`` or ``worker-offline``."""
        state = self._state
        fields = {
            "freq": HEARTBEAT,
            "active": len(state.active()),
            "processed": sum(state.totals().values()),
            "loadavg": [round(load, 2) for load in os.getloadavg()],
            **SOFTWARE,
        }
        self._send_one(channel, type, fields)

    def send_heartbeat_on_request(self, channel: Any) -> None:
        """Answer the command ``heartbeat``."""
        self._send_one(channel, "worker-heartbeat", {"freq": 5, **SOFTWARE})

    def _send_one(self, channel: Any, type: str, fields: dict[str, Any]) -> None:
        hostname = self._state.hostname
        body = events.event(type, hostname, self._clock.forward(), fields)
        events.publish(channel, body, events.routing_key(type), hostname)


def _or_null(text: str | None) -> str:
    return "null" if text is None else _json(text)


def _succeeded(delivery: Delivery, outcome: Outcome) -> str:
    return f'"result": {_json(outcome.shown)}, "runtime": {outcome.runtime:.6f}'


def _raised(delivery: Delivery, outcome: Outcome) -> str:
    return f'"exception": {_json(outcome.shown)}, "traceback": {_json(outcome.traceback)}'


def _revoked(delivery: Delivery, outcome: Outcome) -> str:
    signum = delivery.terminated
    expired = signum is None and delivery.message.has_expired()
    about = {"terminated": signum is not None, "signum": signum, "expired": expired}
    return json.dumps(about)[1:-1]


def _rejected(delivery: Delivery, outcome: Outcome) -> str:
    return f'"requeue": {json.dumps(outcome.settlement is Settlement.REQUEUE)}'


_END: dict[str, tuple[str, Callable[[Delivery, Outcome], str]]] = {
    states.SUCCESS: ("task-succeeded", _succeeded),
    states.FAILURE: ("task-failed", _raised),
    states.RETRY: ("task-retried", _raised),
    states.REVOKED: ("task-revoked", _revoked),
    states.REJECTED: ("task-rejected", _rejected),
}
