"""Tasks that wait: is a worker for 20 at once really busy with 20?"""

from __future__ import annotations

from ..marks import Kind
from ..scale import Scale
from ..session import RunFailedError, Session
from .base import Cell, Column, Figures, Goal, Measure, median_of, one_by_one

_NAP, _AT_ONCE = 0.05, 20


def _run(cell: Cell, scale: Scale) -> Figures:
    with Session(cell.system) as session:
        filled = session.enqueue("nap", scale.naps, extra=(_NAP,))["sent"]
        session.start_worker(cell.worker)
        session.need_marks(1, timeout=20.0)
        session.wait_for_marks(2 * filled, timeout=30.0, patience=8.0)
        marks = session.marks()
    ended = [mark.at for mark in marks if mark.kind == Kind.ENDED]
    if len(ended) < 2:
        raise RunFailedError(f"only {len(ended)} tasks ended")
    begun = min(mark.at for mark in marks)
    rate = len(ended) / ((max(ended) - begun) / 1e9)
    return {"rate": rate, "share": rate / (_AT_ONCE / _NAP) * 100}


SLEEPS = Measure(
    name="sleeps",
    title=f"Tasks that sleep {_NAP * 1000:.0f} ms, {_AT_ONCE} at once "
    f"(ideal: {_AT_ONCE / _NAP:.0f}/s)",
    columns=[Column("rate", "tasks/s"), Column("share", "% of the ideal")],
    cells=lambda systems: [Cell(system, "wide") for system in systems],
    run_round=one_by_one(_run),
    compared="rate",
    references=["ours wide"],
    goals=[
        Goal(
            "sleeps",
            "tasks that sleep, % of the ideal",
            lambda rows: median_of(rows, "ours wide", "share"),
            95,
            at_least=True,
        )
    ],
)
