"""The kinds of pools, and what they share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ... import clock
from ...exceptions import ConfigurationError, WorkerError
from ..delivery import Delivery
from .source import AppSource, traits

if TYPE_CHECKING:
    from ..executor import Executor
    from ..pool import Pool


#: Whether a process with an app in it cannot be forked: the system's own libraries have threads.
MUST_SPAWN = sys.platform == "darwin"


def mark_started(delivery: Delivery) -> None:
    """Note that the run of a delivery begins here and now."""
    delivery.started, delivery.pid = clock.wall(), os.getpid()


def info(implementation: str, size: int, processes: Sequence[int], **more: Any) -> dict[str, Any]:
    """What remote control shows of a pool, in Celery's words."""
    return {
        "implementation": f"flask_taskworker.worker.pools.{implementation}",
        "max-concurrency": size,
        "processes": list(processes),
        **more,
    }


def shares(jobs: Sequence[int]) -> dict[str, Any]:
    """How many jobs each child was given, in Celery's words."""
    total = sum(jobs)
    parts = [count / total if total else 0.0 for count in jobs]
    return {
        "total": total,
        "avg": f"{1 / len(jobs) if total else 0.0:.2f}",
        "all": ", ".join(f"{part:.2f}" for part in parts),
        "raw": ", ".join(map(str, jobs)),
        "strategy": "fair",
        "inqueues": {"total": len(jobs), "active": 0},
    }


def make_process_pool(
    executor: Executor,
    hostname: str,
    source: AppSource | None,
    size: int,
    *,
    on_news: Callable[[], None],
    on_fault: Callable[[WorkerError], None],
    max_tasks: int | None,
    max_memory: int | None,
) -> Pool:
    """A pool of child processes for one worker.

    :param source: where the children find the app; ``TASKER_APP`` wins.
    :raises ConfigurationError: if that is not known, or this system has no such processes.
    """
    if os.name != "posix":
        raise ConfigurationError(
            f"the pool processes needs the signals of POSIX, which {sys.platform} does not have; "
            "use the pool threads (-P threads)"
        )
    from .endings import Endings
    from .processes import ProcessPool

    app = executor.app
    if app.config.app is not None:
        known = source or AppSource("flask_taskworker.target:from_target", None)
        source = replace(known, argument=app.config.app)
    if source is None:
        raise ConfigurationError(
            "the pool processes has to load the app in each child process, and this worker does "
            "not know from where. Set TASKER_APP to a text such as 'module:app' or "
            "\"module:create_app('production')\", or use the pool threads."
        )
    setup = {
        "source": source.plain(),
        "expected": traits(app),
        "options": {
            "hostname": hostname,
            "atomic": executor.stores_with_settlement,
            "memory": max_memory is not None,
        },
        "fork": not MUST_SPAWN,
    }
    return ProcessPool(
        size,
        setup,
        Endings(executor),
        on_news,
        on_fault,
        max_tasks=max_tasks,
        max_memory=max_memory,
    )
