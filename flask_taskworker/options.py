"""The options of ``define_task`` and of ``apply_async``: names, types, checks.

Each option stands here once. A wrong name or value is refused where it is written,
with a suggestion, before anything is queued.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypedDict

from . import clock
from .exceptions import InvalidOptionError, UnknownOptionError
from .fields import FARTHEST_ETA

if TYPE_CHECKING:
    from collections.abc import Callable


class TaskOptions(TypedDict, total=False):
    """Options of ``define_task``; each is the default for the calls of that task."""

    #: The name on the wire; the default is ``module.function``.
    name: str
    #: The queue it is sent to; the default is ``TASKER_DEFAULT_QUEUE``.
    queue: str
    #: How often ``retry`` may queue it again; None is without limit.
    max_retries: int | None
    #: Seconds until a retry that names no time; ``default_retry_delay`` is its name in Celery.
    retry_delay: float
    default_retry_delay: float
    #: Exceptions after which the task is queued again by itself, as with ``retry``.
    autoretry_for: Sequence[type[BaseException]]
    #: Exceptions among those after which it is not.
    dont_autoretry_for: Sequence[type[BaseException]]
    #: What ``retry`` is called with then: ``max_retries``, ``countdown``, ``queue``...
    retry_kwargs: RetryOptions
    #: True, or whole seconds: the pause before the first automatic retry, doubled each time.
    retry_backoff: float
    #: The longest such pause, in seconds; 600 if it is not given.
    retry_backoff_max: float
    #: False takes the whole pause each time, instead of a random part of it.
    retry_jitter: bool
    #: How many runs may start in a time, for each worker: ``"10/s"``, ``"5/m"``, ``"2/h"``, or
    #: a number a second. None is without limit.
    rate_limit: str | float | None
    #: Exceptions that are no surprise: logged in one line, without a traceback. The task fails.
    throws: Sequence[type[BaseException]]
    #: True stores neither state nor result.
    ignore_result: bool
    #: The serializer of the arguments, for example ``"json"``.
    serializer: str
    #: The compression of the message, for example ``"gzip"``.
    compression: str | None
    #: 0 to 9; 9 is most urgent.
    priority: int
    #: Seconds (or timedelta) after which a call that has not started is dropped as REVOKED.
    expires: float | timedelta
    #: False acknowledges before the run instead of after it: at most once.
    acks_late: bool
    #: With late acknowledgement: False parks the message of a run that failed, or ran out of
    #: time, as a dead letter instead of acknowledging it.
    acks_on_failure_or_timeout: bool
    #: False makes a run whose process died a failure, instead of putting it back.
    reject_on_worker_lost: bool
    #: True stores a failure although the results of this task are ignored.
    store_errors_even_if_ignored: bool
    #: True stores the state STARTED when the run begins.
    track_started: bool
    #: Seconds until a run is ended with its process; TimeLimitExceeded. Not in threads,
    #: unless the task is ``async def``.
    time_limit: float | None
    #: Seconds until SoftTimeLimitExceeded is raised in the run.
    soft_time_limit: float | None
    #: True runs it inside a request context, with the before-request functions.
    request_context: bool


class CallOptions(TypedDict, total=False):
    """Options of ``apply_async``, for one call."""

    #: Seconds from now until it may start.
    countdown: float
    #: The aware datetime at which it may start.
    eta: datetime
    #: Seconds from now, or the aware datetime, after which it is no longer run.
    expires: float | timedelta | datetime
    #: An id of your own; the default is a random UUID.
    task_id: str
    queue: str
    priority: int
    #: Headers of your own; the task sees them in ``request.headers``.
    headers: Mapping[str, Any]
    serializer: str
    compression: str | None
    ignore_result: bool
    #: A name shown in logs instead of the task's.
    shadow: str
    #: Limits of this run, in seconds; see ``define_task``.
    time_limit: float | None
    soft_time_limit: float | None
    #: False gives up at the first failure to reach the broker.
    retry: bool
    #: ``max_retries``, ``interval_start``, ``interval_step``, ``interval_max`` (seconds).
    retry_policy: Mapping[str, float]
    #: Signatures to be sent with the result once the task has succeeded.
    link: Any
    #: Signatures to be called if the task fails.
    link_error: Any


#: Options of a signature that its place among others brings with it.
PLACE_OPTIONS = frozenset(
    {
        "chain", "chord", "group_id", "group_index", "root_id", "parent_id", "reply_to",
        "replaced_task_nesting", "retries", "stamped_headers", "time_limit", "soft_time_limit",
        "exchange", "routing_key", "add_to_parent",
    }
)  # fmt: skip


class RetryOptions(CallOptions, total=False):
    """Options of ``retry``: those of a call, and how often this run may be queued again."""

    max_retries: int | None


def check_task_options(options: Mapping[str, Any]) -> None:
    """Check the options of ``define_task``.

    :raises UnknownOptionError: for an option that does not exist.
    :raises InvalidOptionError: for a value that it cannot have.
    """
    _check(options, _TASK_CHECKS, "define_task")
    check_time_limits(options, "define_task")
    if "retry_delay" in options and "default_retry_delay" in options:
        raise InvalidOptionError(
            "define_task() got retry_delay and default_retry_delay: they are two names of one "
            "option. Keep retry_delay."
        )


def check_call_options(options: Mapping[str, Any]) -> None:
    """Check the options of ``apply_async``; raises as :func:`check_task_options` does."""
    _check(options, _CALL_CHECKS, "apply_async")


def check_time_limits(options: Mapping[str, Any], where: str) -> None:
    """Refuse a soft limit that is longer than the hard one.

    :raises InvalidOptionError: in that case.
    """
    hard, soft = options.get("time_limit"), options.get("soft_time_limit")
    if hard is not None and soft is not None and soft > hard:
        raise InvalidOptionError(
            f"{where}(soft_time_limit={soft!r}): must not be longer than time_limit={hard!r}, "
            "or it is never reached"
        )


def check_retry_options(options: Mapping[str, Any]) -> None:
    """Check the options of ``retry``; raises as :func:`check_task_options` does."""
    _check(options, _RETRY_CHECKS, "retry")


def check_signature_options(options: Mapping[str, Any], stamps: Collection[str] = ()) -> None:
    """Check the options of a signature; raises as :func:`check_task_options` does.

    :param stamps: further names that are allowed.
    """
    own = {
        name: value
        for name, value in options.items()
        if name not in PLACE_OPTIONS and name not in stamps
    }
    if own:
        check_call_options(own)


def _check(
    options: Mapping[str, Any], checks: Mapping[str, Callable[[Any], str | None]], where: str
) -> None:
    for name, value in options.items():
        check = checks.get(name)
        if check is None:
            raise UnknownOptionError(_unknown(name, checks, where))
        wanted = check(value)
        if wanted is not None:
            raise InvalidOptionError(f"{where}({name}={value!r}): {wanted}")


def _unknown(name: str, checks: Mapping[str, Any], where: str) -> str:
    close = difflib.get_close_matches(name, checks, n=1)
    if close:
        return f"{where}() has no option {name!r}. Did you mean {close[0]!r}?"
    return f"{where}() has no option {name!r}. There are: {', '.join(sorted(checks))}"


# -- one check a kind of value: None if it is fine, else what it must be ------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _is_text(value: Any) -> bool:
    # Printable: what every broker, database and log can hold.
    return isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable()


def _text(value: Any) -> str | None:
    return None if _is_text(value) else "must be a text of 1-255 printable characters"


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _queue(value: Any) -> str | None:
    if _is_text(value) and value == value.strip():
        return None
    return "must be a queue name of 1-255 printable characters, with no space at its ends"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be True or False"


def _time_limit(value: Any) -> str | None:
    if value is None or (_is_number(value) and 0 < value < float("inf")):
        return None
    return "must be a number of seconds more than 0, or None for no limit"


def _optional_count(value: Any) -> str | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return None
    return "must be a whole number of 0 or more, or None for no limit"


def _seconds(value: Any) -> str | None:
    if _is_number(value) and 0 <= value < float("inf"):
        return None
    return "must be a number of seconds, 0 or more"


_TOO_FAR = "is more than a year away. Workers take such a time for a mistake"


def _countdown(value: Any) -> str | None:
    return _seconds(value) or (_TOO_FAR if value > FARTHEST_ETA else None)


def _lifetime(value: Any) -> str | None:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    return None if _seconds(seconds) is None else "must be seconds or a timedelta, 0 or more"


def _priority(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 9:
        return None
    return "must be a whole number from 0 to 9 (9 is most urgent)"


def _moment(value: Any) -> str | None:
    if not isinstance(value, datetime):
        return "must be a datetime with a time zone; for seconds from now use countdown"
    if value.tzinfo is None:
        return (
            "has no time zone, so its meaning depends on the machine. "
            "Write datetime.now(timezone.utc) + timedelta(...) or give it a tzinfo"
        )
    return None


def _eta(value: Any) -> str | None:
    wrong = _moment(value)
    if wrong is None and value.timestamp() - clock.wall() > FARTHEST_ETA:
        return _TOO_FAR
    return wrong


def _expiry(value: Any) -> str | None:
    if isinstance(value, datetime):
        return _moment(value)
    if _lifetime(value) is None:
        return None
    return "must be seconds or a timedelta, 0 or more, or an aware datetime"


def _headers(value: Any) -> str | None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return "must be a mapping of texts to plain data"
    from .message import PROTOCOL_HEADERS  # it loads kombu, which importing us must not

    taken = sorted(PROTOCOL_HEADERS.intersection(value))
    return f"may not contain {', '.join(taken)}: the protocol uses them" if taken else None


def _signatures(value: Any) -> str | None:
    several = value if isinstance(value, (list, tuple)) else [value]
    if value is None or all(isinstance(item, Mapping) and "task" in item for item in several):
        return None
    return "must be a signature, as task.s() makes one, or a list of them"


_POLICY = frozenset({"max_retries", "interval_start", "interval_step", "interval_max"})


def _policy(value: Any) -> str | None:
    if isinstance(value, Mapping) and set(value) <= _POLICY:
        for name, number in value.items():
            endless = number is None and name == "max_retries"
            if not endless and not (_is_number(number) and number >= 0):
                return f"must have a number of 0 or more as {name}"
        return None
    return f"must be a mapping with some of {', '.join(sorted(_POLICY))}"


def _exceptions(value: Any) -> str | None:
    if isinstance(value, (tuple, list)) and all(
        isinstance(item, type) and issubclass(item, BaseException) for item in value
    ):
        return None
    return "must be a tuple of exception classes, for example (ConnectionError,)"


def _backoff(value: Any) -> str | None:
    if isinstance(value, bool) or _seconds(value) is None:
        return None
    return "must be True, False, or a number of seconds"


def _retry_kwargs(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return "must be a mapping, for example {'max_retries': 5}"
    try:
        _check(value, _RETRY_CHECKS, "retry")
    except (UnknownOptionError, InvalidOptionError) as exc:
        return str(exc)
    return None


_PER_SECOND = {"s": 1.0, "m": 1 / 60, "h": 1 / 3600}


def runs_per_second(rate: str | float | None) -> float | None:
    """What a ``rate_limit`` says; None if it sets no limit.

    :raises ValueError: if it says nothing.
    """
    if isinstance(rate, str):
        number, _, unit = rate.partition("/")
        if unit.strip() not in ("", *_PER_SECOND):
            raise ValueError(rate)
        value = float(number) * _PER_SECOND[unit.strip() or "s"]
    else:
        value = 0.0 if rate is None else float(rate)
    if not 0 <= value < float("inf"):
        raise ValueError(rate)
    return value or None


def _rate(value: Any) -> str | None:
    try:
        if not isinstance(value, bool):
            runs_per_second(value)
            return None
    except (TypeError, ValueError):
        pass
    return "must be a rate such as '10/s', '5/m' or '2/h', a number a second, or None"


_TASK_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "name": _text,
    "queue": _queue,
    "max_retries": _optional_count,
    "retry_delay": _seconds,
    "default_retry_delay": _seconds,
    "autoretry_for": _exceptions,
    "dont_autoretry_for": _exceptions,
    "retry_kwargs": _retry_kwargs,
    "retry_backoff": _backoff,
    "retry_backoff_max": _seconds,
    "retry_jitter": _flag,
    "rate_limit": _rate,
    "throws": _exceptions,
    "ignore_result": _flag,
    "serializer": _text,
    "compression": _optional_text,
    "priority": _priority,
    "expires": _lifetime,
    "acks_late": _flag,
    "acks_on_failure_or_timeout": _flag,
    "reject_on_worker_lost": _flag,
    "store_errors_even_if_ignored": _flag,
    "track_started": _flag,
    "time_limit": _time_limit,
    "soft_time_limit": _time_limit,
    "request_context": _flag,
}

_CALL_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "countdown": _countdown,
    "eta": _eta,
    "expires": _expiry,
    "task_id": _text,
    "queue": _queue,
    "priority": _priority,
    "headers": _headers,
    "serializer": _text,
    "compression": _optional_text,
    "ignore_result": _flag,
    "shadow": _text,
    "time_limit": _time_limit,
    "soft_time_limit": _time_limit,
    "retry": _flag,
    "retry_policy": _policy,
    "link": _signatures,
    "link_error": _signatures,
}

#: A retry keeps the id of its task.
_RETRY_CHECKS = {"max_retries": _optional_count} | {
    name: check for name, check in _CALL_CHECKS.items() if name != "task_id"
}
