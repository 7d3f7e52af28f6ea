"""kill -9 of a worker in the middle of its work: is anything lost?"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from ..marks import Kind
from ..scale import Scale
from ..session import RunFailedError, Session
from .base import Cell, Column, Figures, Goal, Measure, Rows, Run, steady_workers

_TASKS, _NAP = 500, 0.02
#: Whoever is to bring every task back gets longer than any lease.
_OUR_PATIENCE = 60.0


def _run_round(cells: Sequence[Cell], scale: Scale, number: int) -> Iterator[Run]:
    """Ours as often as the scale says, the others once; each kill at another moment."""
    chance = random.Random(number)
    for cell in cells:
        for _ in range(scale.kills if _is_ours(cell) else 1):
            share = chance.uniform(0.2, 0.6)
            patience = _OUR_PATIENCE if _is_ours(cell) else scale.loser_patience
            try:
                yield Run(cell, _run(cell, int(_TASKS * share), patience))
            except RunFailedError as exc:
                yield Run(cell, {}, str(exc))


def _is_ours(cell: Cell) -> bool:
    return cell.system.adapter == "ours"


def _run(cell: Cell, kill_at: int, patience: float) -> Figures:
    with Session(cell.system) as session:
        filled = session.enqueue("nap", _TASKS, extra=(_NAP,))["sent"]
        session.start_worker(cell.worker)
        # A task makes two marks.
        session.need_marks(2 * kill_at, timeout=40.0, pause=0.002)
        session.kill_worker()
        ended_before = len(_ended(session))
        session.start_worker(cell.worker)
        _wait_until_all_ended(session, filled, patience)
        runs = Counter(mark.number for mark in session.marks() if mark.kind == Kind.ENDED)
        begun = Counter(mark.number for mark in session.marks() if mark.kind == Kind.STARTED)
        last = max(mark.at for mark in session.marks())
        return {
            "before": ended_before,
            "lost": filled - len(runs),
            "begun_twice": sum(count > 1 for count in begun.values()),
            "run_twice": sum(count > 1 for count in runs.values()),
            "back": (last - session.spawned_at) / 1e9,
        }


def _ended(session: Session) -> set[int]:
    return {mark.number for mark in session.marks() if mark.kind == Kind.ENDED}


def _wait_until_all_ended(session: Session, count: int, patience: float) -> None:
    """Until every task has ended, or no task has made a mark for ``patience`` seconds."""
    while len(_ended(session)) < count:
        seen = len(session.marks())
        if session.wait_for_marks(seen + 1, patience) == seen:
            return


def _largest(key: str) -> Callable[[Rows], float | None]:
    def find(rows: Rows) -> float | None:
        values = [figures[key] for figures in rows.get("ours threads4", ()) if key in figures]
        return max(values, default=None)

    return find


CRASH = Measure(
    name="crash",
    title=f"kill -9 of the worker's processes amid {_TASKS} tasks of {_NAP * 1000:.0f} ms, restart",
    columns=[
        Column("lost", "lost"),
        Column("begun_twice", "begun twice"),
        Column("run_twice", "ended twice"),
        Column("before", "ended before"),
        Column("back", "restart to last s", "{:.1f}"),
    ],
    cells=steady_workers,
    run_round=_run_round,
    compared="",
    references=[],
    goals=[Goal("crash", "tasks lost by any kill -9", _largest("lost"), 0)],
)
