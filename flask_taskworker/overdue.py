"""Ends operations that take too long, where the library that does them knows no limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from . import clock

T = TypeVar("T", bound=Hashable)

#: How often it is looked whether something is overdue. Seconds.
_LOOK = 0.2
#: The thread that looks ends after so many looks at nothing.
_IDLE_LOOKS = 10


class Overdue(Generic[T]):
    """Cuts what is not done in time. Its thread lives as long as there is something to watch.

    :param cut: called with an item from another thread; ends what its own thread waits for.
    """

    def __init__(self, cut: Callable[[T], object]) -> None:
        self._cut = cut
        self._due: dict[T, float] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def watched(self, item: T, due: float) -> Iterator[None]:
        """Cut ``item`` if the block has not ended at ``due``, a time of the monotonic clock."""
        self._due[item] = due
        # The thread looks for work once more after it has taken itself out: one sees the other.
        # In a forked child it is not alive.
        thread = self._thread
        if thread is None or not thread.is_alive():
            self._start()
        try:
            yield
        finally:
            self._due.pop(item, None)

    def _start(self) -> None:
        thread = threading.Thread(target=self._look, name="taskworker-overdue", daemon=True)
        self._thread = thread
        thread.start()

    def _look(self) -> None:
        idle = 0
        while idle < _IDLE_LOOKS or not self._may_end():
            time.sleep(_LOOK)
            idle = 0 if self._due else idle + 1
            for item, due in list(self._due.items()):
                if due <= clock.monotonic() and self._due.pop(item, None) is not None:
                    self._cut(item)

    def _may_end(self) -> bool:
        self._thread = None
        if not self._due:
            return True
        self._thread = threading.current_thread()
        return False
