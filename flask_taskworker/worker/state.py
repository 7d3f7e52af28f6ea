"""What can be seen of a worker at work, from any thread. Nothing here locks, or changes it."""

from __future__ import annotations

import os
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any, TypeVar

from .. import clock
from ..texts import safe_repr
from ..transports.fleet import fleet_of
from .delivery import Delivery
from .revoked import Revoked

if TYPE_CHECKING:
    from ..app import TaskApp
    from ..transports.fleet import Fleet
    from .events import EventSender
    from .supervisor import Worker

T = TypeVar("T")

#: How long a question to the consumer's thread may wait for its turn. Seconds.
_PATIENCE = 1.0


class WorkerState:
    """A view of a worker, and what remote control keeps about it.

    :param worker: whose.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.app: TaskApp = worker.app
        self.hostname = worker.hostname
        self.revoked = Revoked()
        self.started_at = clock.monotonic()
        #: How many runs have ended, by task.
        self.ended: Counter[str] = Counter()
        #: What remote control has set, by task.
        self.rate_limits: dict[str, str | float | None] = {}
        #: What ``memsample`` has answered.
        self.samples: list[str] = []
        self.events: EventSender
        #: The channel that commands came through, and what its broker keeps for all workers.
        self.channel: Any = None
        self.fleet: Fleet | None = None

    def ask_consumer(self, action: Callable[[], T]) -> T | None:
        """Do something in the consumer's thread; its result, or None if that takes long."""
        answer: Future[T] = Future()

        def act() -> None:
            try:
                answer.set_result(action())
            except Exception as exc:
                answer.set_exception(exc)

        self.worker.consumer.request(act)
        try:
            return answer.result(_PATIENCE)
        except FutureTimeout:
            return None

    def keep(self, action: Callable[[Fleet], object]) -> None:
        """Do something with what the broker keeps for all workers, where it keeps anything."""
        if self.fleet is not None:
            action(self.fleet)

    def take_over(self, channel: Any) -> None:
        """Learn from the broker what is revoked, and which queues rest.

        In the consumer's thread before it reads: no revoked task may slip through.
        """
        fleet = fleet_of(channel)
        if fleet is None:
            return
        self.revoked.load(fleet.revoked())
        if not fleet.pauses_by_itself:
            self.worker.consumer.subscriptions.resting = fleet.paused()

    # -- deliveries -----------------------------------------------------------------------

    def active(self) -> list[Delivery]:
        """What is running."""
        found = {id(delivery): delivery for delivery in self.worker.pool.running()}
        for delivery in self.worker.consumer.unsettled():
            if delivery.started is not None:
                found[id(delivery)] = delivery
        return list(found.values())

    def scheduled(self) -> list[Delivery]:
        """What waits here for its time, the next one first."""
        return self.worker.consumer.held()

    def reserved(self) -> list[Delivery]:
        """What waits here for a free slot."""
        held = {id(delivery) for delivery in self.scheduled()}
        return [
            delivery
            for delivery in self.worker.consumer.unsettled()
            if delivery.started is None and id(delivery) not in held
        ]

    def find(self, ids: Iterable[str]) -> dict[str, tuple[str, Delivery]]:
        """What is here of some tasks, with the word for where it is."""
        wanted = set(ids)
        found: dict[str, tuple[str, Delivery]] = {}
        for word, deliveries in (
            ("active", self.active()),
            ("scheduled", self.scheduled()),
            ("reserved", self.reserved()),
        ):
            for delivery in deliveries:
                if delivery.message.id in wanted:
                    found.setdefault(delivery.message.id, (word, delivery))
        return found

    def info(self, delivery: Delivery, safe: bool = False) -> dict[str, Any]:
        """A delivery in the words of Celery.

        :param safe: the arguments as text, which can be sent whatever they are.
        """
        message = delivery.message
        info = delivery.raw.delivery_info or {}
        args: Any = list(message.payload.args)
        kwargs: Any = dict(message.payload.kwargs)
        if safe:
            args, kwargs = words(message.argsrepr, tuple(args)), words(message.kwargsrepr, kwargs)
        return {
            "id": message.id,
            "name": message.shadow or message.task,
            "args": args,
            "kwargs": kwargs,
            "type": message.task,
            "hostname": self.hostname,
            "time_start": delivery.started,
            "acknowledged": delivery.acknowledged,
            "delivery_info": {
                "exchange": info.get("exchange"),
                "routing_key": info.get("routing_key"),
                "priority": message.priority,
                "redelivered": bool(info.get("redelivered")),
            },
            "worker_pid": delivery.pid,
        }

    # -- figures --------------------------------------------------------------------------

    def totals(self) -> dict[str, int]:
        """How many runs have begun, by task."""
        running = Counter(delivery.message.task for delivery in self.active())
        return dict(Counter(dict(self.ended)) + running)

    def stats(self) -> dict[str, Any]:
        """What ``inspect stats`` answers."""
        worker = self.worker
        stats = {
            "total": self.totals(),
            "pid": os.getpid(),
            "clock": str(self.app.clock.value),
            "uptime": int(clock.monotonic() - self.started_at),
            "pool": {
                "max-tasks-per-child": "N/A",
                "put-guarded-by-semaphore": False,
                "timeouts": [worker.limits.soft or 0, worker.limits.hard or 0],
                **worker.pool.info(),
            },
            "broker": self._broker(),
            "prefetch_count": worker.consumer.prefetch_limit,
            "rusage": _resources(),
        }
        if worker.autoscaler is not None:
            stats["autoscaler"] = worker.autoscaler.info()
        return stats

    def _broker(self) -> dict[str, Any]:
        from ..broker import broker_connection
        from ..config import mask_url

        connection = broker_connection(self.app.config, role="consume")
        info: dict[str, Any] = dict(connection.info())
        info.pop("password", None)
        if "://" in str(info["hostname"]):  # a URL as a whole, as SQLAlchemy takes it
            info["hostname"] = mask_url(info["hostname"])
        info["alternates"] = [mask_url(url) for url in info.get("alternates") or ()]
        secret = {"password", "credential_provider", "ssl", "sentinel_kwargs"}
        info["transport_options"] = {
            name: value if isinstance(value, (int, float, bool, type(None))) else safe_repr(value)
            for name, value in (info.get("transport_options") or {}).items()
            if name not in secret
        }
        info["ssl"] = bool(info.get("ssl"))
        info["credential_provider"] = None
        return info


def version() -> str:
    """The release of this package; its own module is a layer above this one."""
    return str(sys.modules["flask_taskworker"].__version__)


def words(written: str | None, value: object) -> str:
    """An argument as text: as its sender wrote it, else our own."""
    return written if written is not None else safe_repr(value)


def _resources() -> dict[str, Any]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    names = (
        "utime", "stime", "maxrss", "ixrss", "idrss", "isrss", "minflt", "majflt", "nswap",
        "inblock", "oublock", "msgsnd", "msgrcv", "nsignals", "nvcsw", "nivcsw",
    )  # fmt: skip
    return {name: getattr(usage, f"ru_{name}") for name in names}
