"""How soon an idle worker starts a task, and how soon its result is back."""

from __future__ import annotations

from ..figures import percentile
from ..scale import Scale
from ..session import Session
from .base import (
    Cell,
    Column,
    Figures,
    Measure,
    at_most,
    one_by_one,
    share_of_fastest,
    steady_workers,
)

_FIRST_SEND, _FIRST_ROUND_TRIP = 1_000, 1_000_000


def started_after(session: Session, sent: dict[str, int]) -> list[float]:
    """Milliseconds from each send to its task's start, for those that ran."""
    at = {mark.number: mark.at for mark in session.marks()}
    return [(at[int(n)] - when) / 1e6 for n, when in sent.items() if int(n) in at]


def _run(cell: Cell, scale: Scale) -> Figures:
    with Session(cell.system) as session:
        session.start_worker(cell.worker)
        session.order("send_apart", first=0, count=1, shortest=0.5, longest=0.5)
        session.need_marks(1, timeout=20.0)
        sent = session.order(
            "send_apart", first=_FIRST_SEND, count=scale.sends, shortest=0.02, longest=0.05
        )["sent"]
        session.need_marks(1 + scale.sends, timeout=15.0)
        waited = started_after(session, sent)
        trips = session.order(
            "round_trips",
            first=_FIRST_ROUND_TRIP,
            count=scale.round_trips,
            seconds=scale.round_trip_seconds,
        )["milliseconds"]
    return {
        "p50": percentile(waited, 0.50),
        "p99": percentile(waited, 0.99),
        "trip50": percentile(trips, 0.50),
        "trip99": percentile(trips, 0.99),
    }


LATENCY = Measure(
    name="latency",
    title="Latency with an idle worker: sends 20-50 ms apart",
    columns=[
        Column("p50", "to start p50 ms", "{:,.2f}"),
        Column("p99", "p99 ms", "{:,.1f}"),
        Column("trip50", "delay().get() p50 ms", "{:,.2f}"),
        Column("trip99", "p99 ms", "{:,.1f}"),
    ],
    cells=steady_workers,
    run_round=one_by_one(_run),
    compared="p50",
    references=["ours threads4"],
    goals=[
        at_most("latency", "delay() to start, p50 ms", "ours threads4", "p50", 5),
        at_most("latency", "delay() to start, p99 ms", "ours threads4", "p99", 25),
        share_of_fastest("latency", "delay() to start, p50 x best other", "ours threads4", "p50"),
    ],
)
