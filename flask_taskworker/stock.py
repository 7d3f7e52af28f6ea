"""A small stock of connections that threads borrow one at a time."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from .exceptions import BrokerUnavailableError

T = TypeVar("T")

#: A thread that waits for a connection looks for one at least this often. Seconds.
_LOOK = 0.05


class Stock(Generic[T]):
    """Hands out idle connections, the latest used first, and opens new ones up to a limit.

    A server that answers each request in a thread of its own so does not open a
    connection for each. A forked child starts with an empty stock: it neither uses nor
    closes what its parent opened.

    :param make: opens a connection.
    :param close: closes one.
    :param drop: closes one that failed, or may have; the default is ``close``.
    :param limit: how many may be open at once.
    :param patience: seconds to wait for one when all are lent.
    """

    def __init__(
        self,
        make: Callable[[], T],
        close: Callable[[T], None],
        limit: int,
        patience: float,
        drop: Callable[[T], None] | None = None,
    ) -> None:
        self._make, self._close, self._drop = make, close, drop or close
        self._limit, self._patience = limit, patience
        self._inherited: list[list[T]] = []
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._idle: list[T] = []
        self._open = 0
        self._changed = threading.Condition()

    def take(self, patience: float | None = None) -> T:
        """Borrow a connection; give it to :meth:`give_back` or :meth:`discard` afterwards.

        :param patience: seconds, instead of the stock's own.
        :raises BrokerUnavailableError: if all stay lent for longer than ``patience``.
        """
        if self._pid != os.getpid():
            # Kept, so that no destructor in this child talks on the parent's sockets.
            self._inherited.append(self._idle)
            self._start()
        try:
            return self._idle.pop()  # atomic: the usual case takes no lock
        except IndexError:
            return self._open_or_wait(self._patience if patience is None else patience)

    def _open_or_wait(self, patience: float) -> T:
        deadline = time.monotonic() + patience
        with self._changed:
            while True:
                if self._idle:
                    return self._idle.pop()
                if self._open < self._limit:
                    self._open += 1
                    break
                left = deadline - time.monotonic()
                if left <= 0:
                    raise BrokerUnavailableError(
                        f"all {self._limit} connections were in use for {patience:.1f} s. "
                        "Raise TASKER_POOL_LIMIT if that is normal load."
                    )
                self._changed.wait(min(left, _LOOK))
        try:
            return self._make()
        except BaseException:
            self._one_less()
            raise

    def give_back(self, item: T) -> None:
        """Return a connection that can be used again."""
        self._idle.append(item)

    def discard(self, item: T) -> None:
        """Return a connection that failed; it is dropped."""
        self._end(item, self._drop)

    def _end(self, item: T, close: Callable[[T], None]) -> None:
        try:
            with contextlib.suppress(Exception):  # it was broken already
                close(item)
        finally:
            self._one_less()

    def _one_less(self) -> None:
        with self._changed:
            self._open -= 1
            self._changed.notify()

    @contextlib.contextmanager
    def lent(self) -> Iterator[T]:
        """Borrow a connection for a block; one whose block raises is closed."""
        item = self.take()
        try:
            yield item
        except BaseException:
            self.discard(item)
            raise
        self.give_back(item)

    def close(self) -> None:
        """Close what is idle, if this process opened it."""
        self._end_idle(self._close)

    def discard_idle(self) -> None:
        """Drop what is idle, if this process opened it: the server failed somebody."""
        self._end_idle(self._drop)

    def _end_idle(self, close: Callable[[T], None]) -> None:
        while self._pid == os.getpid():
            try:
                item = self._idle.pop()
            except IndexError:
                return
            self._end(item, close)
