"""A worker as a daemon: detached, as another user, with a sign of life."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from ..exceptions import ConfigurationError
from ..pidfile import PidFile

#: Seconds between two signs of life.
_BEAT = 5.0
#: Tells a program that it is the detached one already: "now", and then its process id.
_DETACHED = "TASKWORKER_DETACHED"


def own_command() -> list[str]:
    """The command that starts this program once more."""
    return [sys.executable, *sys.orig_argv[1:]]


def launch(command: Sequence[str], output: str | None) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, which outlives this one.

    :param output: the file that gets what it prints; None throws that away.
    :raises ConfigurationError: if the file cannot be written.
    """
    try:
        with open(output or os.devnull, "ab") as file:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env=os.environ | {_DETACHED: "now"},
            )
    except OSError as exc:
        raise ConfigurationError(
            f"the program cannot be started with its output in {output}: {exc.strerror or exc}"
        ) from exc


def is_detached() -> bool:
    """Whether this process is one that :func:`launch` started, even if it was started anew."""
    own = str(os.getpid())
    if os.environ.get(_DETACHED) == "now":
        os.environ[_DETACHED] = own  # what is started from here is not detached
    return os.environ.get(_DETACHED) == own


def set_umask(text: str) -> None:
    """Set the umask, written in octal as for the command of that name.

    :raises ConfigurationError: if it is no such number.
    """
    try:
        os.umask(int(text, 8))
    except (ValueError, OverflowError):
        raise ConfigurationError(f"--umask {text!r} is no octal number such as 022") from None


def become(user: str | None, group: str | None) -> None:
    """Give up the rights of root for those of a user and a group, for good.

    :param user: a name or a number; its main group is taken unless one is named.
    :param group: a name or a number.
    :raises ConfigurationError: if there is none, or this process may not.
    """
    import grp
    import pwd

    def number(name: str, find: Callable[[str], int], what: str) -> int:
        try:
            return int(name) if name.isdigit() else find(name)
        except KeyError:
            raise ConfigurationError(f"there is no {what} {name!r} on this machine") from None

    uid = None if user is None else number(user, lambda n: pwd.getpwnam(n).pw_uid, "user")
    gid = None if group is None else number(group, lambda n: grp.getgrnam(n).gr_gid, "group")
    try:
        entry = None if uid is None else pwd.getpwuid(uid)
    except KeyError:  # a number that no name belongs to, as in containers
        entry = None
    if gid is None and entry is not None:
        gid = entry.pw_gid
    if (uid is None or uid == os.geteuid()) and (gid is None or gid == os.getegid()):
        return
    try:
        if gid is not None:
            os.setgid(gid)
            os.setgroups([gid])
        if uid is not None:
            if entry is not None and gid is not None:
                os.initgroups(entry.pw_name, gid)
            os.setuid(uid)
    except PermissionError as exc:
        raise ConfigurationError(
            f"this process may not become user {user or '-'}, group {group or '-'}: only root may"
        ) from exc


class SignOfLife:
    """Touches a pid file as long as the worker is at work; see ``taskworker health``.

    :param file: the acquired pid file.
    :param is_at_work: asked each time.
    """

    def __init__(self, file: PidFile, is_at_work: Callable[[], bool]) -> None:
        self._file, self._is_at_work = file, is_at_work
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="taskworker-pidfile", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(_BEAT):
            if self._is_at_work():
                self._file.touch()
