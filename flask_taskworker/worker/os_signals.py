"""What a worker's process does when the operating system sends it a signal."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from .daemon import own_command

if TYPE_CHECKING:
    from .supervisor import Worker

log = logging.getLogger("flask_taskworker.worker")

_Handler = Callable[[int, "FrameType | None"], None]


@contextmanager
def os_signals(worker: Worker) -> Iterator[None]:
    """Let signals end, restart or show a worker while the block runs. Main thread only.

    ========== ==============================================================================
    TERM, INT  End when the running tasks have, at the latest after ``TASKER_DRAIN_TIMEOUT``.
               A second one ends it at once.
    QUIT       End at once: what still runs goes back to its queue.
    HUP        End like TERM, and start the same command again. In a terminal, only end: there
               it says that the terminal is gone. Where it was ignored, as by ``nohup``, it is
               ignored still.
    USR1       Write the stacks of all threads to stderr.
    ========== ==============================================================================
    """
    previous = {
        number: signal.signal(number, handler) for number, handler in _handlers(worker).items()
    }
    shows = _show_stacks_on(getattr(signal, "SIGUSR1", None))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if shows is not None:
            faulthandler.unregister(shows)
    if worker.restarting:
        start_anew()


def _handlers(worker: Worker) -> dict[signal.Signals, _Handler]:
    asked = False

    def warm(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        worker.stop(0.0 if asked else None, reason=signal.Signals(number).name)
        asked = True

    def cold(number: int, frame: FrameType | None) -> None:
        worker.stop(0.0, reason=signal.Signals(number).name)

    def restart(number: int, frame: FrameType | None) -> None:
        worker.restart()

    handlers: dict[signal.Signals, _Handler] = {signal.SIGINT: warm, signal.SIGTERM: warm}
    if hasattr(signal, "SIGQUIT"):  # not on Windows
        handlers[signal.SIGQUIT] = cold
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        handlers[signal.SIGHUP] = warm if _in_terminal() else restart
    return handlers


def _in_terminal() -> bool:
    try:
        return os.isatty(0)
    except OSError:
        return False


def _show_stacks_on(number: int | None) -> int | None:
    """Works even while the main thread is stuck, since no Python code runs for it."""
    if number is None or sys.__stderr__ is None:
        return None
    with suppress(OSError, ValueError, AttributeError, RuntimeError):  # stderr may be no file
        faulthandler.register(number, file=sys.__stderr__, all_threads=True)
        return number
    return None


def start_anew() -> None:
    """Become a new process of the same command, with the same id."""
    command = own_command()
    log.info("starting again: %s", " ".join(command))
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        with suppress(Exception):
            stream.flush()
    os.execv(command[0], command)
