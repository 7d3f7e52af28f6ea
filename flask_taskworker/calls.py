"""Makes a message of a call: the task's defaults, the call's options, the run it was made in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Protocol

from . import clock
from .exceptions import InvalidOptionError
from .message import Payload, TaskMessage
from .options import check_time_limits
from .task import current_request

if TYPE_CHECKING:
    from .config import Config
    from .options import CallOptions, TaskOptions


class Callee(Protocol):
    """What there is to know of the task that is called."""

    name: str
    options_: TaskOptions


def compose(
    task: Callee,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: CallOptions,
    config: Config,
    reply_to: str,
) -> TaskMessage:
    """The message for one call; its arguments and options are checked already.

    :param reply_to: the address for results that are sent as messages.
    """
    task_id = options.get("task_id") or new_id()
    parent = current_request()
    defaults = task.options_
    if not options and not defaults and parent.id is None:  # the usual call
        return TaskMessage(
            task=task.name,
            id=task_id,
            payload=Payload(args, kwargs),
            root_id=task_id,
            ignore_result=config.ignore_result,
            reply_to=reply_to,
        )
    ignores = options.get("ignore_result", defaults.get("ignore_result", config.ignore_result))
    return TaskMessage(
        task=task.name,
        id=task_id,
        payload=Payload(
            args,
            kwargs,
            callbacks=_listed(options.get("link")),
            errbacks=_listed(options.get("link_error")),
        ),
        root_id=parent.root_id or task_id,
        parent_id=parent.id,
        eta=due(options.get("countdown"), options.get("eta")),
        expires=expiry(options.get("expires", defaults.get("expires"))),
        timelimit=_timelimit(task, options),
        ignore_result=ignores,
        shadow=options.get("shadow"),
        priority=options.get("priority", defaults.get("priority", 0)),
        headers=options.get("headers") or {},
        reply_to=reply_to,
    )


def _listed(signatures: Any) -> Sequence[Any] | None:
    if not signatures:
        return None
    return list(signatures) if isinstance(signatures, (list, tuple)) else [signatures]


def _timelimit(task: Callee, options: CallOptions) -> tuple[float | None, float | None]:
    """The limits of the call alone: the worker knows those of the task."""
    hard, soft = options.get("time_limit"), options.get("soft_time_limit")
    if hard is not None or soft is not None:
        check_time_limits({**task.options_, **options}, f"{task.name}.apply_async")
    return hard, soft


def new_id() -> str:
    """A random UUID (version 4) as text; ``uuid.uuid4`` takes twice as long."""
    number = bytearray(os.urandom(16))
    number[6] = number[6] & 0x0F | 0x40
    number[8] = number[8] & 0x3F | 0x80
    text = number.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def due(countdown: float | None, eta: datetime | None) -> datetime | None:
    """When a call may start, as an aware datetime; ``countdown`` wins. None is at once."""
    if countdown is not None:
        return None if countdown <= 0 else _in_seconds(countdown)
    return eta


def expiry(expires: float | timedelta | datetime | None) -> datetime | None:
    if expires is None or isinstance(expires, datetime):
        return expires
    return _in_seconds(expires.total_seconds() if isinstance(expires, timedelta) else expires)


def _in_seconds(seconds: float) -> datetime:
    try:
        return datetime.fromtimestamp(clock.wall() + seconds, timezone.utc)
    except (OverflowError, ValueError, OSError):
        raise InvalidOptionError(f"{seconds} seconds from now is no date") from None
