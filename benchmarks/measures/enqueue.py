"""How fast one process sends while nobody works."""

from __future__ import annotations

from ..scale import Scale
from ..session import Session
from .base import Cell, Column, Figures, Goal, Measure, Rows, one_by_one, ratio


def _run(cell: Cell, scale: Scale) -> Figures:
    with Session(cell.system) as session:
        sent = session.enqueue("noop", scale.messages, seconds=scale.enqueue_seconds, warm=5)
    return {key: sent[key] for key in ("rate", "cpu", "p50", "p99")}


#: store, ours, the other, how much faster ours has to be
_BOUNDS = [
    ("sqlite", "ours", "celery", 8),
    ("sqlite", "ours", "huey", 0.9),
    ("sqlite", "ours-normal", "huey", 1.5),
    ("postgresql", "ours", "celery", 4),
    ("postgresql", "ours", "huey", 1.2),
    ("redis", "ours", "celery", 3),
    ("redis", "ours", "huey", 1),
    ("rabbitmq", "ours", "dramatiq-confirmed", 1),
    ("rabbitmq", "ours", "celery-confirmed", 2),
    ("rabbitmq", "ours-unconfirmed", "dramatiq", 1),
    ("rabbitmq", "ours-unconfirmed", "celery", 2),
]


def _goal(store: str, ours: str, other: str, factor: float) -> Goal:
    def find(rows: Rows) -> float | None:
        return ratio(rows, ours, other, "rate")

    return Goal("enqueue", f"sending, {ours}: x {other}", find, factor, at_least=True, store=store)


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
    references=["ours", "ours-normal", "ours-unconfirmed"],
    goals=[_goal(*bound) for bound in _BOUNDS],
)
