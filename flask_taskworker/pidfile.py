"""Files that say which process runs, and prove it by a lock.

The number in such a file proves nothing: after a crash it may be that of another process,
and in a container it is the same after each start. The lock ends with the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time

from .exceptions import ConfigurationError

#: How long a start waits for somebody who only looks whether the lock is held. Seconds.
_PATIENCE = 0.5
_PAUSE = 0.02


class PidFile:
    """The file of this process, from :meth:`acquire` to :meth:`release`.

    :param path: where it is.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: int | None = None
        self._pid = 0

    def acquire(self) -> None:
        """Write this process's id. A file that a dead process left behind is taken over.

        :raises ConfigurationError: if the process it names is alive, or it cannot be written.
        """
        deadline = time.monotonic() + _PATIENCE
        while self._file is None:
            try:
                self._file = self._open_locked()
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ConfigurationError(
                        f"{self.path} is held by process {_number(self.path)}, which is running. "
                        "Stop that one first, or name another --pidfile"
                    ) from None
                time.sleep(_PAUSE)
            except OSError as exc:
                raise ConfigurationError(
                    f"the pid file {self.path} cannot be written: {exc.strerror or exc}"
                ) from exc
        self._pid = os.getpid()
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{self._pid}\n".encode(), 0)

    def _open_locked(self) -> int | None:
        """The file with the lock on it; None if it was removed meanwhile."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(self.path) and os.path.samestat(os.fstat(file), os.stat(self.path)):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        return None

    def touch(self) -> None:
        """Show that this process is not only alive, but at work."""
        with contextlib.suppress(OSError):  # somebody removed it
            os.utime(self.path)

    def release(self) -> None:
        """Remove the file. In a forked child, and a second time, nothing happens."""
        if self._file is None or self._pid != os.getpid():
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._file), os.stat(self.path)):
                os.unlink(self.path)
        os.close(self._file)
        self._file = None


def holder(path: str) -> int | None:
    """The id of the living process that holds a pid file; None if there is none."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _number(path)
    finally:
        os.close(file)
    return None


def age(path: str) -> float:
    """Seconds since the process last touched its file."""
    return time.time() - os.stat(path).st_mtime


def _number(path: str) -> int | None:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return int(file.read(32))
    except (OSError, ValueError):
        return None
