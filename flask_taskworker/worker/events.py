"""Tells what happens in a worker to the event stream.

The consumer's thread only notes what happened; the thread of remote control, which has a
connection of its own, sends it. A broken connection costs events and nothing else.
"""

from __future__ import annotations

import os
import platform
from collections import deque
from collections.abc import Callable
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
#: How many events are sent as one message.
TOGETHER = 100
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
        self._noted: deque[events.Noted] = deque(maxlen=WAITING)
        self._clock = state.app.clock

    # -- the consumer's thread ------------------------------------------------------------

    def received(self, delivery: Delivery) -> None:
        if not (self.tasks and self.open):
            return
        delivery.watched = True
        message = delivery.message
        fields = {
            "uuid": message.id,
            "name": message.task,
            "args": words(message.argsrepr, message.payload.args),
            "kwargs": words(message.kwargsrepr, message.payload.kwargs),
            "root_id": message.root_id,
            "parent_id": message.parent_id,
            "retries": message.retries,
            "eta": message.eta and message.eta.isoformat(),
            "expires": message.expires and message.expires.isoformat(),
        }
        self._note("task-received", clock.wall(), fields)

    def started(self, delivery: Delivery) -> None:
        if not delivery.announced:
            delivery.announced = True
            self._note(
                "task-started", delivery.started or clock.wall(), {"uuid": delivery.message.id}
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
                type, clock.wall(), {"uuid": delivery.message.id, **fields(self, delivery, outcome)}
            )

    def _note(self, type: str, at: float, fields: dict[str, Any]) -> None:
        noted = self._noted
        noted.append((type, at, self._clock.forward(), fields))
        if len(noted) == 1:
            self._wake()

    def _succeeded(self, delivery: Delivery, outcome: Outcome) -> dict[str, Any]:
        return {"result": outcome.shown, "runtime": outcome.runtime}

    def _raised(self, delivery: Delivery, outcome: Outcome) -> dict[str, Any]:
        return {"exception": outcome.shown, "traceback": outcome.traceback}

    def _revoked(self, delivery: Delivery, outcome: Outcome) -> dict[str, Any]:
        signum = delivery.terminated
        return {
            "terminated": signum is not None,
            "signum": signum,
            "expired": signum is None and delivery.message.has_expired(),
        }

    def _rejected(self, delivery: Delivery, outcome: Outcome) -> dict[str, Any]:
        return {"requeue": outcome.settlement is Settlement.REQUEUE}

    # -- the thread that sends ------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """How many events are to be sent."""
        return len(self._noted)

    def send(self, channel: Any) -> None:
        """Send what was noted."""
        hostname, noted = self._state.hostname, self._noted
        while noted:
            batch = [noted.popleft() for _ in range(min(len(noted), TOGETHER))]
            events.publish(channel, events.written(hostname, batch), events.MULTI, hostname)

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


_END: dict[str, tuple[str, Callable[[EventSender, Delivery, Outcome], dict[str, Any]]]] = {
    states.SUCCESS: ("task-succeeded", EventSender._succeeded),
    states.FAILURE: ("task-failed", EventSender._raised),
    states.RETRY: ("task-retried", EventSender._raised),
    states.REVOKED: ("task-revoked", EventSender._revoked),
    states.REJECTED: ("task-rejected", EventSender._rejected),
}
