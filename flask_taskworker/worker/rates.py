"""How many runs of a task may start in a time: ``rate_limit``.

Each limited task has a token bucket that holds one token, as in Celery: runs start evenly,
never in a burst. A run that has to wait reserves its token, so that what waits in this worker
starts in the order it came, and at most so much waits here: the rest goes back to the store.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import clock
from ..options import runs_per_second

if TYPE_CHECKING:
    from ..app import TaskApp

#: A run that may start within so many seconds waits in this worker, where the store can delay
#: messages; at least the next one always does.
AHEAD = 2.0
#: The longest that a message is sent away for, in seconds: a limit may be raised meanwhile, or
#: another worker come.
AWAY = 60.0


@dataclass
class _Bucket:
    """One token, which comes back ``1 / rate`` seconds after it was taken."""

    rate: float
    #: When the next token is free, on the monotonic clock.
    free_at: float = 0.0
    #: When the last of the messages that were sent away comes back.
    back_at: float = 0.0

    def reserve(self, now: float) -> float:
        start = max(now, self.free_at)
        self.free_at = start + 1 / self.rate
        return start - now

    def send_away(self, now: float) -> float:
        self.back_at = max(self.back_at, self.free_at, now) + 1 / self.rate
        return min(self.back_at - now, AWAY)


class RateLimits:
    """The limits of one worker. Safe to change from other threads."""

    def __init__(self, app: TaskApp) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._changed: dict[str, float | None] = {}  # by remote control
        self._buckets: dict[str, _Bucket] = {}
        #: Counts the changes: what waits has to be asked about again.
        self.version = 0

    def set(self, task_name: str, rate: str | float | None) -> None:
        """Change a task's limit until this worker ends.

        :param rate: as the option ``rate_limit``; None or 0 is without limit.
        :raises ValueError: if it is no rate.
        """
        a_second = runs_per_second(rate)
        with self._lock:
            self._changed[task_name] = a_second
            self._buckets.pop(task_name, None)
            self.version += 1

    def reserve(self, task_name: str, at_most: float = float("inf")) -> float | None:
        """Take the next token of a task.

        :param at_most: how many seconds it may take until it is free.
        :return: these seconds, 0 if the run may start now; None if it would take longer,
            and no token was taken.
        """
        with self._lock:
            bucket = self._bucket(task_name)
            if bucket is None:
                return 0.0
            now = clock.monotonic()
            if bucket.free_at - now > max(at_most, 1 / bucket.rate):
                return None
            return bucket.reserve(now)

    def send_away(self, task_name: str) -> float:
        """For how many seconds a message should leave that found no token."""
        with self._lock:
            bucket = self._bucket(task_name)
            return 0.0 if bucket is None else bucket.send_away(clock.monotonic())

    def _bucket(self, name: str) -> _Bucket | None:
        bucket = self._buckets.get(name)
        if bucket is None:
            rate = self._rate(name)
            if rate is None:
                return None
            bucket = self._buckets[name] = _Bucket(rate)
        return bucket

    def _rate(self, name: str) -> float | None:
        if name in self._changed:
            return self._changed[name]
        if name not in self._app.registry:
            return None
        return runs_per_second(self._app.option_of(name, "rate_limit"))
