"""How long a worker's command takes until it works."""

from __future__ import annotations

from ..scale import Scale
from ..session import Session
from .base import Cell, Column, Figures, Measure, at_most, one_by_one, steady_workers


def _run(cell: Cell, scale: Scale) -> Figures:
    with Session(cell.system) as session:
        session.enqueue("noop", 1)
        session.start_worker(cell.worker, talkative=True)
        ready = session.seconds_until_logged(cell.system.ready)
        session.need_marks(1, timeout=20.0, pause=0.002)
        first = (session.marks()[0].at - session.spawned_at) / 1e9
    return {"ready": ready, "first": first}


STARTUP = Measure(
    name="startup",
    title="Starting a worker while a task waits",
    columns=[
        Column("ready", "command to ready s", "{:.2f}"),
        Column("first", "to first task s", "{:.2f}"),
    ],
    cells=steady_workers,
    run_round=one_by_one(_run),
    compared="first",
    references=["ours threads4"],
    goals=[
        at_most("startup", "command to ready worker, s", "ours threads4", "ready", 1),
        at_most("startup", "command to first task, s", "ours threads4", "first", 0.5),
    ],
)
