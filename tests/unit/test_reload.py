"""Noticing that the program has changed."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flask_taskworker.worker import reload
from flask_taskworker.worker.reload import Reloader, SourceWatch


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that is loaded."""
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "watched_module.py"
    path.write_text("x = 1\n")
    __import__("watched_module")
    yield path
    sys.modules.pop("watched_module", None)


def touch(path: Path) -> None:
    os.utime(path, (1, os.stat(path).st_mtime + 1))


def test_a_module_that_changed_is_noticed(module: Path) -> None:
    watch = SourceWatch()
    assert watch.changed() is None
    touch(module)
    assert watch.changed() == str(module)


def test_a_module_that_is_loaded_later_is_watched_from_then_on(
    tmp_path: Path, module: Path
) -> None:
    del sys.modules["watched_module"]
    watch = SourceWatch()
    touch(module)
    __import__("watched_module")
    assert watch.changed() is None
    touch(module)
    assert watch.changed() == str(module)


def test_a_file_that_is_away_for_a_moment_is_no_change(module: Path) -> None:
    watch = SourceWatch()
    text, stat = module.read_text(), os.stat(module)
    module.unlink()
    assert watch.changed() is None
    module.write_text(text)
    os.utime(module, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert watch.changed() is None


def test_what_is_installed_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = SourceWatch()
    watched = set(watch._seen)
    assert __file__ in watched
    assert os.__file__ not in watched
    assert pytest.__file__ not in watched


@pytest.mark.parametrize("text", ["def broken(:\n", "import nothing_of_this_name\n", "1 / 0\n"])
def test_a_program_that_cannot_be_loaded_is_watched_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "broken_module.py"
    path.write_text(text)
    watch = SourceWatch()
    with pytest.raises(Exception, match=r".") as caught:
        __import__("broken_module")
    wrapped = ValueError("it failed")
    wrapped.__cause__ = caught.value
    watch.also(wrapped)
    touch(path)
    assert watch.changed() == str(path)


def test_a_change_calls_back_once(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "INTERVAL", 0.01)
    changed = threading.Event()
    with Reloader(SourceWatch(), changed.set):
        touch(module)
        assert changed.wait(5)


def test_without_a_change_nothing_happens(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "INTERVAL", 0.001)
    called: list[int] = []
    with Reloader(SourceWatch(), lambda: called.append(1)):
        pass
    assert called == []
