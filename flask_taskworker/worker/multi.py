"""Several workers on one machine, started and stopped together, as Celery's ``multi`` does.

Nothing is kept but pid files: to stop workers, name them and their pid files as they were
started.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..exceptions import ConfigurationError
from ..pidfile import holder
from .daemon import launch
from .nodes import file_name, node_name

#: How long a node may take to start, and to end. Seconds.
START_TIMEOUT, STOP_TIMEOUT = 60.0, 300.0
_PAUSE = 0.05
#: Options that are meant for this module and not for the workers.
_OWN = {"--prefix", "--range-prefix", "--suffix", "--hostname"}
_SIGNAL = re.compile(r"-(\d+|(?:SIG)?[A-Z]{2,6}\d?)")


@dataclass(frozen=True)
class Node:
    """One of the workers: its name, its files, and the command that starts it."""

    name: str
    pid_file: str
    log_file: str
    command: tuple[str, ...]

    @property
    def shell_command(self) -> str:
        """The command as a shell takes it."""
        return shlex.join(self.command)

    def pid(self) -> int | None:
        """The process id while it runs."""
        return holder(self.pid_file)


@dataclass
class Request:
    """What a command line asks for: nodes, options, and a signal to stop them with."""

    names: list[str] = field(default_factory=list)
    #: Options of all nodes, and of some: ``-c:1,3`` has the selector ``1,3``.
    common: dict[str, str | None] = field(default_factory=dict)
    special: list[tuple[str, str, str | None]] = field(default_factory=list)
    signal: int | None = None


def parse(words: Sequence[str], flags: Container[str]) -> Request:
    """Read the words after the action.

    :param flags: options that take no value.
    """
    request = Request()
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            request.names.append(word)
            continue
        if _SIGNAL.fullmatch(word) and word not in flags:
            request.signal = _signal_number(word[1:])
            continue
        name, value = word, None
        if word.startswith("--"):
            name, mark, text = word.partition("=")
            value = text if mark else None
        name, _, selector = name.partition(":")
        takes = name not in flags and value is None
        if takes and left and not left[0].startswith("-"):
            value = left.pop(0)
        if selector:
            request.special.append((selector, name, value))
        else:
            request.common[name] = value
    return request


def nodes(request: Request, shared: Sequence[str] = ()) -> list[Node]:
    """The nodes that a command line asks for.

    :param shared: options that stood before the command, such as ``-A app``.
    :raises ConfigurationError: if it names none, or options for one that there is not.
    """
    prefix = request.common.get("--range-prefix") or request.common.get("--prefix") or "worker"
    host = request.common.get("--hostname") or request.common.get("--suffix") or "%h"
    names = request.names
    if len(names) == 1 and names[0].isdigit():
        names = [f"{prefix}{number}" for number in range(1, int(names[0]) + 1)]
    if not names:
        raise ConfigurationError("name the workers, or say how many: taskworker multi start 3")
    chosen = [_selected(selector, names) for selector, _, _ in request.special]
    found = []
    for number, name in enumerate(names):
        options = {k: v for k, v in request.common.items() if k not in _OWN}
        for selected, (_, option, value) in zip(chosen, request.special, strict=True):
            if number in selected:
                options[option] = value
        found.append(_node(name if "@" in name else f"{name}@{host}", options, shared))
    return found


def _node(template: str, options: dict[str, str | None], shared: Sequence[str]) -> Node:
    name = node_name(template)
    pid_file = _take(options, ("--pidfile", "-p")) or "%n.pid"
    log_file = _take(options, ("--logfile", "-f")) or "%n%I.log"
    pid_file, log_file = file_name(pid_file, name), file_name(log_file, name)
    words = [
        sys.executable, "-m", __package__.partition(".")[0], *shared, "worker",
        "-n", name, "--pidfile", pid_file, "--logfile", log_file,
    ]  # fmt: skip
    for option, value in options.items():
        words += [option] if value is None else [option, value]
    return Node(name, pid_file, log_file, tuple(words))


def _take(options: dict[str, str | None], names: Iterable[str]) -> str | None:
    return next((value for name in names if (value := options.pop(name, None))), None)


def _selected(selector: str, names: Sequence[str]) -> set[int]:
    """The positions that a selector such as ``1-3,5`` or ``mail,web`` means."""
    found: set[int] = set()
    for part in selector.split(","):
        first, _, last = part.partition("-")
        if part in names:
            found.add(names.index(part))
        elif first.isdigit() and (last or first).isdigit() and 1 <= int(first) <= len(names):
            found.update(range(int(first) - 1, min(int(last or first), len(names))))
        else:
            raise ConfigurationError(
                f"an option is meant for {part!r}, but the workers are {', '.join(names)}"
            )
    return found


def _signal_number(text: str) -> int:
    if text.isdigit():
        return int(text)
    try:
        return int(signal.Signals[text if text.startswith("SIG") else f"SIG{text}"])
    except KeyError:
        raise ConfigurationError(f"there is no signal -{text}") from None


class Outcome(NamedTuple):
    """What became of a node."""

    node: Node
    ok: bool
    text: str


def start(node: Node) -> Outcome:
    """Start a node; it reads its queues, or at least has its pid file, when this returns."""
    running = node.pid()
    if running is not None:
        return Outcome(node, False, f"runs already, process {running}")
    process = launch(node.command, node.log_file)
    _until(lambda: process.poll() is not None or node.pid() == process.pid, START_TIMEOUT)
    code = process.poll()
    if code is not None:
        return Outcome(node, False, f"ended at once ({code}): {_last_line(node.log_file)}")
    process.returncode = 0  # it is on its own from here; nobody waits for it
    return Outcome(node, True, f"started, process {process.pid}")


def stop(node: Node, number: int = signal.SIGTERM, timeout: float = STOP_TIMEOUT) -> Outcome:
    """Send a signal to a node and wait until it has ended."""
    pid = node.pid()
    if pid is None:
        return Outcome(node, False, "does not run")
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it ended just now
        return Outcome(node, True, "stopped")
    except OSError as exc:
        return Outcome(node, False, f"process {pid} cannot be stopped: {exc.strerror}")
    if not _until(lambda: node.pid() != pid, timeout):
        return Outcome(node, False, f"process {pid} still runs after {timeout:g} s")
    return Outcome(node, True, "stopped" if number != signal.SIGKILL else "killed")


def _until(condition: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)
    return True


def _last_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line.strip() for line in file if line.strip()]
    except OSError:
        lines = []
    return lines[-1] if lines else f"see {path}"
