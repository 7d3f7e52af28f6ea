"""What an adapter tells the harness about its system."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: What a worker's command loads: ``benchmarks.app``, attribute ``app``.
APP_MODULE = "benchmarks.app"

_VARIABLE = "BENCH_PLACE"


@dataclass(frozen=True)
class Place:
    """Where one run of a system keeps its messages.

    :param folder: a temporary folder of this run alone.
    :param queue: the queue's name, of this run alone.
    :param options: what the system's :attr:`System.options` say.
    """

    folder: Path
    queue: str
    options: Mapping[str, str]

    def to_environment(self) -> dict[str, str]:
        """The variables that :meth:`from_environment` reads in the run's processes."""
        fields = {"folder": str(self.folder), "queue": self.queue, "options": dict(self.options)}
        return {_VARIABLE: json.dumps(fields)}

    @classmethod
    def from_environment(cls) -> Place:
        fields = json.loads(os.environ[_VARIABLE])
        return cls(Path(fields["folder"]), fields["queue"], fields["options"])


@dataclass(frozen=True)
class Client:
    """A system in one process: what producers call and workers load.

    :param app: what the worker's command loads.
    :param send: sends a no-op task whose result is ignored.
    :param send_stored: sends one whose result is stored; returns a handle.
    :param send_nap: sends one that sleeps.
    :param get: waits for the result behind a handle, some seconds at most.
    :param clean_up: removes what the run left outside its folder.
    """

    app: Any
    send: Callable[[int], object]
    send_stored: Callable[[int], Any]
    send_nap: Callable[[int, float], object]
    get: Callable[[Any, float], object]
    clean_up: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class System:
    """One configuration of one task queue.

    :param name: as the tables show it.
    :param adapter: the module of :mod:`benchmarks.adapters`.
    :param workers: the workers whose throughput is measured: label to command.
    :param steady: the label of the worker that waits, is woken and is killed.
    :param wide: the command of a worker that runs 20 tasks at once.
    :param ready: what a worker logs once it waits for messages.
    :param talkative: what to add to a worker's command to have it log that.
    :param quiet: what to add to keep it from logging each task.
    :param import_statement: what a program imports to define and send tasks.
    :param options: handed to the adapter's ``build``.
    :param measures: the measures it takes part in; None: all.
    """

    name: str
    adapter: str
    workers: Mapping[str, Sequence[str]]
    steady: str
    wide: Sequence[str]
    ready: str
    talkative: Sequence[str] = ()
    quiet: Sequence[str] = ()
    import_statement: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    measures: frozenset[str] | None = None

    def command(self, worker: str, *, talkative: bool = False) -> list[str]:
        """The command line of a worker; ``"wide"`` is the one for 20 tasks at once."""
        base = self.wide if worker == "wide" else self.workers[worker]
        return [sys.executable, "-m", *base, *(self.talkative if talkative else self.quiet)]

    def takes_part(self, measure: str) -> bool:
        return self.measures is None or measure in self.measures
