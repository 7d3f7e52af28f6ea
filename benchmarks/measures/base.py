"""The parts that all measures are made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..figures import median
from ..scale import Scale
from ..session import RunFailedError
from ..system import System

Figures = Mapping[str, float]


class Cell(NamedTuple):
    """What one line of a table is about: a system, and where it matters one of its workers."""

    system: System
    worker: str = ""

    @property
    def label(self) -> str:
        return f"{self.system.name} {self.worker}".strip()


class Run(NamedTuple):
    """One run's outcome: figures, or why there are none."""

    cell: Cell
    figures: Figures
    failure: str = ""


@dataclass(frozen=True)
class Column:
    """One figure of a table.

    :param show: how to write it.
    """

    key: str
    title: str
    show: str = "{:,.0f}"


Rows = Mapping[str, Sequence[Figures]]


@dataclass(frozen=True)
class Goal:
    """A figure that has to be reached.

    :param measure: what to run to know it.
    :param text: what it says, with its unit.
    :param find: reads it out of the rows of the measure; None if a run is missing.
    :param limit: the bound, itself allowed.
    :param at_least: whether the bound is the smallest or the largest allowed.
    :param store: the store it is meant for; empty: any.
    """

    measure: str
    text: str
    find: Callable[[Rows], float | None]
    limit: float
    at_least: bool = False
    store: str = ""

    def met(self, rows: Rows) -> bool:
        """Whether it was reached; what was not measured was not."""
        value = self.find(rows)
        if value is None:
            return False
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Measure:
    """Something that is measured, on every system in turn, for some rounds.

    :param cells: what to measure of these systems.
    :param run_round: runs every cell once, in any order, and yields the outcomes.
    :param compared: the column whose ratios to ours are shown.
    :param references: the labels of our rows, each compared with every other.
    """

    name: str
    title: str
    columns: Sequence[Column]
    cells: Callable[[Sequence[System]], list[Cell]]
    run_round: Callable[[Sequence[Cell], Scale, int], Iterator[Run]]
    compared: str
    references: Sequence[str]
    goals: Sequence[Goal] = field(default_factory=list)


def one_by_one(
    run: Callable[[Cell, Scale], Figures],
) -> Callable[[Sequence[Cell], Scale, int], Iterator[Run]]:
    """A round that visits the cells in an order of its own, so that drifts hit them alike."""

    def run_round(cells: Sequence[Cell], scale: Scale, number: int) -> Iterator[Run]:
        shuffled = list(cells)
        random.Random(number).shuffle(shuffled)
        for cell in shuffled:
            try:
                yield Run(cell, run(cell, scale))
            except RunFailedError as exc:
                yield Run(cell, {}, str(exc))

    return run_round


def steady_workers(systems: Sequence[System]) -> list[Cell]:
    """The one worker of each system that stands for it."""
    return [Cell(system, system.steady) for system in systems]


def all_workers(systems: Sequence[System]) -> list[Cell]:
    return [Cell(system, worker) for system in systems for worker in system.workers]


def median_of(rows: Rows, label: str, key: str) -> float | None:
    """The median of one figure over the rounds."""
    values = [figures[key] for figures in rows.get(label, ()) if key in figures]
    return median(values) if values else None


def ratio(rows: Rows, ours: str, other: str, key: str) -> float | None:
    """Ours to theirs: the median over the rounds, each with its own two neighbours."""
    pairs = zip(rows.get(ours, ()), rows.get(other, ()), strict=False)
    ratios = [a[key] / b[key] for a, b in pairs if key in a and b.get(key)]
    return median(ratios) if ratios else None


def best_ratio(rows: Rows, system: str, key: str) -> float | None:
    """Our best worker to theirs; the larger figure is the better."""

    def best(name: str) -> str | None:
        own = [label for label in rows if label.split(" ")[0] == name]
        figures = {label: found for label in own if (found := median_of(rows, label, key))}
        return max(figures, key=figures.__getitem__, default=None)

    ours, theirs = best("ours"), best(system)
    return ratio(rows, ours, theirs, key) if ours and theirs else None


def at_most(measure: str, text: str, label: str, key: str, limit: float) -> Goal:
    """A goal for the median of one of our own figures."""
    return Goal(measure, text, lambda rows: median_of(rows, label, key), limit)


def share_of_fastest(measure: str, text: str, label: str, key: str) -> Goal:
    """A goal that ours is as small as the smallest of the others."""

    def find(rows: Rows) -> float | None:
        ours = median_of(rows, label, key)
        others = [
            found
            for other in rows
            if not other.startswith("ours") and (found := median_of(rows, other, key)) is not None
        ]
        return ours / min(others) if ours is not None and others else None

    return Goal(measure, text, find, 1.0)
