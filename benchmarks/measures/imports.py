"""What importing a package adds to importing Flask, each time in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

from ..scale import Scale
from ..session import ROOT, RunFailedError, environment
from .base import Cell, Column, Figures, Measure, at_most, one_by_one

_PROGRAM = """
import flask, sys, time
before = len(sys.modules)
begin = time.perf_counter()
{statement}
print((time.perf_counter() - begin) * 1e3, len(sys.modules) - before)
"""


def _run(cell: Cell, scale: Scale) -> Figures:
    program = _PROGRAM.format(statement=cell.system.import_statement)
    _compile(program)
    milliseconds, modules = _output(program).split()
    return {"ms": float(milliseconds), "modules": float(modules)}


@cache
def _compile(program: str) -> None:
    """Import once unmeasured, so that the bytecode of every module is there."""
    _output(program)


def _output(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        check=False,
    )
    if done.returncode:
        raise RunFailedError(done.stderr.strip().splitlines()[-1])
    return done.stdout


IMPORTS = Measure(
    name="imports",
    title="Importing, beyond `import flask`",
    columns=[Column("ms", "ms", "{:.1f}"), Column("modules", "modules")],
    cells=lambda systems: [Cell(system) for system in systems if system.import_statement],
    run_round=one_by_one(_run),
    compared="ms",
    references=["ours"],
    goals=[at_most("imports", "import flask_taskworker beyond flask, ms", "ours", "ms", 20)],
)
