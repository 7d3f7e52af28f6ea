"""Tables, ratios and goals as text."""

from __future__ import annotations

from collections.abc import Sequence

from .figures import median
from .measures.base import Column, Figures, Goal, Measure, Rows, ratio


def table(measure: Measure, rows: Rows) -> str:
    """A measure's figures: the median of the rounds, and the range if there are several."""
    references = [label for label in measure.references if label in rows]
    header = ["", *(column.title for column in measure.columns)]
    header += [f"{label} ÷ it" for label in references]
    lines = [header]
    for label, rounds in rows.items():
        line = [label, *(_cell(column, rounds) for column in measure.columns)]
        line += [_ratio(rows, reference, label, measure.compared) for reference in references]
        lines.append(line)
    runs = max((len(rounds) for rounds in rows.values()), default=0)
    return f"{measure.title} (runs: {runs})\n{_aligned(lines)}"


def goals(chosen: Sequence[tuple[Goal, Rows]]) -> str:
    """Each goal with what was reached."""
    lines = [["goal", "bound", "reached", ""]]
    for goal, rows in chosen:
        value = goal.find(rows)
        bound = f"{'≥' if goal.at_least else '≤'} {goal.limit:g}"
        reached = "-" if value is None else f"{value:.3g}"
        verdict = "not measured" if value is None else "met" if goal.met(rows) else "MISSED"
        lines.append([goal.text, bound, reached, verdict])
    return _aligned(lines)


def _cell(column: Column, rounds: Sequence[Figures]) -> str:
    values = [figures[column.key] for figures in rounds if column.key in figures]
    if not values:
        return "-"
    middle = column.show.format(median(values))
    if len(values) == 1:
        return middle
    low, high = column.show.format(min(values)), column.show.format(max(values))
    return middle if low == high else f"{middle} [{low}-{high}]"


def _ratio(rows: Rows, reference: str, label: str, key: str) -> str:
    found = None if reference == label else ratio(rows, reference, label, key)
    return "" if found is None else f"{found:.3g}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    written = []
    for line in lines:
        first, *others = (
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        written.append("  ".join(["", first, *others]).rstrip())
    return "\n".join(written)
