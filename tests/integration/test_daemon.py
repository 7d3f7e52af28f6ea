"""A worker as a daemon: another user, a umask, a sign of life."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from flask_taskworker import ConfigurationError
from flask_taskworker.pidfile import PidFile
from flask_taskworker.worker import daemon
from flask_taskworker.worker.daemon import SignOfLife, become, launch, set_umask
from support import wait_until


def in_a_child(program: str) -> list[str]:
    """What a program says that loads the module first."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import grp, os, pwd\nfrom flask_taskworker.worker.daemon import *\n{program}",
        ],
        capture_output=True,
        text=True,
    )
    return [*done.stdout.split(), *done.stderr.splitlines()[-1:]]


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize(
    "call", ["become('nobody', None)", f"become('{pwd.getpwnam('nobody').pw_uid}', None)"]
)
def test_root_becomes_another_user_for_good(call: str) -> None:
    nobody = pwd.getpwnam("nobody")
    said = in_a_child(f"{call}\nprint(os.getuid(), os.getgid(), 0 in os.getgroups())\nos.setuid(0)")
    assert said[:3] == [str(nobody.pw_uid), str(nobody.pw_gid), "False"]
    assert "PermissionError" in said[3]


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_a_number_without_a_name_will_do() -> None:
    said = in_a_child("become('54321', '54322'); print(os.getuid(), os.getgid(), os.getgroups())")
    assert said == ["54321", "54322", "[54322]"]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to begin with")
def test_others_are_refused() -> None:
    said = in_a_child(
        "os.setgid(54322); os.setuid(54321); become('54321', '54322'); become('0', None)"
    )
    assert "may not become user 0" in said[-1]


def test_users_and_groups_that_are_not_there_are_named() -> None:
    with pytest.raises(ConfigurationError, match="there is no user 'nobody-here'"):
        become("nobody-here", None)
    with pytest.raises(ConfigurationError, match="there is no group 'nobody-here'"):
        become(None, "nobody-here")
    become(str(os.getuid()), str(os.getgid()))  # who it is already


def test_the_umask_is_octal() -> None:
    before = os.umask(0)
    try:
        set_umask("027")
        assert os.umask(before) == 0o27
        for text in ("8", "x", "-99999999999999999999"):
            with pytest.raises(ConfigurationError, match="is no octal number"):
                set_umask(text)
    finally:
        os.umask(before)


def test_a_started_program_knows_that_it_is_detached_and_its_children_are_not(
    tmp_path: Path,
) -> None:
    output = tmp_path / "out"
    program = (
        "import subprocess, sys; from flask_taskworker.worker.daemon import is_detached; "
        "print(is_detached(), is_detached(), flush=True)\n"
        "if len(sys.argv) == 1: subprocess.run([sys.executable, '-c', sys.orig_argv[2], 'child'])"
    )
    with launch([sys.executable, "-c", program], str(output)) as process:
        assert process.wait(30) == 0
        assert os.getsid(0) != process.pid
    assert output.read_text().splitlines() == ["True True", "False False"]


def test_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"its output in .*/no/out"):
        launch([sys.executable, "-c", ""], str(tmp_path / "no" / "out"))


def test_a_worker_at_work_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "_BEAT", 0.01)
    path = tmp_path / "w.pid"
    file = PidFile(str(path))
    file.acquire()
    asked: list[bool] = []
    at_work = True

    def is_at_work() -> bool:
        asked.append(at_work)
        return at_work

    os.utime(path, (0, 0))
    with SignOfLife(file, is_at_work):
        wait_until(lambda: path.stat().st_mtime > 1, "a sign of life")
        at_work = False
        wait_until(lambda: False in asked, "another look")
        os.utime(path, (0, 0))
        asked.clear()
        wait_until(lambda: len(asked) > 2, "more looks")
        assert path.stat().st_mtime < 1
    file.release()
