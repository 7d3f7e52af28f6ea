"""The processes of one run: a producer and a worker, in a temporary folder of their own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from . import marks
from .system import Place, System

ROOT = Path(__file__).resolve().parent.parent
_numbers = itertools.count(1)


class RunFailedError(Exception):
    """A run gave no figure; the text says why."""


class Memory(NamedTuple):
    """Of all processes of a worker, in MiB."""

    rss: float
    pss: float


class Session:
    """A system, ready to be measured. Leaving it ends all it started.

    :ivar spawned_at: when the worker's command was started, in monotonic nanoseconds.
    """

    def __init__(self, system: System) -> None:
        self.system = system
        self.spawned_at = 0
        self._folder = Path(tempfile.mkdtemp(prefix="taskworker-bench-"))
        self.marks_file = self._folder / "marks"
        self._worker_log = self._folder / "worker.log"
        self._place = Place(self._folder, f"bench_{os.getpid()}_{next(_numbers)}", system.options)
        self._worker: subprocess.Popen[bytes] | None = None
        self._producer: subprocess.Popen[str] | None = None

    def __enter__(self) -> Session:
        try:
            self.marks_file.touch()
            self._start_producer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill_worker()
        self._stop_producer()
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- the producer ---------------------------------------------------------------------

    def order(self, order: str, *, timeout: float = 120.0, **arguments: Any) -> dict[str, Any]:
        """Have the producer do something and wait for its answer."""
        assert self._producer is not None
        assert self._producer.stdin is not None
        print(json.dumps({"order": order, **arguments}), file=self._producer.stdin, flush=True)
        return self._answer(timeout)

    def enqueue(
        self,
        task: str,
        count: int,
        *,
        seconds: float = 60.0,
        extra: tuple[float, ...] = (),
        warm: int = 0,
    ) -> dict[str, Any]:
        """See :func:`benchmarks.producer.enqueue`."""
        return self.order(
            "enqueue", task=task, count=count, seconds=seconds, extra=extra, warm=warm
        )

    def _start_producer(self) -> None:
        with open(self._folder / "producer.log", "ab") as log:
            self._producer = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.producer"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment(),
                cwd=self._folder,
                text=True,
            )
        self._answer()

    def _answer(self, timeout: float = 20.0) -> dict[str, Any]:
        assert self._producer is not None
        assert self._producer.stdout is not None
        watchdog = threading.Timer(timeout, self._producer.kill)
        watchdog.start()
        try:
            line = self._producer.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise RunFailedError(f"the producer died: {_tail(self._folder / 'producer.log')}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RunFailedError(f"the producer says {answer['error']}")
        return answer

    def _stop_producer(self) -> None:
        producer = self._producer
        if producer is None:
            return
        with contextlib.suppress(RunFailedError, OSError):
            self.order("clean_up", timeout=10.0)
        with contextlib.suppress(subprocess.TimeoutExpired, OSError):
            producer.communicate(timeout=5.0)
        producer.kill()
        producer.wait()
        self._producer = None

    # -- the worker -----------------------------------------------------------------------

    def start_worker(self, worker: str, *, talkative: bool = False) -> None:
        """Start a worker in a process group of its own."""
        self._worker_log.write_bytes(b"")
        with open(self._worker_log, "ab") as log:
            self.spawned_at = time.monotonic_ns()
            self._worker = subprocess.Popen(
                self.system.command(worker, talkative=talkative),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                cwd=self._folder,
                start_new_session=True,
            )

    def kill_worker(self) -> None:
        """``kill -9`` for the worker's process group, which it is alone in."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()

    def seconds_until_logged(self, text: str, timeout: float = 20.0) -> float:
        """Seconds from the worker's start until it has logged this text."""
        for _ in _until(time.monotonic() + timeout, pause=0.002):
            if text.encode() in self._worker_log.read_bytes():
                return (time.monotonic_ns() - self.spawned_at) / 1e9
        raise RunFailedError(f"the worker never said {text!r}: {_tail(self._worker_log)}")

    def worker_cpu(self) -> float:
        """CPU seconds that the worker's processes have used so far."""
        total = 0.0
        for process in self._worker_processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def worker_memory(self) -> Memory:
        rss = pss = 0
        for process in self._worker_processes():
            with contextlib.suppress(psutil.Error):
                info = process.memory_full_info()
                rss, pss = rss + info.rss, pss + info.pss
        return Memory(rss / 2**20, pss / 2**20)

    def _worker_processes(self) -> list[psutil.Process]:
        if self._worker is None:
            return []
        try:
            parent = psutil.Process(self._worker.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.Error:
            return []

    # -- marks ----------------------------------------------------------------------------

    def marks(self) -> list[marks.Mark]:
        return marks.read(self.marks_file)

    def wait_for_marks(
        self, count: int, timeout: float, *, patience: float = 60.0, pause: float = 0.02
    ) -> int:
        """Wait until tasks have made this many marks, or none for ``patience`` seconds.

        :returns: how many there are.
        """
        seen, seen_at = -1, time.monotonic()
        for now in _until(time.monotonic() + timeout, pause):
            found = marks.count(self.marks_file)
            if found >= count:
                break
            if found != seen:
                seen, seen_at = found, now
            elif now - seen_at > patience:
                break
        return marks.count(self.marks_file)

    def need_marks(self, count: int, timeout: float, *, pause: float = 0.02) -> None:
        """Wait for marks without which the run is worth nothing."""
        found = self.wait_for_marks(count, timeout, pause=pause)
        if found < count:
            raise RunFailedError(
                f"{found} of {count} tasks ran within {timeout:g} s: {_tail(self._worker_log)}"
            )

    def _environment(self) -> dict[str, str]:
        return {
            **environment(),
            **self._place.to_environment(),
            "BENCH_ADAPTER": self.system.adapter,
            marks.FILE_VARIABLE: str(self.marks_file),
            "PYTHONPATH": str(ROOT),
        }


def environment() -> dict[str, str]:
    """This process's, but for what would have our modules compiled at every start."""
    kept = dict(os.environ)
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    return kept


def _until(deadline: float, pause: float) -> Iterator[float]:
    """Yield the time now and then, at least once, until the deadline has passed."""
    while True:
        now = time.monotonic()
        yield now
        if now >= deadline:
            return
        time.sleep(pause)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return " | ".join(lines[-3:]) or "its log is empty"
