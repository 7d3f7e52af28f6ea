"""How fast one worker empties a queue that was filled before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..marks import Mark
from ..scale import Scale
from ..session import RunFailedError, Session
from .base import Cell, Column, Figures, Goal, Measure, Rows, all_workers, best_ratio, one_by_one

#: The worker that our command starts when told nothing else.
DEFAULT = "ours threads4"


def _run(task: str, cell: Cell, scale: Scale) -> Figures:
    with Session(cell.system) as session:
        filled = session.enqueue(task, scale.messages, seconds=scale.enqueue_seconds)["sent"]
        session.start_worker(cell.worker)
        session.need_marks(1, timeout=20.0, pause=0.002)
        cpu, ran_before = session.worker_cpu(), len(session.marks())
        session.wait_for_marks(filled, scale.drain_seconds, patience=5.0)
        cpu = session.worker_cpu() - cpu
        marks = session.marks()
        memory = session.worker_memory()
    return {
        "rate": _rate(marks),
        "cpu": cpu / max(1, len(marks) - ran_before) * 1e6,
        "pss": memory.pss,
    }


def _rate(marks: Sequence[Mark]) -> float:
    """Tasks per second from the first to the last, without the worker's start."""
    times = sorted(mark.at for mark in marks)
    if len(times) < 10:
        raise RunFailedError(f"only {len(times)} tasks ran")
    return (len(times) - 1) / ((times[-1] - times[0]) / 1e9)


#: store, the other, how much faster ours has to be
_BOUNDS = [
    ("sqlite", "celery", 20),
    ("sqlite", "huey", 1.5),
    ("postgresql", "celery", 15),
    ("postgresql", "huey", 2.5),
    ("postgresql", "procrastinate", 10),
    ("redis", "celery", 4),
    ("redis", "huey", 1.2),
    ("redis", "dramatiq", 1.2),
    ("rabbitmq", "celery", 2),
    ("rabbitmq", "dramatiq", 1),
]
_BOUNDS_STORED = [
    ("sqlite", "celery", 4),
    ("sqlite", "huey", 1),
    ("postgresql", "celery", 4),
    ("postgresql", "huey", 1),
    ("redis", "celery", 1),
    ("redis", "huey", 1),
    ("redis", "dramatiq", 1),
    ("rabbitmq", "celery", 1),
    ("rabbitmq", "dramatiq", 1),
]


def _measure(name: str, task: str, title: str, bounds: Sequence[tuple[str, str, float]]) -> Measure:
    return Measure(
        name=name,
        title=title,
        columns=[
            Column("rate", "tasks/s"),
            Column("cpu", "worker's CPU µs/task"),
            Column("pss", "PSS MiB"),
        ],
        cells=all_workers,
        run_round=one_by_one(partial(_run, task)),
        compared="rate",
        references=[DEFAULT],
        goals=[_goal(name, *bound) for bound in bounds],
    )


def _goal(measure: str, store: str, other: str, factor: float) -> Goal:
    def find(rows: Rows) -> float | None:
        return best_ratio(rows, other, "rate")

    text = f"{measure.replace('-', ', ')}, best workers: x {other}"
    return Goal(measure, text, find, factor, at_least=True, store=store)


DRAIN = _measure(
    "drain", "noop", "Draining a queue of no-op tasks, one worker, results ignored", _BOUNDS
)
DRAIN_STORED = _measure(
    "drain-stored",
    "stored",
    "Draining a queue of no-op tasks, one worker, results stored",
    _BOUNDS_STORED,
)
