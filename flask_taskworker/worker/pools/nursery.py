"""The pool's side of the process that children are made of; see :mod:`.template`."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

from . import template, wire
from .offspring import Offspring

#: How long the template may take to end its children and itself. Seconds.
FAREWELL = 2.0


class Nursery:
    """Starts a template, and has it make children.

    :param setup: what the template gets; see :func:`.template.main`.
    :param turns: the file whose locks say who reads from a line.
    """

    def __init__(self, setup: dict[str, Any], turns: int) -> None:
        self._control, theirs = socket.socketpair()
        call = f"main({theirs.fileno()}, {turns}, {setup!r})"
        self._process = subprocess.Popen(
            template.interpreter_arguments(template.__name__, call),
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), turns),
        )
        theirs.close()
        self._control.setblocking(False)
        self._frames = wire.Frames()

    def fileno(self) -> int:
        """Readable when there is news."""
        return self._control.fileno()

    def order(self, child: Offspring) -> bool:
        """Have a child made; False if the template is gone, which :meth:`news` says too."""
        try:
            socket.send_fds(
                self._control,
                [template.ORDER.pack(child.serial)],
                [child.tail.fileno(), child.reports.fileno()],
            )
        except OSError:
            return False
        child.reports.close()  # so that its end is seen here
        return True

    def news(self) -> Iterator[list[Any]]:
        """What has happened: ``ready``, ``failed``, ``forked``, ``ended``.

        :raises EOFError: if the template is gone.
        """
        try:
            while data := self._control.recv(1 << 16):
                yield from self._frames.feed(data)
        except BlockingIOError:
            return
        except (OSError, wire.BrokenFrame) as exc:
            raise EOFError(str(exc)) from exc
        raise EOFError

    def close(self) -> None:
        """End the template, and with it whatever children it still has."""
        self._control.close()
        try:
            self._process.wait(FAREWELL)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                self._process.kill()
            self._process.wait()
