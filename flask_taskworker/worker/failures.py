"""How the log shows a run that raised, and where its traceback begins."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

from ..backends.encoding import format_traceback
from ..texts import text_of

if TYPE_CHECKING:
    from ..message import TaskMessage

log = logging.getLogger("flask_taskworker.worker")

#: An exception that says more than this is logged as text, cut to a bounded length.
LOGGED_TEXT = 10_000
#: Our own frames at the top of a traceback tell a task's author nothing.
_OURS = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep
    for file in (os.path.dirname(__file__), asyncio.__file__)
)


def trim_traceback(exc: BaseException) -> None:
    """Have the traceback of a task's exception begin at the task's own frame."""
    first = exc.__traceback__
    while first is not None and first.tb_frame.f_code.co_filename.startswith(_OURS):
        first = first.tb_next
    exc.with_traceback(first or exc.__traceback__)  # some refuse an assignment


def log_failure(
    message: TaskMessage, exc: BaseException, expected: tuple[type[BaseException], ...] = ()
) -> None:
    text = text_of(exc)
    if isinstance(exc, expected):
        shown = text[:LOGGED_TEXT]
        log.info("task %s[%s] raised expected %s: %s", message.task, message.id,
                 type(exc).__name__, shown)  # fmt: skip
        return
    if len(text) <= LOGGED_TEXT:
        info = (type(exc), exc, exc.__traceback__)
        described = f"{type(exc).__name__}: {text}"
        log.error("task %s[%s] raised %s", message.task, message.id, described, exc_info=info)
    else:  # the log gets what the store gets: a traceback of bounded length
        traceback = format_traceback(exc)
        log.error("task %s[%s] raised\n%s", message.task, message.id, traceback)
