"""Builds a worker of its parts, runs it, and ends it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from .. import signals
from ..exceptions import ConfigurationError, WorkerError
from ..kinds import POOLS as POOL_NAMES
from ..queues import known_queues
from .autoscaler import Autoscaler
from .consumer import Consumer
from .control import RemoteControl
from .events import EventSender
from .executor import Executor
from .limits import ThreadAlarm, TimeLimits, refuse_hard_limits
from .nodes import node_name
from .os_signals import os_signals
from .pool import Pool
from .pools.solo import SoloPool
from .pools.threads import ThreadPool
from .rates import RateLimits
from .state import WorkerState
from .waker import Waker
from .watchdog import Watchdog

if TYPE_CHECKING:
    from ..app import TaskApp
    from .delivery import Delivery, Outcome
    from .pools.source import AppSource

__all__ = ["POOLS", "PoolName", "Worker", "os_signals"]

log = logging.getLogger("flask_taskworker.worker")

#: Expired results are deleted at least this often, in seconds.
CLEANUP_INTERVAL = 60.0
#: ... and after this pause while there are more of them.
CLEANUP_PAUSE = 0.5

PoolName = Literal["threads", "processes", "prefork", "solo"]
POOLS: tuple[PoolName, ...] = ("threads", "processes", "prefork", "solo")


class Worker:
    """One consumer with its pool.

    :param app: whose tasks it runs.
    :param queues: the queues to read; the default is ``TASKER_DEFAULT_QUEUE`` and the
        queues that the app's tasks name.
    :param concurrency: how many tasks at once; the default is ``TASKER_CONCURRENCY``.
    :param pool: ``"threads"``; ``"processes"`` (or ``"prefork"``, Celery's name for it);
        ``"solo"`` for one task at a time in this thread. The default is ``TASKER_POOL``, or
        threads.
    :param source: where the child processes of the processes pool find the app.
    :param max_tasks_per_child: the default is ``TASKER_MAX_TASKS_PER_CHILD``.
    :param max_memory_per_child: in KiB; the default is ``TASKER_MAX_MEMORY_PER_CHILD``.
    :param autoscale: most and fewest tasks at once, instead of ``concurrency``.
    :param time_limit: in seconds; the default is ``TASKER_TASK_TIME_LIMIT``.
    :param soft_time_limit: in seconds; the default is ``TASKER_TASK_SOFT_TIME_LIMIT``.
    :param hostname: the node name; ``%h`` stands for the host, ``%n`` for its first part.
    :param burst: end when the queues are empty.
    :param task_events: send an event for each step of a task; the default is
        ``TASKER_SEND_TASK_EVENTS``.
    """

    def __init__(
        self,
        app: TaskApp,
        *,
        queues: Sequence[str] | None = None,
        concurrency: int | None = None,
        pool: PoolName | None = None,
        hostname: str | None = None,
        burst: bool = False,
        source: AppSource | None = None,
        max_tasks_per_child: int | None = None,
        max_memory_per_child: int | None = None,
        autoscale: tuple[int, int] | None = None,
        time_limit: float | None = None,
        soft_time_limit: float | None = None,
        task_events: bool | None = None,
    ) -> None:
        self.app = app
        self.queues = list(queues) if queues else known_queues(app)
        self.hostname = node_name(hostname)
        self.ready = threading.Event()
        #: Whether the process is to start the same command again once the worker has ended.
        self.restarting = False
        self._stop_reason = ""
        self.rates = RateLimits(app)
        self._waker = Waker()
        self.limits = TimeLimits(app, time_limit, soft_time_limit)
        self._fault: WorkerError | None = None
        atomic = app.backend.shares_database_with(app.config.broker_url)
        self._executor = Executor(
            app, self.hostname, stores_with_settlement=atomic, alarm=ThreadAlarm()
        )
        self.pool_name = POOL_NAMES.get(pool or app.config.pool or "threads", str(pool))
        size = concurrency or app.config.concurrency
        if autoscale is not None:
            size = max(1, autoscale[1])
        most_tasks = max_tasks_per_child or app.config.max_tasks_per_child
        most_memory = max_memory_per_child or app.config.max_memory_per_child
        try:
            self.pool = self._make_pool(size, source, most_tasks, most_memory)
        except BaseException:
            self._waker.close()
            raise
        self.autoscaler = Autoscaler(self.pool, *autoscale) if autoscale is not None else None
        self.state = WorkerState(self)
        self.remote = RemoteControl(self.state, answers=app.config.remote_control)
        told = app.config.send_task_events if task_events is None else task_events
        self.state.events = EventSender(self.state, self.remote.wake, tasks=told)
        self.consumer = Consumer(
            app,
            self.pool,
            self.queues,
            self._waker,
            burst=burst,
            on_connected=self.state.take_over,
            on_ready=self._is_ready,
            maintain=self._maintain,
            scale=self.autoscaler.scale if self.autoscaler else lambda more_to_come: None,
            rates=self.rates,
            on_stopping=self._is_stopping,
            observer=self.state.events,
            refuse=self._refuse,
            limits=self.limits,
        )
        signals.celeryd_init.notify(self.hostname, instance=self, conf=app.config, options={})
        signals.celeryd_after_setup.notify(self.hostname, instance=self, conf=app.config)

    def _make_pool(
        self, size: int, source: AppSource | None, max_tasks: int | None, max_memory: int | None
    ) -> Pool:
        executor, name = self._executor, self.pool_name
        if name == "processes":
            from .pools import make_process_pool  # POSIX alone has what it needs

            return make_process_pool(
                executor,
                self.hostname,
                source,
                size,
                on_news=self._waker.wake,
                on_fault=self._end_by,
                max_tasks=max_tasks,
                max_memory=max_memory,
            )
        refuse_hard_limits(self.app, self.queues, name, self.limits)
        if name == "threads":
            return ThreadPool(
                size, executor.run, self._waker.wake, executor.is_async, executor.run_async
            )
        if name == "solo":
            return SoloPool(executor.run)
        raise ConfigurationError(f"there is no pool {name!r}; use one of {', '.join(POOLS)}")

    def _end_by(self, fault: WorkerError) -> None:
        self._fault = fault
        self.consumer.stop(0.0)

    def run(self) -> None:
        """Work until :meth:`stop` is called, or in a burst until the queues are empty.

        :raises WorkerError: if the pool cannot run anything, as with an app that its child
            processes cannot load.
        """
        signals.worker_init.notify(self)
        self.pool.start()
        self.remote.start()
        try:
            with Watchdog(self.consumer):
                self.consumer.run()
        finally:
            self.ready.clear()
            self.remote.stop()
            self._executor.close()
            self.pool.stop()
            self._waker.close()
            signals.worker_shutdown.notify(self)
            log.info("%s stopped", self.hostname)
        if self._fault is not None:
            raise self._fault

    def stop(self, drain_timeout: float | None = None, *, reason: str = "") -> None:
        """Ask the worker to end; returns at once. Safe in a signal handler.

        :param drain_timeout: seconds for running tasks to end, by default
            ``TASKER_DRAIN_TIMEOUT``. What still runs then goes back to its queue.
        :param reason: who asks, for the log: the name of a signal.
        """
        self._stop_reason = self._stop_reason or reason
        if drain_timeout is None:
            drain_timeout = self.app.config.drain_timeout
        self.consumer.stop(drain_timeout)

    def restart(self, *, reason: str = "SIGHUP") -> None:
        """Ask the worker to end as :meth:`stop` does, and its process to start anew.

        Takes effect in a process whose signals the worker has; elsewhere it only ends.

        :param reason: who asks, for the log.
        """
        self.restarting = True
        self.stop(reason=reason)

    def _refuse(self, delivery: Delivery) -> Outcome | None:
        """What becomes of a delivery that must not run."""
        revoked = self.state.revoked.covers(delivery.message)
        return self._executor.revoked(delivery) if revoked else None

    def _is_ready(self) -> None:
        if not self.ready.is_set():
            signals.worker_ready.notify(self.consumer)
        self.ready.set()
        log.info("%s ready, reading %s", self.hostname, ", ".join(self.queues))

    def _is_stopping(self, seconds: float) -> None:
        """Told in the consumer's thread: a signal handler may not log."""
        running = [f"{run.message.task}[{run.message.id}]" for run in self.pool.running()]
        signals.worker_shutting_down.notify(
            self.hostname,
            sig=self._stop_reason.removeprefix("SIG") or None,
            how="Warm" if seconds > 0 else "Cold",
            exitcode=0,
        )
        who = f" after {self._stop_reason}" if self._stop_reason else ""
        if running:
            log.info(
                "%s stops%s; up to %.0f s for %s", self.hostname, who, seconds, ", ".join(running)
            )
        else:
            log.info("%s stops%s", self.hostname, who)

    def _maintain(self) -> float:
        """Upkeep while idle; return the seconds until the next."""
        try:
            more = self.app.backend.cleanup() > 0
        except Exception as exc:  # upkeep must never stop the work
            log.warning("expired results could not be deleted: %s", exc)
            more = False
        return CLEANUP_PAUSE if more else CLEANUP_INTERVAL
