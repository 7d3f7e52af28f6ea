"""Started programs: what they print, line by line, and their certain end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

#: More than any program of the tests needs, on a machine that does other things as well.
PATIENCE = 30.0
_FOREIGN = ("FLASK_", "TASKER_", "CELERY_", "PYTEST_", "TASKWORKER_", "WERKZEUG_")


def eventually(condition: Callable[[], T], what: str, timeout: float = PATIENCE) -> T:
    """Return the first true value of *condition*; looks seldom, other processes want to run."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what}")
        time.sleep(0.01)
    return value


class Program:
    """``python ARGUMENTS`` in a session of its own; stdout and stderr are read as one.

    :param arguments: as for the interpreter.
    :param cwd: the folder it starts in.
    :param environment: added to this process's, less the settings for Flask and for us.
    :param apart: reads stderr on its own, into :attr:`errors`.
    """

    def __init__(
        self,
        *arguments: str | Path,
        cwd: Path,
        environment: Mapping[str, str] | None = None,
        apart: bool = False,
        command: str | None = None,
    ) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN)}
        self.arguments = [str(argument) for argument in arguments]
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.process = subprocess.Popen(
            [command or sys.executable, *self.arguments],
            cwd=cwd,
            env=inherited | {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1"} | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if apart else subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._readers = [self._read(self.process.stdout, self.lines)]
        if apart:
            self._readers.append(self._read(self.process.stderr, self.errors))

    def _read(self, stream: object, lines: list[str]) -> threading.Thread:
        def read() -> None:
            with stream:  # type: ignore[attr-defined]
                for line in stream:  # type: ignore[attr-defined]
                    lines.append(line.rstrip("\n"))

        thread = threading.Thread(target=read, name="reader", daemon=True)
        thread.start()
        return thread

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        return "\n".join([*self.lines, *self.errors])

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait_for(self, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """The first line that matches; fails when the program ends without one."""

        def found() -> re.Match[str] | None:
            ended = not self.running
            if ended:
                self._join()
            for line in [*self.lines, *self.errors]:
                if match := re.search(pattern, line):
                    return match
            assert not ended, f"{self} ended without {pattern!r}:\n{self.output}"
            return None

        try:
            return eventually(found, f"{pattern!r} from {self}", timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output}") from None

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the program alone, not to what it started."""
        self.process.send_signal(number)

    def kill_all(self) -> None:
        """SIGKILL to the program and to what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code, negative for a signal; fails when the program does not end."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self} still runs after {timeout} s:\n{self.output}") from None
        self._join()
        return code

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = PATIENCE) -> int:
        """Send a signal, and wait for the end."""
        self.send(number)
        return self.wait(timeout)

    def close(self) -> None:
        """Make sure that nothing of it is left."""
        self.kill_all()
        self.process.wait()
        self._join()

    def _join(self) -> None:
        for reader in self._readers:
            reader.join(5)

    def __repr__(self) -> str:
        return f"<{' '.join(self.arguments)[:80]}, pid {self.pid}>"


class Programs:
    """Starts programs in one folder; ends them all."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self._started: list[Program] = []

    def python(self, *arguments: str | Path, apart: bool = False, **environment: str) -> Program:
        """Start ``python ARGUMENTS``; keywords are environment variables."""
        program = Program(*arguments, cwd=self.cwd, environment=environment, apart=apart)
        self._started.append(program)
        return program

    def worker(self, *options: str, target: str = "lab", **environment: str) -> Program:
        """Start ``taskworker -A TARGET worker OPTIONS``."""
        return self.python(
            "-m", "flask_taskworker", "-A", target, "worker", *options, **environment
        )

    def ready_worker(self, *options: str, target: str = "lab", **environment: str) -> Program:
        """A worker that reads its queues already."""
        worker = self.worker(*options, target=target, **environment)
        worker.wait_for(" ready, reading ")
        return worker

    def close(self) -> None:
        for program in self._started:
            program.close()


@contextlib.contextmanager
def programs_in(folder: Path) -> Iterator[Programs]:
    """Programs that end with the block."""
    programs = Programs(folder)
    try:
        yield programs
    finally:
        programs.close()
