"""Wakes a thread that waits in ``select``."""

from __future__ import annotations

import contextlib
import socket


class Waker:
    """One thread waits on :meth:`fileno`; any other calls :meth:`wake`."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._rung = False

    def fileno(self) -> int:
        """Readable after :meth:`wake` until :meth:`clear`."""
        return self._reader.fileno()

    def wake(self) -> None:
        """Wake the waiting thread. Safe in a signal handler, and free if it is awake."""
        if not self._rung:
            self._rung = True
            # full: then it is readable; closed: then nobody waits
            with contextlib.suppress(OSError):
                self._writer.send(b"\0")

    def clear(self) -> None:
        """Forget earlier calls of :meth:`wake`. Look for work after this, not before."""
        if self._rung:
            # Emptied before the flag falls: a byte that came in between must not be
            # swallowed while the flag says that it is still there.
            with contextlib.suppress(OSError):
                while self._reader.recv(256):
                    pass
            self._rung = False

    def close(self) -> None:
        self._reader.close()
        self._writer.close()
