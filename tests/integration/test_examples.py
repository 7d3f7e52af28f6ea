"""Each example does what it says at its top."""

import json
import re
import shutil
import time
import urllib.request
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def quickstart(root: Path, tmp_path: Path) -> None:
    """A copy where nothing else is."""
    (tmp_path / "examples").mkdir()
    shutil.copy(root / "examples" / "quickstart.py", tmp_path / "examples")


def test_the_quickstart_prints_results_and_latencies(start_python, tmp_path: Path) -> None:
    began = time.monotonic()
    program = start_python("examples/quickstart.py")
    output, _ = program.communicate(timeout=30)
    took = time.monotonic() - began
    assert program.returncode == 0, output
    title, *rows = output.splitlines()
    assert title.split() == ["sent", "with", "result", "started", "after", "result", "after"]
    pattern = r"(\w+)\.(\w+)\(.*\) +(\S.*\S|\S) +([\d.]+) ms +([\d.]+) ms"
    found = [re.fullmatch(pattern, row) for row in rows]
    assert all(found), output
    assert [match.groups()[:3] for match in found] == [
        ("greet", "apply", "Hello, Ada!"),
        ("add", "delay", "5"),
        ("report", "apply_async", "The report of 1815 is ready."),
    ]
    assert 1000 <= float(found[2][4]) <= float(found[2][5])
    assert took < 10
    assert list(tmp_path.rglob("instance/taskworker.db"))


def test_the_quickstart_serves(start_python) -> None:
    program = start_python("-m", "flask", "--app", "examples/quickstart", "run", "--port", "0")
    server = next(
        found[1]
        for line in program.stdout
        if (found := re.search(r"Running on (http://\S+)", line))
    )
    queue = urllib.request.Request(f"{server}/add/2/3", method="POST")
    with urllib.request.urlopen(queue, timeout=10) as answer:
        assert answer.status == 202
        look = json.load(answer)["look"]
    deadline = time.monotonic() + 10
    while True:
        with urllib.request.urlopen(server + look, timeout=10) as answer:
            shown = json.load(answer)
        if shown["state"] == "SUCCESS":
            break
        assert time.monotonic() < deadline, shown
        time.sleep(0.02)
    assert shown["value"]["value"] == 5
