"""States that a task stores while it runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import states
from .backends.base import ResultBackend, TaskRecord
from .backends.encoding import encode_exception
from .exceptions import InvalidOptionError

if TYPE_CHECKING:
    from .task import Request

log = logging.getLogger("flask_taskworker.worker")

#: Longest state, in characters: what the column of Celery's result tables holds.
STATE_LIMIT = 50


def store_state(
    backend: ResultBackend, request: Request | None, task_id: str, state: str | None, meta: Any
) -> None:
    """Store a state; see :meth:`Task.update_state <flask_taskworker.task.Task.update_state>`.

    :param request: the run that stores it, if it is its own state.
    """
    if not isinstance(state, str) or not 0 < len(state) <= STATE_LIMIT or not state.isprintable():
        raise InvalidOptionError(
            f"update_state(state={state!r}): must be a text of 1-{STATE_LIMIT} characters, "
            "for example 'PROGRESS'"
        )
    record = TaskRecord(
        task_id,
        state,
        _stored(state, meta),
        group_id=request.group if request else None,
        parent_id=request.parent_id if request else None,
        reply_to=request.reply_to if request else None,
        correlation_id=request.correlation_id if request else None,
    ).done_now()
    try:
        backend.store(record)
    except backend.transient_errors as exc:
        log.warning("state %s of %s is not stored: %s", state, task_id, exc)


def _stored(state: str, meta: Any) -> Any:
    if isinstance(meta, BaseException):
        return encode_exception(meta)
    if state in states.EXCEPTION_STATES and not (
        isinstance(meta, Mapping) and {"exc_type", "exc_message"} <= meta.keys()
    ):
        raise InvalidOptionError(
            f"update_state(state={state!r}, meta={meta!r}): with this state, readers expect an "
            "exception as meta. Pass one, or name a state of your own."
        )
    return meta
