"""What a worker costs while it waits, and how it wakes after a long silence.

All systems wait at the same time: waiting, they are not in each other's way.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from ..figures import percentile
from ..scale import Scale
from ..session import RunFailedError, Session
from .base import Cell, Column, Figures, Measure, Run, at_most, steady_workers
from .latency import started_after

_SETTLE_SECONDS = 4.0
_SLOWEST_POLL = 11.0


def _run_round(cells: Sequence[Cell], scale: Scale, number: int) -> Iterator[Run]:
    with ExitStack() as stack:
        waiting: list[Cell] = []
        sessions: list[Session] = []
        for cell in cells:
            try:
                session = stack.enter_context(Session(cell.system))
                session.start_worker(cell.worker)
                session.order("send_apart", first=0, count=1, shortest=0.0, longest=0.0)
                session.need_marks(1, timeout=20.0)
            except RunFailedError as exc:
                yield Run(cell, {}, str(exc))
            else:
                waiting.append(cell)
                sessions.append(session)
        time.sleep(_SETTLE_SECONDS)
        used = _cpu_while_idle(sessions, scale.idle_seconds)
        memory = [session.worker_memory().pss for session in sessions]
        cold = _cold_sends(sessions, scale.cold_sends, random.Random(number))
        for cell, cpu, pss, waited in zip(waiting, used, memory, cold, strict=True):
            yield Run(cell, {"cpu": cpu, "pss": pss, **waited})


def _cpu_while_idle(sessions: Sequence[Session], seconds: float) -> list[float]:
    """The share of a core that each uses, in percent."""
    before = [session.worker_cpu() for session in sessions]
    time.sleep(seconds)
    after = [session.worker_cpu() for session in sessions]
    return [(b - a) / seconds * 100 for a, b in zip(before, after, strict=True)]


def _cold_sends(sessions: Sequence[Session], count: int, chance: random.Random) -> list[Figures]:
    """Single sends, seconds apart: milliseconds until the task starts."""
    sent: list[dict[str, int]] = [{} for _ in sessions]
    for number in range(1, count + 1):
        time.sleep(chance.uniform(2.0, 3.0))
        for at, session in zip(sent, sessions, strict=True):
            order = session.order("send_apart", first=number, count=1, shortest=0.1, longest=0.1)
            at.update(order["sent"])
    for session in sessions:
        session.wait_for_marks(1 + count, _SLOWEST_POLL)
    waits = [started_after(session, at) for session, at in zip(sessions, sent, strict=True)]
    return [
        {"cold50": percentile(wait, 0.5), "cold_max": max(wait)} if wait else {} for wait in waits
    ]


IDLE = Measure(
    name="idle",
    title="An idle worker, and single sends 2-3 s apart",
    columns=[
        Column("cpu", "CPU % of a core", "{:.2f}"),
        Column("pss", "PSS MiB"),
        Column("cold50", "cold start p50 ms", "{:,.1f}"),
        Column("cold_max", "max ms", "{:,.1f}"),
    ],
    cells=steady_workers,
    run_round=_run_round,
    compared="pss",
    references=["ours threads4"],
    goals=[
        at_most("idle", "CPU of an idle worker, % of a core", "ours threads4", "cpu", 0.3),
        at_most("idle", "memory of an idle worker, PSS MiB", "ours threads4", "pss", 45),
    ],
)
