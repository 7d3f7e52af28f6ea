"""A worker as the one thing that a program does."""

from __future__ import annotations

import contextlib
import math
import os
from typing import TYPE_CHECKING

from .daemon import SignOfLife
from .reload import Reloader, SourceWatch
from .supervisor import os_signals

if TYPE_CHECKING:
    from ..pidfile import PidFile
    from .supervisor import Worker


def usable_cpus(quota_file: str = "/sys/fs/cgroup/cpu.max") -> int:
    """How many processors this process may use: those it may run on, within its container's quota.

    :param quota_file: where Linux says how much time of how much a container may have.
    """
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        usable = os.cpu_count() or 1
    try:
        with open(quota_file, encoding="ascii") as file:
            quota, period = file.read().split()
        return max(1, min(usable, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no container, or "max"
        return usable


def serve(
    worker: Worker, pid_file: PidFile | None = None, watch: SourceWatch | None = None
) -> bool:
    """Run a worker until a signal ends it, or in a burst until the queues are empty.

    :param pid_file: the acquired file that shows the worker's life.
    :param watch: ends the worker as well when a source file changes.
    :return: whether one did. Main thread only.
    """

    def last_turn() -> float | None:
        # A solo worker runs its tasks in the loop, and they may take as long as they like.
        return None if worker.pool_name == "solo" else worker.consumer.turned_at

    with contextlib.ExitStack() as stack:
        stack.enter_context(os_signals(worker))
        if pid_file is not None:
            stack.enter_context(SignOfLife(pid_file, last_turn))
        if watch is None:
            worker.run()
            return False
        reloader = stack.enter_context(Reloader(watch, worker.stop))
        worker.run()
    return reloader.file is not None
