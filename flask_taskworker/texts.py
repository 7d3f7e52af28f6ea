"""Texts about values that may misbehave when they are asked for one."""

from __future__ import annotations

import reprlib

#: Longest ``argsrepr`` and ``kwargsrepr``, in characters (Celery's own limit).
REPR_LIMIT = 1024

_short = reprlib.Repr()
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 20
_short.maxstring = _short.maxother = 200


def safe_repr(value: object, size_hint: int = 0) -> str:
    """``repr`` that cannot raise and stays short.

    :param size_hint: roughly how large the value is; a large one is abbreviated while
        it is walked, not afterwards.
    """
    try:
        text = repr(value) if size_hint <= 4 * REPR_LIMIT else _short.repr(value)
    except Exception as exc:
        text = f"<unrepresentable {type(value).__name__}: {type(exc).__name__}>"
    return text if len(text) <= REPR_LIMIT else text[: REPR_LIMIT - 3] + "..."


def text_of(exc: BaseException) -> str:
    """What an exception says. Never raises, as ``str`` may."""
    try:
        return str(exc) or type(exc).__name__
    except Exception:
        return type(exc).__name__


def storable(text: str) -> str:
    """The text without what a database or a log cannot hold: lone surrogates and NUL."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")
