"""The log of a worker process: where it goes and what a line looks like.

Only our own logger is set up. The root logger and the app's handlers stay as they are.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from logging.handlers import WatchedFileHandler
from typing import Literal

from ..exceptions import ConfigurationError
from ..task import current_request

#: The logger whose messages are written.
LOGGER = "flask_taskworker"
#: What marks the handler that is ours.
_NAME = "taskworker-cli"
_COLORS = {
    logging.DEBUG: "\033[2m",
    logging.WARNING: "\033[33m",
    logging.ERROR: "\033[31m",
    logging.CRITICAL: "\033[1;31m",
}
_PLAIN = "\033[0m"


@dataclass(frozen=True)
class Log:
    """How a worker process logs. It can be pickled, for processes that have to log as well."""

    level: str = "info"
    form: Literal["text", "json"] = "text"
    #: A file instead of stderr. One that is moved away is opened anew.
    file: str | None = None
    #: Colours where stderr is a terminal.
    color: bool = True

    def start(self) -> None:
        """Log like this from now on.

        :raises ConfigurationError: if the file cannot be written.
        """
        handler = self._handler()
        handler.set_name(_NAME)
        handler.setFormatter(self._formatter(handler))
        logger = logging.getLogger(LOGGER)
        for old in [old for old in logger.handlers if old.get_name() == _NAME]:
            logger.removeHandler(old)
            old.close()
        logger.addHandler(handler)
        logger.setLevel(self.level.upper())
        logger.propagate = False

    def _handler(self) -> logging.Handler:
        if self.file is None:
            return logging.StreamHandler()
        try:
            return WatchedFileHandler(self.file, encoding="utf-8", errors="backslashreplace")
        except OSError as exc:
            raise ConfigurationError(
                f"the log file {self.file} cannot be written: {exc.strerror or exc}"
            ) from exc

    def _formatter(self, handler: logging.Handler) -> logging.Formatter:
        if self.form == "json":
            return JsonFormatter()
        stream = getattr(handler, "stream", None)
        terminal = self.file is None and stream is not None and stream.isatty()
        return TextFormatter(color=self.color and terminal and not os.environ.get("NO_COLOR"))


class TextFormatter(logging.Formatter):
    """Lines for people: time, level, thread, the task that is running, the message."""

    def __init__(self, color: bool = False) -> None:
        super().__init__("[%(asctime)s: %(levelname)s/%(threadName)s] %(message)s")
        self._color = color

    def formatMessage(self, record: logging.LogRecord) -> str:
        task_id, task_name = _task_of(record)
        if task_id is not None and task_id not in record.message:
            record.message = f"{task_name}[{task_id}]: {record.message}"
        line = super().formatMessage(record)
        color = _COLORS.get(record.levelno) if self._color else None
        return f"{color}{line}{_PLAIN}" if color else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger`` and ``message`` always,
    ``task_id`` and ``task_name`` inside a task, ``exc`` with an exception."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        task_id, task_name = _task_of(record)
        if task_id is not None:
            entry |= {"task_id": task_id, "task_name": str(task_name)}
        if record.exc_info:
            entry["exc"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _task_of(record: logging.LogRecord) -> tuple[str | None, str | None]:
    """The id and the name of the task that a record is about, or was made in."""
    task_id = getattr(record, "task_id", None)
    if task_id is not None:
        return str(task_id), str(getattr(record, "task_name", None) or "task")
    request = current_request()
    return request.id, request.task
