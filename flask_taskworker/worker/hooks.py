"""Tells those who watch a run: the task's own hooks, and the receivers of signals.

They only watch. Whatever one raises is logged, and the outcome stays as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import signals, states
from ..backends.encoding import format_traceback
from ..task import ExceptionInfo, Request, Task

if TYPE_CHECKING:
    from ..retries import RetryNow

log = logging.getLogger("flask_taskworker.worker")

_AT_THE_END = ("on_success", "on_failure", "on_retry", "after_return")
_SIGNALS_AT_THE_END = (
    signals.task_success, signals.task_failure, signals.task_retry, signals.task_postrun,
)  # fmt: skip


def watched_at_the_end(task: Task[..., Any]) -> bool:
    """Whether anybody is told how a run of this task ends."""
    if any(signal.receivers for signal in _SIGNALS_AT_THE_END):
        return True
    return type(task) is not Task and any(_overrides(task, name) for name in _AT_THE_END)


def starts(task: Task[..., Any], request: Request) -> None:
    """The function is about to be called."""
    if type(task) is not Task and _overrides(task, "before_start"):
        _call(task, request, task.before_start, request.id, request.args, request.kwargs)


def begins(task: Task[..., Any], request: Request) -> None:
    """A run begins."""
    signals.task_prerun.notify(
        task, task_id=request.id, task=task, args=request.args, kwargs=request.kwargs
    )


def ended(
    task: Task[..., Any], request: Request, state: str, value: Any, retry: RetryNow | None
) -> None:
    """A run has ended, and that is stored.

    :param state: how.
    :param value: what it returned, or the exception it ended with.
    :param retry: for the state RETRY.
    """
    call = (request.id, request.args, request.kwargs)
    if state == states.SUCCESS:
        _call(task, request, task.on_success, value, *call)
        signals.task_success.notify(task, result=value)
        _call(task, request, task.after_return, state, value, *call, None)
    elif state == states.FAILURE:
        einfo = info_of(value)
        _call(task, request, task.on_failure, value, *call, einfo)
        signals.task_failure.notify(
            task, task_id=request.id, exception=value, args=request.args, kwargs=request.kwargs,
            traceback=value.__traceback__, einfo=einfo,
        )  # fmt: skip
        _call(task, request, task.after_return, state, value, *call, einfo)
    elif state == states.RETRY and retry is not None:
        einfo = info_of(retry.exc or retry)
        _call(task, request, task.on_retry, retry.exc, *call, einfo)
        signals.task_retry.notify(task, request=request, reason=retry, einfo=einfo)


def leaves(task: Task[..., Any], request: Request, state: str, value: Any) -> None:
    """Nothing more happens in this run."""
    signals.task_postrun.notify(
        task, task_id=request.id, task=task, args=request.args, kwargs=request.kwargs,
        retval=value, state=state,
    )  # fmt: skip


def info_of(exc: BaseException) -> ExceptionInfo:
    """An exception as hooks and receivers get it."""
    return ExceptionInfo(type(exc), exc, format_traceback(exc))


def _overrides(task: Task[..., Any], name: str) -> bool:
    return getattr(type(task), name) is not getattr(Task, name)


def _call(task: Task[..., Any], request: Request, hook: Callable[..., None], *about: Any) -> None:
    try:
        hook(*about)
    except BaseException:  # SystemExit included: it is not for a hook to say
        log.exception("%s of task %s[%s] failed", hook.__name__, task.name, request.id)
