"""How long and how often everything is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Sizes of the runs. Where there is a count and seconds, the first to be reached ends it.

    :param rounds: how often each measure visits each system, by the measure's name.
    :param kills: how often each worker is killed within one round.
    """

    rounds: Mapping[str, int]
    messages: int
    enqueue_seconds: float
    drain_seconds: float
    sends: int
    round_trips: int
    round_trip_seconds: float
    idle_seconds: float
    cold_sends: int
    naps: int
    kills: int
    loser_patience: float


FULL = Scale(
    rounds={
        "enqueue": 5,
        "drain": 3,
        "drain-stored": 3,
        "latency": 3,
        "idle": 1,
        "startup": 5,
        "crash": 1,
        "sleeps": 3,
        "imports": 15,
    },
    messages=5000,
    enqueue_seconds=8.0,
    drain_seconds=12.0,
    sends=200,
    round_trips=50,
    round_trip_seconds=10.0,
    idle_seconds=20.0,
    cold_sends=8,
    naps=600,
    kills=10,
    loser_patience=20.0,
)

QUICK = Scale(
    rounds={
        "enqueue": 3,
        "drain": 3,
        "drain-stored": 1,
        "latency": 3,
        "idle": 1,
        "startup": 3,
        "crash": 1,
        "sleeps": 1,
        "imports": 7,
    },
    messages=2500,
    enqueue_seconds=1.5,
    drain_seconds=3.0,
    sends=50,
    round_trips=20,
    round_trip_seconds=2.0,
    idle_seconds=10.0,
    cold_sends=3,
    naps=300,
    kills=2,
    loser_patience=6.0,
)
