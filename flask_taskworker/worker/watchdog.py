"""Notices when the consumer's loop stands still, shows where, and frees it."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from typing import TYPE_CHECKING

from .. import clock
from ..broker import interrupt

if TYPE_CHECKING:
    from .consumer import Consumer

log = logging.getLogger("flask_taskworker.worker")

#: A loop that has not turned for so long stands still: each of its waits is bounded by less.
#: Seconds.
STALLED_AFTER = 60.0
#: Seconds between two looks.
INTERVAL = 5.0


class Watchdog:
    """Watches a consumer that runs in the thread which enters the block.

    :param consumer: whose loop it is.
    :param after: how long it may stand still, in seconds, instead of :data:`STALLED_AFTER`.
    :param interval: seconds between two looks, instead of :data:`INTERVAL`.
    """

    def __init__(
        self, consumer: Consumer, after: float | None = None, interval: float | None = None
    ) -> None:
        self._consumer = consumer
        self._after = max(after or STALLED_AFTER, 2 * consumer.app.config.loop_interval)
        self._interval = interval or INTERVAL
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        self._thread = threading.Thread(
            target=self._watch,
            args=(threading.get_ident(),),
            name="taskworker-watchdog",
            daemon=True,
        )
        self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._end.set()

    def _watch(self, ident: int) -> None:
        consumer = self._consumer
        looked = forgiven = clock.monotonic()
        while not self._end.wait(self._interval):
            now = clock.monotonic()
            if now - looked > self._interval + self._after / 2:
                forgiven = now  # this thread stood still as well: the whole process was stopped
            looked = now
            still = now - max(consumer.turned_at, forgiven)
            if still < self._after or consumer.in_task:
                continue
            forgiven = now  # what comes now may take its time
            stack = "".join(traceback.format_stack(sys._current_frames().get(ident)))
            log.error(
                "the worker's loop has stood still for %.0f s; its connection to the broker is "
                "cut. It is at:\n%s",
                still,
                stack,
            )
            if consumer.connection is None or not interrupt(consumer.connection):
                log.error("there is no connection to cut: nothing can be done from here")
