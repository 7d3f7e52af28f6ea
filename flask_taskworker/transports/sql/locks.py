"""Locks that end with the process, however it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import threading

try:
    import fcntl
except ImportError:  # Windows: the lease alone tells who is alive
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)


class ProcessLocks:
    """Locks on single bytes of a file, one byte per consumer.

    The kernel frees them when the process dies, so a peer learns of a kill -9 by asking.
    POSIX drops all locks of a process on a file as soon as it closes *any* descriptor of
    it, and grants a process its own locks once more: there must be one object per process and
    file, shared by all who use the file, and nobody else may open it.

    :param path: the file; created if missing, readable for its owner only.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._held: set[int] = set()
        self._lock = threading.Lock()
        self._fd: int | None = None

    def hold(self, number: int) -> bool:
        """Lock a byte; False where there are no such locks."""
        with self._lock:
            fd = self._open()
            if fd is None:
                return False
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except OSError:
                return False
            self._held.add(number)
            return True

    def drop(self, number: int) -> None:
        """Unlock a byte."""
        with self._lock:
            self._held.discard(number)
            if self._fd is not None:
                with contextlib.suppress(OSError):
                    fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, number)

    def is_held(self, number: int) -> bool | None:
        """Whether any process holds the byte; None where that cannot be known."""
        with self._lock:
            if number in self._held:
                return True  # the kernel would grant us our own lock once more
            fd = self._open()
            if fd is None:
                return None
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except OSError:
                return True
            fcntl.lockf(fd, fcntl.LOCK_UN, 1, number)
            return False

    def close(self) -> None:
        """Close the file, unless somebody in this process still holds a byte of it."""
        with self._lock:
            if not self._held and self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def _open(self) -> int | None:
        if self._fd is None and fcntl is not None:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
            try:
                self._fd = os.open(self._path, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)
            except OSError as exc:
                log.warning("no liveness locks (%s): a dead consumer is noticed by its lease", exc)
        return self._fd
