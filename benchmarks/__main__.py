"""``python -m benchmarks``: measures, prints a table per measure, then the goals."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from . import report, stores
from .adapters import all_systems
from .figures import median, spin
from .measures import MEASURES
from .measures.base import Figures, Measure
from .scale import FULL, QUICK, Scale
from .system import System

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    arguments = _parse()
    store = os.environ[stores.VARIABLE] = arguments.store
    systems = _choose_systems(arguments.systems, store)
    scale = _choose_scale(arguments)
    measures = [MEASURES[name] for name in arguments.measures or MEASURES]
    print(_machine(), flush=True)
    begin = time.monotonic()
    log = _Log()
    rows = {measure.name: run_measure(measure, systems, scale, log) for measure in measures}
    goals = [
        (goal, rows[measure.name])
        for measure in measures
        for goal in measure.goals
        if goal.store in ("", store)
    ]
    if goals:
        print(f"\nGoals on {store}\n{report.goals(goals)}")
    print(f"\n{time.monotonic() - begin:.0f} s. {log.noise()} Every run: {log.path}")
    return 0 if not arguments.strict or all(goal.met(found) for goal, found in goals) else 1


def run_measure(
    measure: Measure, systems: Sequence[System], scale: Scale, log: _Log
) -> dict[str, list[Figures]]:
    """All rounds of one measure; prints its table and returns the figures by row."""
    cells = measure.cells([system for system in systems if system.takes_part(measure.name)])
    rows: dict[str, list[Figures]] = {cell.label: [] for cell in cells}
    for number in range(scale.rounds[measure.name]):
        for run in measure.run_round(cells, scale, number):
            log.write(measure.name, run.cell.label, number, run.figures, run.failure)
            if run.failure:
                print(f"! {measure.name}, {run.cell.label}: {run.failure}", file=sys.stderr)
            # A failed run keeps its place: ratios pair the runs of one round.
            rows[run.cell.label].append(run.figures)
    print(f"\n{report.table(measure, rows)}", flush=True)
    return rows


class _Log:
    """Every run as a line of JSON, with how busy the machine was."""

    def __init__(self) -> None:
        RESULTS.mkdir(exist_ok=True)
        self.path = RESULTS / time.strftime("%Y-%m-%d-%H%M%S.jsonl")
        self._spins: list[float] = []

    def write(self, measure: str, row: str, number: int, figures: Figures, failure: str) -> None:
        self._spins.append(spin())
        line: dict[str, Any] = {
            "measure": measure,
            "row": row,
            "round": number,
            "spin_ms": self._spins[-1],
            **figures,
        }
        if failure:
            line["failure"] = failure
        with open(self.path, "a") as file:
            print(json.dumps(line), file=file)

    def noise(self) -> str:
        if not self._spins:
            return ""
        return (
            f"A fixed loop took {median(self._spins):.1f} ms "
            f"[{min(self._spins):.1f}-{max(self._spins):.1f}]: the wider, the noisier."
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "measures",
        nargs="*",
        choices=[[], *MEASURES],
        metavar="MEASURE",
        help=f"default: all of {', '.join(MEASURES)}",
    )
    parser.add_argument("--quick", action="store_true", help="smaller runs: 3 to 4 minutes")
    parser.add_argument("--rounds", type=int, help="how often each system is visited")
    parser.add_argument("--systems", help="with commas between; default: all that are installed")
    parser.add_argument(
        "--store", choices=stores.STORES, default="sqlite", help="where messages are kept"
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 unless every goal is met"
    )
    return parser.parse_args()


def _choose_systems(wanted: str | None, store: str) -> list[System]:
    found, missing = all_systems(store)
    for adapter, reason in missing.items():
        print(f"{adapter} is left out: {reason}", file=sys.stderr)
    if wanted is None:
        return found
    names = wanted.split(",")
    unknown = set(names) - {system.name for system in found}
    if unknown:
        raise SystemExit(
            f"no system {', '.join(sorted(unknown))}; there are: "
            f"{', '.join(system.name for system in found)}"
        )
    return [system for system in found if system.name in names]


def _choose_scale(arguments: argparse.Namespace) -> Scale:
    scale = QUICK if arguments.quick else FULL
    if arguments.rounds is None:
        return scale
    return replace(scale, rounds=dict.fromkeys(scale.rounds, arguments.rounds))


def _machine() -> str:
    packages = (
        "flask-taskworker", "celery", "kombu", "SQLAlchemy", "huey", "dramatiq", "procrastinate",
        "Flask",
    )  # fmt: skip
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    return (
        f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.platform()}\n"
        f"{versions}\nMedians of the rounds [min-max]; a ratio is the median of the rounds' own."
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _terminated(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)  # unwinds: every session ends its processes


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())
