"""How fast one process sends while nobody works."""

from __future__ import annotations

from ..scale import Scale
from ..session import Session
from .base import Cell, Column, Figures, Goal, Measure, one_by_one, ratio


def _run(cell: Cell, scale: Scale) -> Figures:
    with Session(cell.system) as session:
        sent = session.enqueue("noop", scale.messages, seconds=scale.enqueue_seconds, warm=5)
    return {key: sent[key] for key in ("rate", "cpu", "p50", "p99")}


def _at_least(text: str, ours: str, other: str, factor: float) -> Goal:
    return Goal(
        "enqueue", text, lambda rows: ratio(rows, ours, other, "rate"), factor, at_least=True
    )


ENQUEUE = Measure(
    name="enqueue",
    title="Sending: delay() of a no-op task, one producer, no worker",
    columns=[
        Column("rate", "messages/s"),
        Column("cpu", "CPU µs/message"),
        Column("p50", "p50 µs"),
        Column("p99", "p99 µs"),
    ],
    cells=lambda systems: [Cell(system) for system in systems],
    run_round=one_by_one(_run),
    compared="rate",
    references=["ours", "ours-normal"],
    goals=[
        _at_least("sending, durability full: x Celery", "ours", "celery", 8),
        _at_least("sending, durability full: x huey", "ours", "huey", 0.9),
        _at_least("sending, durability normal: x huey", "ours-normal", "huey", 1.5),
    ],
)
