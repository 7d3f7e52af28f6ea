"""Pid files: who holds one, who may take it over."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flask_taskworker import ConfigurationError
from flask_taskworker.pidfile import PidFile, age, holder

OTHER = """
import sys
from flask_taskworker.pidfile import PidFile
file = PidFile(sys.argv[1])
file.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "worker.pid")


@pytest.fixture
def other(path: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the file."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_it_holds_the_number_and_goes_with_the_process(path: str) -> None:
    file = PidFile(path)
    file.acquire()
    assert Path(path).read_text() == f"{os.getpid()}\n"
    assert holder(path) == os.getpid()
    file.release()
    file.release()
    assert not os.path.exists(path)
    assert holder(path) is None


def test_a_living_process_keeps_it(path: str, other: subprocess.Popen[str]) -> None:
    assert holder(path) == other.pid
    with pytest.raises(ConfigurationError, match=f"held by process {other.pid}, which is running"):
        PidFile(path).acquire()
    assert holder(path) == other.pid


def test_what_a_killed_process_left_behind_is_taken_over(
    path: str, other: subprocess.Popen[str]
) -> None:
    other.kill()
    other.wait()
    assert os.path.exists(path)
    assert holder(path) is None
    file = PidFile(path)
    file.acquire()
    assert holder(path) == os.getpid()
    file.release()


@pytest.mark.parametrize(
    "text",
    [str(os.getpid()), "1", "nonsense", "", "\ufffd\n\n9"],
    ids=["ours", "first", "word", "nothing", "lines"],
)
def test_a_number_alone_proves_nothing(path: str, text: str) -> None:
    Path(path).write_text(text)
    assert holder(path) is None
    file = PidFile(path)
    file.acquire()
    assert holder(path) == os.getpid()
    file.release()


def test_looking_at_it_does_not_keep_a_worker_from_starting(path: str) -> None:
    Path(path).write_text("7")
    for _ in range(20):
        assert holder(path) is None
        file = PidFile(path)
        file.acquire()
        file.release()
        Path(path).write_text("7")


def test_a_file_that_somebody_else_made_in_its_place_is_left_alone(path: str) -> None:
    file = PidFile(path)
    file.acquire()
    os.unlink(path)
    Path(path).write_text("theirs")
    file.release()
    assert Path(path).read_text() == "theirs"


def test_a_forked_child_does_not_remove_it(path: str) -> None:
    file = PidFile(path)
    file.acquire()
    child = os.fork()
    if child == 0:
        file.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert holder(path) == os.getpid()
    file.release()


def test_a_touch_is_a_sign_of_life(path: str) -> None:
    file = PidFile(path)
    file.acquire()
    os.utime(path, (0, 0))
    assert age(path) > 1000
    file.touch()
    assert age(path) < 1000
    os.unlink(path)
    file.touch()  # somebody removed it: no reason to end
    file.release()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"pid file .*/no/x\.pid cannot be written"):
        PidFile(str(tmp_path / "no" / "x.pid")).acquire()
    assert holder(str(tmp_path / "no" / "x.pid")) is None
