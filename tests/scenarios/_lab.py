"""Plumbing of the scenario scripts; nothing of the library under test."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType


def wait_for(condition: Callable[[], object], timeout: float = 20.0, step: float = 0.02) -> bool:
    """Wait until *condition* holds; say whether it did in time."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(step)
    return False


@contextmanager
def workdir(**modules: str) -> Iterator[Path]:
    """A temporary directory with these modules in it, removed in the end."""
    directory = Path(tempfile.mkdtemp(prefix="scenario"))
    try:
        for name, text in modules.items():
            (directory / f"{name}.py").write_text(text.lstrip("\n"))
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Child:
    """A started Python program; what it prints is collected line by line."""

    def __init__(self, arguments: Sequence[str], directory: Path, **environment: str) -> None:
        path = [str(directory), os.environ.get("PYTHONPATH", "")]
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=directory,
            env=os.environ
            | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
            | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.lines.append(line.rstrip("\n"))

    def wait(self, timeout: float = 60.0) -> int:
        """Wait for the end of the program; kill it if that takes too long."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(2)
        return self.process.returncode

    def stop(self, number: int = signal.SIGTERM, timeout: float = 15.0) -> int:
        """Send a signal and wait for the end."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait(timeout)

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.stop()
        if kind is not None or self.process.returncode:
            sys.stderr.write("\n".join(["--- output of the child", *self.lines[-60:], ""]))


def run(arguments: Sequence[str], directory: Path, **environment: str) -> str:
    """Run a program to its end and return what it printed."""
    child = Child(arguments, directory, **environment)
    child.wait()
    return "\n".join(child.lines)
