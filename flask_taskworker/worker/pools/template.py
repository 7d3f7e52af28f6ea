"""The process that children are made of: it has the app loaded, and forks on demand.

It is a program of its own, started by the pool, so that it has one thread and none of the
worker's connections. It buries the children and reports their ends, and ends them all
when the worker is gone. Where a fork of a loaded app is unsafe it loads nothing, and each
child is a new interpreter.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import struct
import sys
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

from ...exceptions import TaskWorkerError
from . import wire
from .source import AppSource, check_same

if TYPE_CHECKING:
    from ...app import TaskApp

#: The order to make a child: its serial number, with its two sockets attached.
ORDER = struct.Struct(">I")
_PR_SET_PDEATHSIG = 1


def main(control: int, turns: int, setup: dict[str, Any]) -> None:
    """Serve the pool until it is gone.

    :param control: the socket to the pool.
    :param turns: the file whose locks say who reads from a line.
    :param setup: ``source``, ``expected``, ``options`` and ``fork``.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    template = Template(socket.socket(fileno=control), turns, setup)
    if setup["fork"] and not template.load():
        os._exit(1)
    template.serve()


class Template:
    """Makes children and buries them."""

    def __init__(self, control: socket.socket, turns: int, setup: dict[str, Any]) -> None:
        self._control = control
        self._turns = turns
        self._setup = setup
        self._app: TaskApp | None = None
        self._children: set[int] = set()

    def load(self) -> bool:
        """Load the app; False if that failed, which the pool then knows."""
        try:
            self._app = load_app(self._setup)
            _warm_up(self._app)
        except BaseException as exc:
            self._tell(["failed", _told(exc)])
            return False
        _close_connections(self._app)
        gc.collect()
        gc.freeze()  # the collector would write to pages that all children share
        return True

    def serve(self) -> None:
        """Follow orders until the pool is gone."""
        ended, ending = socket.socketpair()
        for end in (ended, ending):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(ending.fileno(), warn_on_full_buffer=False)
        self._signals = (ended, ending)
        self._tell(["ready"])
        while True:
            readable, _, _ = select.select([self._control, ended], [], [])
            if ended in readable:
                with contextlib.suppress(BlockingIOError):
                    while ended.recv(256):
                        pass
                self._bury()
            if self._control in readable and not self._follow():
                self._end()

    def _follow(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self._control, ORDER.size, 2)
        except OSError:
            return False
        if len(data) != ORDER.size or len(fds) != 2:
            return False
        (serial,) = ORDER.unpack(data)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (*self._signals, self._control):
                end.close()
            _die_with(parent)
            self._become_child(serial, fds[0], fds[1])
        for fd in fds:
            os.close(fd)
        self._children.add(pid)
        self._tell(["forked", serial, pid])
        return True

    def _become_child(self, serial: int, line: int, results: int) -> NoReturn:
        if self._app is None:
            for fd in (line, results, self._turns):
                os.set_inheritable(fd, True)
            call = f"run({serial}, {line}, {results}, {self._turns}, {self._setup!r})"
            os.execv(sys.executable, interpreter_arguments(__name__, call))
        from .child import run_child

        run_child(
            self._app,
            self._setup["options"],
            serial,
            socket.socket(fileno=line),
            socket.socket(fileno=results),
            self._turns,
        )

    def _bury(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if pid in self._children:
                self._children.discard(pid)
                self._tell(["ended", pid, os.waitstatus_to_exitcode(status)])

    def _tell(self, content: list[Any]) -> None:
        try:
            self._control.sendall(wire.frame(content))
        except OSError:
            self._end()

    def _end(self) -> NoReturn:
        """The pool is gone, or wants no more: no child, and nothing they started, stays."""
        for pid in self._children:
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(OSError):
                    kill(pid, signal.SIGKILL)
        for pid in self._children:
            with contextlib.suppress(OSError):
                os.waitpid(pid, 0)
        os._exit(0)


def run(serial: int, line: int, results: int, turns: int, setup: dict[str, Any]) -> NoReturn:
    """The life of a child that is a new interpreter."""
    from .child import run_child

    for fd in (line, results, turns):
        os.set_inheritable(fd, False)
    end = socket.socket(fileno=results)
    try:
        app = load_app(setup)
    except BaseException as exc:
        with contextlib.suppress(OSError):
            end.sendall(wire.frame(["failed", _told(exc)]))
        os._exit(1)
    run_child(app, setup["options"], serial, socket.socket(fileno=line), end, turns)


def load_app(setup: dict[str, Any]) -> TaskApp:
    """The app that a setup names; raises what importing it raises, and if it is another one."""
    source = AppSource(**setup["source"])
    app = source.load()
    check_same(app, setup["expected"], source.argument)
    return app


def interpreter_arguments(module: str, call: str) -> list[str]:
    """A command that imports a function of a module as this process would, and calls it."""
    name = call.partition("(")[0]
    code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import {name}; {call}"
    return [sys.executable, "-c", code]


def _told(exc: BaseException) -> str:
    if isinstance(exc, TaskWorkerError):
        return str(exc)
    return "the app cannot be loaded:\n" + "".join(traceback.format_exception(exc)).rstrip()


def _warm_up(app: TaskApp) -> None:
    """Do here what each child would do for itself: import what a run needs, find the tables."""
    from . import child  # noqa: F401

    if app.backend.enabled and app.backend.shares_database_with(app.config.broker_url):
        with contextlib.suppress(Exception):  # the worker says it if the database is away
            app.backend.prepare()


def _close_connections(app: TaskApp) -> None:
    """Close what the app opened while it was imported: no two processes may share it."""
    app.close()
    if "sqlalchemy" in sys.modules:
        from sqlalchemy.engine import Engine

        for thing in gc.get_objects():
            if isinstance(thing, Engine):
                thing.dispose()


def _die_with(parent: int) -> None:
    """End this process when its parent ends, even if a task never returns."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
