"""What a field of a message from outside may be. Whatever it is not is refused with a reason."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, TypeVar

from . import clock
from .exceptions import InvalidMessageError
from .texts import safe_repr

#: Longest task id and task name that is accepted from outside, in characters.
NAME_LIMIT = 255
#: A due time further away than this is a mistake, not a plan; workers refuse it. In seconds.
FARTHEST_ETA = 366 * 86400.0


def readable_name(value: Any) -> str | None:
    """The value if it can be a name, else None."""
    # Printable: no NUL and no lone surrogate, which no database takes, and no line break.
    if isinstance(value, str) and 0 < len(value) <= NAME_LIMIT and value.isprintable():
        return value
    return None


def required_name(value: Any, name: str) -> str:
    """A name; raises InvalidMessageError, as all of these do."""
    text = readable_name(value)
    if text is None:
        raise InvalidMessageError(
            f"{name} is {safe_repr(value)[:80]}, not a text of 1-{NAME_LIMIT} printable characters"
        )
    return text


def optional_name(value: Any, name: str) -> str | None:
    """A name or None."""
    return None if value is None else required_name(value, name)


_T = TypeVar("_T")


def typed(value: Any, name: str, types: tuple[type, ...], default: _T) -> Any:
    """A value of one of some types; the default for None."""
    if value is None:
        return default
    if not isinstance(value, types) or isinstance(value, bool):
        wanted = " or ".join(t.__name__ for t in types)
        raise InvalidMessageError(f"{name} is {safe_repr(value)[:80]}, not a {wanted}")
    return value


def count(value: Any, name: str) -> int:
    """A whole number, 0 or more."""
    number: int = typed(value, name, (int,), 0)
    if number < 0:
        raise InvalidMessageError(f"{name} is {number}, less than 0")
    return number


def moment(value: Any, name: str) -> datetime | None:
    """An ISO 8601 text as an aware datetime; without a zone it means UTC."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidMessageError(f"{name} is {safe_repr(value)[:80]}, not an ISO 8601 text")
    try:
        moment = datetime.fromisoformat(value[:-1] + "+00:00" if value.endswith("Z") else value)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone.utc)
        ahead = moment.timestamp() - clock.wall()
    except (ValueError, OverflowError) as exc:
        raise InvalidMessageError(f"{name} is {value[:80]!r}, no ISO 8601 time ({exc})") from None
    if name == "eta" and ahead > FARTHEST_ETA:
        raise InvalidMessageError(f"eta {value!r} is more than a year away")
    return moment


def timelimit(value: Any) -> tuple[float | None, float | None]:
    """Hard and soft limit in seconds."""
    if value is None:
        return (None, None)
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise InvalidMessageError(f"timelimit is {safe_repr(value)[:80]}, not [hard, soft]")
    hard, soft = (typed(limit, "timelimit", (int, float), None) for limit in value)
    if not all(limit is None or 0 <= limit < float("inf") for limit in (hard, soft)):
        raise InvalidMessageError(f"timelimit is {safe_repr(value)[:80]}, no seconds of 0 or more")
    return (hard, soft)
