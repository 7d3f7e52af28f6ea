"""How data is shown: aligned columns for people, one JSON document for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def json_option(command: F) -> F:
    """The option ``--json`` of every command that reads."""
    return click.option("-j", "--json", "as_json", is_flag=True, help="One JSON document.")(command)


def show_json(data: object) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(data, default=str))


def show_table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as they have to be; nothing if there are no rows."""
    lines = [[_cell(value) for value in row] for row in rows]
    if not lines:
        return
    widths = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
    for line in [list(titles), *lines]:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def show_pairs(data: Mapping[str, object], indent: str = "") -> None:
    """Names and values, one a line."""
    width = max(map(len, data), default=0)
    for name, value in data.items():
        click.echo(f"{indent}{name.ljust(width)}  {_cell(value)}".rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return " ".join(str(value).split())
