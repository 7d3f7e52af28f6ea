"""Builds a worker of its parts, runs it, and ends it."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from ..exceptions import ConfigurationError
from .consumer import Consumer
from .executor import Executor
from .pool import Pool, SoloPool, ThreadPool
from .waker import Waker

if TYPE_CHECKING:
    from ..app import TaskApp

log = logging.getLogger("flask_taskworker.worker")

#: Expired results are deleted at least this often, in seconds.
CLEANUP_INTERVAL = 60.0
#: ... and after this pause while there are more of them.
CLEANUP_PAUSE = 0.5

PoolName = Literal["threads", "solo"]
POOLS: tuple[PoolName, ...] = ("threads", "solo")


class Worker:
    """One consumer with its pool.

    :param app: whose tasks it runs.
    :param queues: the queues to read; the default is ``TASKER_DEFAULT_QUEUE`` and the
        queues that the app's tasks name.
    :param concurrency: how many tasks at once; the default is ``TASKER_CONCURRENCY``.
    :param pool: ``"threads"``, or ``"solo"`` for one task at a time in this thread.
    :param hostname: the node name; ``%h`` stands for the host, ``%n`` for its first part.
    :param burst: end when the queues are empty.
    """

    def __init__(
        self,
        app: TaskApp,
        *,
        queues: Sequence[str] | None = None,
        concurrency: int | None = None,
        pool: PoolName = "threads",
        hostname: str | None = None,
        burst: bool = False,
    ) -> None:
        self.app = app
        self.queues = list(queues) if queues else default_queues(app)
        self.hostname = node_name(hostname)
        self.ready = threading.Event()
        self._waker = Waker()
        atomic = app.backend.shares_database_with(app.config.broker_url)
        self._executor = Executor(app, self.hostname, stores_with_settlement=atomic)
        self.pool_name = pool
        self.pool = self._make_pool(pool, concurrency or app.config.concurrency)
        self.consumer = Consumer(
            app,
            self.pool,
            self.queues,
            self._waker,
            burst=burst,
            on_ready=self._is_ready,
            maintain=self._maintain,
        )

    def _make_pool(self, name: str, size: int) -> Pool:
        if name == "threads":
            return ThreadPool(size, self._executor.run, self._waker.wake)
        if name == "solo":
            return SoloPool(self._executor.run)
        raise ConfigurationError(f"there is no pool {name!r}; use one of {', '.join(POOLS)}")

    def run(self) -> None:
        """Work until :meth:`stop` is called, or in a burst until the queues are empty."""
        try:
            self.consumer.run()
        finally:
            self.ready.clear()
            self._executor.close()
            self.pool.stop()
            self._waker.close()
            log.info("%s stopped", self.hostname)

    def stop(self, drain_timeout: float | None = None) -> None:
        """Ask the worker to end; returns at once.

        :param drain_timeout: seconds for running tasks to end, by default
            ``TASKER_DRAIN_TIMEOUT``. What still runs then goes back to its queue.
        """
        if drain_timeout is None:
            drain_timeout = self.app.config.drain_timeout
        self.consumer.stop(drain_timeout)

    def _is_ready(self) -> None:
        self.ready.set()
        log.info("%s ready, reading %s", self.hostname, ", ".join(self.queues))

    def _maintain(self) -> float:
        """Upkeep while idle; return the seconds until the next."""
        try:
            more = self.app.backend.cleanup() > 0
        except Exception as exc:  # upkeep must never stop the work
            log.warning("expired results could not be deleted: %s", exc)
            more = False
        return CLEANUP_PAUSE if more else CLEANUP_INTERVAL


def default_queues(app: TaskApp) -> list[str]:
    """The default queue, and each queue that one of the app's tasks names."""
    named = {task.options_.get("queue") for task in app.registry.values()}
    return list(dict.fromkeys([app.config.default_queue, *sorted(filter(None, named))]))


def node_name(template: str | None) -> str:
    """A node name from a template such as ``mail@%h``."""
    host = socket.gethostname()
    name = template or "worker@%h"
    if "@" not in name:
        name += "@%h"
    return name.replace("%h", host).replace("%n", host.split(".", 1)[0])


@contextmanager
def os_signals(worker: Worker) -> Iterator[None]:
    """Let SIGTERM and SIGINT end the worker: once warm, twice at once. Main thread only."""
    seen = 0

    def stop(signum: int, frame: object) -> None:
        nonlocal seen
        seen += 1
        worker.stop(None if seen == 1 else 0.0)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
