"""Keeping :func:`os.fork` out of the database library.

SQLite has locks of its own inside the process. A fork while another thread holds one (the
heartbeat, a worker in the background) leaves it locked for ever in the child, whose first
statement then hangs. So a fork waits until no thread is inside, and holds new ones back.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: A statement may take long; after so many seconds the fork goes on regardless.
_PATIENCE = 2.0


class ForkGate:
    """Who is inside the library, and whether somebody is about to fork.

    Entering is two plain assignments: the interpreter runs them in order, as it does the
    reads of :meth:`close`, so one of the two sides always sees the other.
    """

    def __init__(self) -> None:
        self.closed = False
        self._forking: int | None = None
        self._opened = threading.Event()
        self._inside: dict[object, bool] = {}

    def enter(self, token: object) -> None:
        """Announce that this thread goes in; waits while somebody forks."""
        self._inside[token] = True
        while self.closed and self._forking != threading.get_ident():
            self._inside.pop(token, None)
            self._opened.wait(_PATIENCE)
            self._inside[token] = True

    def leave(self, token: object) -> None:
        self._inside.pop(token, None)

    @contextmanager
    def inside(self) -> Iterator[None]:
        token = object()
        self.enter(token)
        try:
            yield
        finally:
            self.leave(token)

    def close(self) -> None:
        """Wait until nobody is inside."""
        self._forking = threading.get_ident()
        self._opened.clear()
        self.closed = True
        deadline = time.monotonic() + _PATIENCE
        while self._inside and time.monotonic() < deadline:
            time.sleep(0.0002)

    def open(self) -> None:
        self.closed = False
        self._forking = None
        self._opened.set()

    def reset(self) -> None:
        """In the child: nobody is inside."""
        self._inside = {}
        self._opened = threading.Event()
        self.open()


gate = ForkGate()


def at_fork(in_child: Callable[[], None]) -> None:
    """Let every fork of this process pass the gate.

    :param in_child: called in the child before anything else runs there.
    """

    def after_in_child() -> None:
        gate.reset()
        in_child()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=gate.close, after_in_parent=gate.open, after_in_child=after_in_child
        )
