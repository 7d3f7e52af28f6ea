"""Retries: who asks for one, when it is due, and what the next message says.

Asking and publishing are apart. A task raises :class:`RetryNow`, or notes it and goes on;
the executor publishes the next message as a step of its own, before the old one is settled.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from kombu import serialization

from .calls import due, expiry
from .exceptions import (
    MaxRetriesExceededError,
    NotInitialisedError,
    Retry,
    TaskControl,
)
from .options import check_retry_options

if TYPE_CHECKING:
    from .config import Config
    from .message import Received, TaskMessage
    from .options import CallOptions, RetryOptions
    from .task import Request, Task

#: The longest pause that grows by itself, in seconds; ``retry_backoff_max`` sets another.
BACKOFF_MAX = 600
#: 2 to the power of more retries than that is no pause any more.
_MOST_DOUBLINGS = 64
#: Options of a call that stand in the message as they are.
_IN_MESSAGE = ("priority", "headers", "ignore_result", "shadow")


class RetryNow(Retry):
    """A :class:`~flask_taskworker.exceptions.Retry` with what the executor needs to publish it."""

    def __init__(
        self,
        exc: BaseException | None,
        countdown: float | None,
        eta: datetime | None,
        args: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
        options: CallOptions,
    ) -> None:
        super().__init__(None, exc, countdown if countdown is not None else eta)
        self.eta = due(countdown, eta)
        self.new_args, self.new_kwargs, self.options = args, kwargs, options


def ask(
    task: Task[..., Any],
    request: Request,
    exc: BaseException | None,
    config: Callable[[], Config],
    options: RetryOptions,
    *,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> RetryNow:
    """The retry of a run, if it may have one; see :meth:`Task.retry
    <flask_taskworker.task.Task.retry>` for the meaning and the errors.

    :param config: finds the settings; a direct call may have none.
    """
    # None is what these have where they are passed on unset.
    given = {name: value for name, value in options.items() if value is not None}
    check_retry_options(given)
    allowed = cast("int | None", given.pop("max_retries", None))
    if request.called_directly:
        _raise_here(task, exc)
    if args is not None or kwargs is not None:
        task.check_arguments(
            request.args if args is None else args, request.kwargs if kwargs is None else kwargs
        )
    if allowed is None:
        allowed = task.options_.get("max_retries", config().max_retries)
    if allowed is not None and request.retries >= allowed:
        if exc is not None:
            raise exc
        raise MaxRetriesExceededError(
            f"can't retry {task.name}[{request.id}]: {allowed} retries are used up",
            task_args=request.args,
            task_kwargs=request.kwargs,
        )
    countdown = cast("float | None", given.pop("countdown", None))
    eta = cast("datetime | None", given.pop("eta", None))
    if countdown is None and eta is None:
        countdown = task.options_.get("retry_delay", config().retry_delay)
    return RetryNow(exc, countdown, eta, args, kwargs, cast("CallOptions", given))


def _raise_here(task: Task[..., Any], exc: BaseException | None) -> None:
    """Nobody can run a direct call again: its caller gets what went wrong."""
    exc = exc or sys.exc_info()[1]
    if exc is not None:
        raise exc
    raise NotInitialisedError(f"{task.name}.retry() only works while a worker runs the task")


def automatic(
    task: Task[..., Any], request: Request, exc: BaseException, config: Config
) -> BaseException:
    """What a run has ended with: a retry if the task's ``autoretry_for`` says so, else ``exc``."""
    options = task.options_
    wanted = options.get("autoretry_for")
    if not wanted or isinstance(exc, TaskControl) or not isinstance(exc, tuple(wanted)):
        return exc
    if isinstance(exc, tuple(options.get("dont_autoretry_for", ()))):
        return exc
    given = cast("RetryOptions", dict(options.get("retry_kwargs", {})))
    factor = options.get("retry_backoff", False)
    if factor:
        given["countdown"] = backoff(
            factor,
            request.retries,
            options.get("retry_backoff_max", BACKOFF_MAX),
            options.get("retry_jitter", True),
        )
    try:
        return ask(task, request, exc, lambda: config, given)
    except BaseException as ended:  # mostly exc itself: the retries are used up
        return ended


def backoff(factor: float, retries: int, maximum: float, jitter: bool) -> float:
    """The pause before a retry, in seconds: ``factor``, doubled with each retry, up to ``maximum``.

    :param factor: whole seconds, at least 1; True is 1.
    :param retries: how many there were before.
    :param jitter: take a random whole number from 0 to the pause instead, so that tasks that
        failed together do not come back together.
    """
    pause = min(maximum, int(max(1.0, factor)) * 2 ** min(retries, _MOST_DOUBLINGS))
    return random.randrange(int(pause) + 1) if jitter else pause


def next_message(message: TaskMessage, retry: RetryNow) -> TaskMessage:
    """The message of the next run: the same call, with what the retry changes."""
    payload = message.payload._replace(
        args=message.payload.args if retry.new_args is None else retry.new_args,
        kwargs=message.payload.kwargs if retry.new_kwargs is None else retry.new_kwargs,
    )
    options: Mapping[str, Any] = retry.options
    changes = {name: options[name] for name in _IN_MESSAGE if name in options}
    if "expires" in options:
        changes["expires"] = expiry(options["expires"])
    hard, soft = message.timelimit
    changes["timelimit"] = options.get("time_limit", hard), options.get("soft_time_limit", soft)
    return replace(
        message,
        payload=payload,
        retries=message.retries + 1,
        eta=retry.eta,
        parent_id=message.id,
        argsrepr=None,
        kwargsrepr=None,
        origin=None,
        **changes,
    )


def packing(raw: Received, retry: RetryNow) -> tuple[str | None, str | None]:
    """Serializer and compression of the next message: as the retry says, else as it came."""
    options = retry.options
    serializer = options.get("serializer") or serialization.registry.type_to_name.get(
        raw.content_type
    )
    headers = raw.headers if isinstance(raw.headers, Mapping) else {}
    return serializer, options.get("compression", headers.get("compression"))
