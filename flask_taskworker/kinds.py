"""What a setting is, and the kinds of values: each turns what was written into what is used.

Values from environment variables come as texts, those from a Flask config as anything.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import Any

from .urls import NotInstalled, Refused, did_you_mean, driver_name, engine_name, installed


@dataclass(frozen=True)
class Kind:
    """A type of setting.

    :param name: as the reference calls it.
    :param wants: completes "must be ...".
    :param parse: returns the value, or raises :class:`Refused`; an empty refusal means
        what ``wants`` says.
    """

    name: str
    wants: str
    parse: Callable[[Any], Any]


#: Longer waits overflow the operating system's timers.
_LONGEST = 10**9
_LARGEST = 2**53
_TRUE, _FALSE = {"true", "yes", "on", "1", "y", "t"}, {"false", "no", "off", "0", "n", "f"}
_NOTHING = {"", "none", "null"}


def nothing(value: Any) -> bool:
    """Whether it says 'no value', as a variable of the environment would."""
    return value is None or (isinstance(value, str) and value.strip().lower() in _NOTHING)


def _number(value: Any) -> float:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise Refused from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refused
    if not abs(value) <= _LARGEST:  # nan is not, either
        raise Refused
    return value


def _seconds(value: Any) -> float:
    seconds = _number(value)
    if not 0 < seconds <= _LONGEST:
        raise Refused
    return float(seconds)


def _seconds_or_zero(value: Any) -> float:
    return 0.0 if _number(value) == 0 else _seconds(value)


def _seconds_or_never(value: Any) -> float | None:
    return None if nothing(value) else _seconds_or_zero(value) or None


def _count_or_zero(value: Any) -> int:
    number = _number(value)
    if isinstance(value, timedelta) or number != int(number) or number < 0:
        raise Refused
    return int(number)


def _count(value: Any) -> int:
    count = _count_or_zero(value)
    if not count:
        raise Refused
    return count


def _count_or_unlimited(value: Any) -> int | None:
    return None if nothing(value) else _count_or_zero(value)


def _rate(value: Any) -> str | float | None:
    if nothing(value):
        return None
    from .options import runs_per_second

    try:
        if isinstance(value, bool):
            raise Refused
        runs_per_second(value)
    except (TypeError, ValueError):
        raise Refused from None
    return str(value) if isinstance(value, str) else float(value)


def _flag(value: Any) -> bool:
    text = str(value).strip().lower()
    if not isinstance(value, (bool, int, str)) or text not in _TRUE | _FALSE:
        raise Refused
    return text in _TRUE


def _text(value: Any) -> str:
    # A database URL may be a SQLAlchemy object, whose own str() hides the password.
    if hasattr(value, "render_as_string"):
        value = value.render_as_string(hide_password=False)
    if not isinstance(value, str) or not value.strip():
        raise Refused
    return value.strip()


def _urls(value: Any) -> str:
    return ";".join(map(_text, value)) if isinstance(value, (list, tuple)) else _text(value)


def _backend(value: Any) -> str:
    return "disabled" if value is False else _text(value)


def _queue(value: Any) -> str:
    text = _text(value)
    if not re.fullmatch(r"[^\x00-\x1f\x7f]{1,255}", text):
        raise Refused
    return text


#: What kombu can write and read, and the module and package that this needs.
_SERIALIZERS = {
    "json": ("", ""),
    "msgpack": ("msgpack", "msgpack"),
    "yaml": ("yaml", "PyYAML"),
    "pickle": ("", ""),
}
_CONTENT_TYPES = {
    "application/json": "json",
    "application/x-msgpack": "msgpack",
    "application/x-yaml": "yaml",
    "application/x-python-serialize": "pickle",
}


def _serializer(value: Any) -> str:
    text = _text(value)
    name = _CONTENT_TYPES.get(text.lower(), text.lower())
    if name not in _SERIALIZERS:
        return _registered(text)
    module, package = _SERIALIZERS[name]
    if module and not installed(module):
        raise NotInstalled(f"the package {package} is not installed: pip install {package}")
    return name


def _registered(name: str) -> str:
    if not re.fullmatch(r"[\w.+/-]{1,100}", name):
        raise Refused
    # Who registers a serializer has loaded kombu. Where it is not loaded there is no telling.
    kombu = sys.modules.get("kombu.serialization")
    if kombu is None or name in kombu.registry.name_to_type:
        return name
    raise Refused(
        f"kombu knows no serializer {name!r}: use one of {', '.join(_SERIALIZERS)}, or register "
        f"yours before the app is initialised.{did_you_mean(name.lower(), _SERIALIZERS)}"
    )


def _serializers(value: Any) -> frozenset[str]:
    if isinstance(value, str):
        value = [part for part in re.split(r"[\s,]+", value) if part]
    if not isinstance(value, (list, tuple, set, frozenset)) or not value:
        raise Refused
    return frozenset(map(_serializer, value))


def _one_of(*known: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        name = _text(value).lower()
        if name not in known:
            raise Refused
        return name

    return parse


_COMPRESSIONS = ("gzip", "zlib", "bzip2", "bzip", "lzma", "xz", "brotli", "zstd")


def _compression(value: Any) -> str | None:
    return None if nothing(value) else _one_of(*_COMPRESSIONS)(value)


def _options(value: Any) -> Mapping[str, object]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Refused from None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise Refused
    return MappingProxyType(dict(value))


def _timezone(value: Any) -> str:
    name = _text(value)
    if name.upper() == "UTC":
        return "UTC"
    import zoneinfo  # it costs more than all the rest, and few need it

    try:
        zoneinfo.ZoneInfo(name)
    except (OSError, ValueError, LookupError):
        if not zoneinfo.available_timezones():
            raise NotInstalled("no time zone database is installed: pip install tzdata") from None
        raise Refused from None
    return name


#: The names of Celery's pools that mean one of ours, and our own.
POOLS = {"threads": "threads", "processes": "processes", "prefork": "processes", "solo": "solo"}


def _pool(value: Any) -> str:
    name = _text(value).lower()
    if name not in POOLS:
        raise Refused
    return POOLS[name]


def _count_or_never(value: Any) -> int | None:
    return None if nothing(value) else _count_or_zero(value) or None


SECONDS = Kind("seconds", "a number of seconds greater than 0", _seconds)
SECONDS_OR_ZERO = Kind("seconds", "a number of seconds, 0 or more", _seconds_or_zero)
SECONDS_OR_NEVER = Kind(
    "seconds or None", "a number of seconds, or None for ever", _seconds_or_never
)
SECONDS_OR_NO_LIMIT = Kind(
    "seconds or None", "a number of seconds, or None for no limit", _seconds_or_never
)
COUNT_OR_NEVER = Kind("number or None", "a whole number, or None for never", _count_or_never)
POOL = Kind("name", f"one of {', '.join(POOLS)}", _pool)
TARGET = Kind("text", "a text such as 'module:app'", _text)
COUNT = Kind("number", "a whole number, 1 or more", _count)
COUNT_OR_UNLIMITED = Kind(
    "number or None", "a whole number, or None for no limit", _count_or_unlimited
)
RATE = Kind("rate or None", "a rate such as '10/s', '5/m' or '2/h', or None", _rate)
FLAG = Kind("true or false", "True or False", _flag)
ENGINE = Kind("name", "the name of an engine", lambda value: engine_name(_text(value)))
DRIVER = Kind("name", "the name of a database driver", lambda value: driver_name(_text(value)))
URL = Kind("URL", "the text of a URL", _text)
URLS = Kind("URL", "the text of a URL", _urls)
BACKEND = Kind("URL", "the text of a URL, or 'disabled'", _backend)
DURABILITY = Kind("'full' or 'normal'", "'full' or 'normal'", _one_of("full", "normal"))
QUEUE = Kind("text", "the name of a queue, 1-255 printable characters", _queue)
SERIALIZER = Kind("name", "the name of a serializer", _serializer)
SERIALIZERS = Kind("list of names", "a list of serializers", _serializers)
COMPRESSION = Kind("name or None", f"None or one of {', '.join(_COMPRESSIONS)}", _compression)
OPTIONS = Kind("mapping", "a mapping of options by name", _options)
TIMEZONE = Kind("name", "the name of a time zone", _timezone)


# -- settings -----------------------------------------------------------------------------


class Written(str):
    """A name that ``write_defaults`` wrote. The user did not choose it: when the config
    is read again it contradicts nothing."""

    __slots__ = ()


@dataclass(frozen=True)
class Setting:
    """What there is to know about one setting.

    :param default: as it is written to ``app.config``.
    :param derived: where the default comes from, if not from ``default``.
    :param celery: the names that Celery has for it.
    :param former: keys under which it is read too, if its own is absent.
    """

    key: str
    kind: Kind
    default: object
    doc: str
    unit: str = ""
    derived: str = ""
    celery: tuple[str, ...] = ()
    former: tuple[str, ...] = ()
    example: object = None

    @property
    def field(self) -> str:
        """The attribute of :class:`Config`."""
        return self.key.removeprefix("TASKER_").lower()

    @property
    def value(self) -> Any:
        """The default as :class:`Config` holds it."""
        return None if self.default is None else self.kind.parse(self.default)

    def find(self, mapping: Mapping[str, object]) -> str | None:
        """The key under which the user set it, or None."""
        for key in (self.key, *self.former):
            if key not in mapping or isinstance(mapping[key], Written):
                continue
            # An empty address is an unset environment variable, not an address.
            if not (self.derived and nothing(mapping[key])):
                return key
        return None

    def read(self, value: object) -> Any:
        """The value to use; :class:`Refused` says what to write instead."""
        try:
            return self.kind.parse(value)
        except Refused as refusal:
            if refusal.args:
                raise
        example = self.default if self.example is None else self.example
        raise Refused(f"must be {self.kind.wants}, for example {example!r}")
