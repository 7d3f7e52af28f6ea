"""A worker as the one thing that a program does."""

from __future__ import annotations

import contextlib
import math
import os
from functools import partial
from typing import TYPE_CHECKING

from .. import clock
from .daemon import SignOfLife
from .os_signals import os_signals
from .reload import Reloader, SourceWatch
from .watchdog import STALLED_AFTER

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
) -> None:
    """Run a worker until a signal ends it, or in a burst until the queues are empty.

    Main thread only. Where a signal, or a changed file, asks for a fresh start of the
    program, this does not return.

    :param pid_file: the acquired file that shows the worker's life.
    :param watch: knows the files whose change asks for a fresh start.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(os_signals(worker))
        if pid_file is not None:
            stack.enter_context(SignOfLife(pid_file, lambda: is_at_work(worker)))
        if watch is not None:
            changed = partial(worker.restart, reason="a change of the program")
            stack.enter_context(Reloader(watch, changed))
        worker.run()


def is_at_work(worker: Worker) -> bool:
    """Whether the worker's loop turns, or stands still for a task that runs in it."""
    allowed = max(STALLED_AFTER, 2 * worker.app.config.loop_interval)
    consumer = worker.consumer
    return consumer.in_task or clock.monotonic() - consumer.turned_at < allowed
