"""Type checkers report every mistake in tasks.py, and nothing else."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

USES = Path(__file__).with_name("tasks.py")
ROOT = USES.parent.parent.parent
WRONG = {
    number
    for number, line in enumerate(USES.read_text().splitlines(), 1)
    if line.endswith("  # wrong")
}


def report(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command, str(USES)],
        cwd=USES.parent,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode in {0, 1}, done.stderr
    return done.stdout


def test_mypy() -> None:
    pytest.importorskip("mypy")
    text = report("mypy", "--strict", "--config-file=", "--follow-imports=silent")
    found = re.findall(r"^tasks\.py:(\d+): error:", text, re.MULTILINE)
    assert {int(line) for line in found} == WRONG, text


def test_pyright() -> None:
    pytest.importorskip("pyright")
    text = report("pyright", "--outputjson", "--pythonpath", sys.executable)
    found = [
        item
        for item in json.loads(text)["generalDiagnostics"]
        if item["severity"] == "error" and Path(item["file"]) == USES
    ]
    assert {item["range"]["start"]["line"] + 1 for item in found} == WRONG, found
