"""The log of a worker process: its lines, and whose loggers it touches."""

from __future__ import annotations

import io
import json
import logging
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_taskworker import ConfigurationError, Request
from flask_taskworker.task import running
from flask_taskworker.worker.logs import JsonFormatter, Log

log = logging.getLogger("flask_taskworker.test")


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    logger = logging.getLogger("flask_taskworker")
    kept = list(logger.handlers), logger.level, logger.propagate
    yield
    for handler in logger.handlers:
        if handler not in kept[0]:
            handler.close()
    logger.handlers[:], logger.propagate = kept[0], kept[2]
    logger.setLevel(kept[1])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(setup: Log, monkeypatch: pytest.MonkeyPatch, stream: Any = None) -> str:
    """What stderr gets of a warning."""
    stream = stream or io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    setup.start()
    log.warning("it is %s", "late")
    return str(stream.getvalue())


def test_a_line_says_when_how_bad_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    assert written(Log(), monkeypatch).endswith(": WARNING/MainThread] it is late\n")


def test_lines_below_the_level_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert written(Log(level="error"), monkeypatch) == ""


def test_a_task_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    Log().start()
    with running(Request(id="id-7", task="shop.send")):
        log.warning("late")
        log.warning("task shop.send[id-7] is late")
    log.warning("told", extra={"task_id": "id-8", "task_name": "shop.bill"})
    texts = [line.partition("] ")[2] for line in stream.getvalue().splitlines()]
    assert texts == [
        "shop.send[id-7]: late",
        "task shop.send[id-7] is late",
        "shop.bill[id-8]: told",
    ]


def test_json_is_one_object_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    Log(form="json").start()
    log.info("one\ntwo \ud800")
    with running(Request(id="id-7", task="shop.send")):
        try:
            raise ValueError("no")
        except ValueError:
            log.exception("it failed: %s", "ü")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "INFO",
        "logger": "flask_taskworker.test",
        "message": "one\ntwo \ud800",
    }
    assert (second["task_id"], second["task_name"]) == ("id-7", "shop.send")
    assert second["message"] == "it failed: ü"
    assert second["exc"].startswith("Traceback")
    assert second["exc"].endswith("ValueError: no")


@pytest.mark.parametrize(
    ("color", "environment", "stream", "colored"),
    [
        (True, None, Terminal, True),
        (True, "1", Terminal, False),
        (True, "", Terminal, True),
        (False, None, Terminal, False),
        (True, None, io.StringIO, False),
    ],
)
def test_colors_are_for_terminals_that_want_them(
    color: bool,
    environment: str | None,
    stream: type[io.StringIO],
    colored: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if environment is not None:
        monkeypatch.setenv("NO_COLOR", environment)
    assert ("\033[" in written(Log(color=color), monkeypatch, stream())) == colored


def test_a_file_gets_the_log_and_survives_being_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "worker.log"
    assert written(Log(file=str(path)), monkeypatch) == ""
    path.rename(tmp_path / "old.log")
    log.warning("after")
    assert "it is late" in (tmp_path / "old.log").read_text()
    assert path.read_text().endswith("] after\n")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"log file .*/no/such\.log cannot be written"):
        Log(file=str(tmp_path / "no" / "such.log")).start()


def test_only_our_own_logger_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    root, app = logging.getLogger(), logging.getLogger("shop")
    before = list(root.handlers), root.level, list(app.handlers), app.level, app.propagate
    written(Log(level="debug"), monkeypatch)
    written(Log(form="json"), monkeypatch)
    after = list(root.handlers), root.level, list(app.handlers), app.level, app.propagate
    assert after == before
    ours = [h for h in logging.getLogger("flask_taskworker").handlers if h.get_name()]
    assert [type(handler.formatter) for handler in ours] == [JsonFormatter]


def test_another_process_can_be_told_to_log_alike() -> None:
    setup = Log("debug", "json", "/tmp/x.log", color=False)
    assert pickle.loads(pickle.dumps(setup)) == setup


def test_a_message_that_cannot_be_built_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    for form in ("text", "json"):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        Log(form=form).start()  # type: ignore[arg-type]
        log.warning("%d", "no number")
        log.warning("but this")
        assert "but this" in sys.stderr.getvalue()  # type: ignore[attr-defined]
