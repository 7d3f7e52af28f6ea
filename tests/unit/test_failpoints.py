"""Points at which a test makes the process fail."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flask_taskworker import failpoints
from flask_taskworker.failpoints import NAMES, FailpointError, arm, disarm, hit

pytestmark = pytest.mark.usefixtures("no_failpoints")


def test_a_point_that_is_not_armed_does_nothing() -> None:
    for name in NAMES:
        hit(name)


def test_an_armed_point_acts_once() -> None:
    seen: list[str] = []
    arm("before_run", seen.append)
    hit("after_run")
    hit("before_run")
    hit("before_run")
    assert seen == ["before_run"]


def test_a_point_may_wait_for_its_nth_hit() -> None:
    arm("before_ack", "raise", nth=3)
    hit("before_ack")
    hit("before_ack")
    with pytest.raises(FailpointError, match="before_ack"):
        hit("before_ack")
    hit("before_ack")


def test_points_are_armed_one_by_one_and_disarmed_together() -> None:
    arm("before_run", "raise")
    arm("after_run", "raise")
    with pytest.raises(FailpointError, match="after_run"):
        hit("after_run")
    disarm()
    hit("before_run")


def test_a_name_or_an_action_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="no failpoint 'before_lunch'; there are: before_publish"):
        arm("before_lunch", "kill")
    with pytest.raises(ValueError, match="no failpoint action 'explode'; use kill or raise"):
        arm("before_run", "explode")


def test_every_point_is_in_the_code_and_none_is_missing(root: Path) -> None:
    used = set()
    for file in (root / "flask_taskworker").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "hit"
                and isinstance(node.args[0], ast.Constant)
            ):
                used.add(node.args[0].value)
    assert used == set(NAMES)


HITS = """
from flask_taskworker import failpoints
for name in ("before_run", "after_run", "after_run"):
    try:
        failpoints.hit(name)
    except failpoints.FailpointError as exc:
        print("raised", exc)
    print("passed", name, flush=True)
"""


def run(setting: str, root: Path, environment: dict[str, str]) -> tuple[int, list[str], str]:
    done = subprocess.run(
        [sys.executable, "-c", HITS],
        env=environment | {"TASKWORKER_FAILPOINTS": setting, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(
    ("setting", "code", "lines"),
    [
        ("after_run=kill:2", -signal.SIGKILL, ["passed before_run", "passed after_run"]),
        (
            "before_run=raise, after_run",
            -signal.SIGKILL,
            ["raised before_run", "passed before_run"],
        ),
    ],
)
def test_the_environment_arms_a_started_program(
    setting: str, code: int, lines: list[str], root: Path, child_environment: dict[str, str]
) -> None:
    assert run(setting, root, child_environment)[:2] == (code, lines)


def test_a_mistake_in_the_environment_is_not_ignored(
    root: Path, child_environment: dict[str, str]
) -> None:
    code, _, errors = run("before_lunch=kill", root, child_environment)
    assert code == 1
    assert "no failpoint 'before_lunch'" in errors


def test_nothing_stays_armed_after_a_test() -> None:
    assert failpoints._armed == {}
