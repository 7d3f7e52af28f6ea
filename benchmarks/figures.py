"""Small sums over lists of numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies (the nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spin() -> float:
    """Milliseconds that a fixed piece of Python takes: how busy the machine is just now."""
    begin = time.perf_counter()
    total = 0
    for number in range(300_000):
        total += number * number % 7
    return (time.perf_counter() - begin) * 1e3
