"""How results and exceptions are written, so that Celery reads them and the other way round.

An exception is ``{"exc_type", "exc_message", "exc_module"}``. The reader looks the
class up among the modules that are imported already: reading a result never imports
code, and never calls anything but an exception class.
"""

from __future__ import annotations

import sys
import traceback as tracebacks
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from kombu import serialization

from .. import exceptions
from ..exceptions import EncodeError, TaskFailedError
from ..texts import storable, text_of

#: Longest traceback that is stored, in characters. The middle of a longer one is cut.
TRACEBACK_LIMIT = 64 * 1024
#: Longest text of one exception argument, in characters.
ARGUMENT_LIMIT = 8 * 1024


def dumps(value: object, serializer: str) -> bytes:
    """Serialize a value for the store.

    :raises EncodeError: if it cannot be serialized.
    """
    try:
        _, encoding, data = serialization.dumps(value, serializer)
    except Exception as exc:
        raise EncodeError(
            f"the result cannot be serialized as {serializer}: {_short_repr(value, 200)} "
            f"({type(exc).__name__}: {text_of(exc)})"
        ) from exc
    if isinstance(data, bytes):
        return data
    text: str = data
    return text.encode("utf-8" if encoding == "binary" else encoding)


def loads(data: bytes | str, serializer: str) -> Any:
    """Read what :func:`dumps` wrote. Only ``serializer`` is accepted, never pickle by chance."""
    content_type, encoding, _ = serialization.registry._encoders[serializer]
    return serialization.loads(data, content_type, encoding, accept={content_type})


def encode_exception(exc: BaseException, serializer: str = "json") -> dict[str, Any]:
    """Write an exception as plain data. Never raises."""
    kind = type(exc)
    module, name = getattr(kind, "__module__", None) or "builtins", kind.__qualname__
    if isinstance(exc, exceptions.TaskWorkerError) and exc.wire_name:
        module, name = exc.wire_module, exc.wire_name
    return {
        "exc_type": name,
        "exc_message": [_plain(argument, serializer) for argument in _arguments(exc)],
        "exc_module": module,
    }


def _arguments(exc: BaseException) -> tuple[Any, ...]:
    try:
        return tuple(exc.args)
    except Exception:
        return (_short_repr(exc, ARGUMENT_LIMIT),)


def _plain(argument: Any, serializer: str) -> Any:
    try:
        data = dumps(argument, serializer)
        if len(data) <= ARGUMENT_LIMIT:
            return argument
    except Exception:
        pass  # not plain data: its text must do
    return _short_repr(argument, ARGUMENT_LIMIT)


def _short_repr(value: object, limit: int) -> str:
    try:
        text = repr(value)
    except Exception:
        text = f"<unrepresentable {type(value).__name__}>"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def format_traceback(exc: BaseException) -> str:
    """The traceback of an exception as text, cut to :data:`TRACEBACK_LIMIT`. Never raises."""
    try:
        text = "".join(tracebacks.format_exception(type(exc), exc, exc.__traceback__))
    except Exception:  # __str__ of the exception, or of its cause, raised
        text = "".join(tracebacks.format_tb(exc.__traceback__)) + f"{type(exc).__name__}\n"
    text = storable(text)
    if len(text) <= TRACEBACK_LIMIT:
        return text
    half = TRACEBACK_LIMIT // 2
    return f"{text[:half]}\n  ... {len(text) - TRACEBACK_LIMIT} characters cut ...\n{text[-half:]}"


def decode_exception(stored: Any, traceback: str | None) -> BaseException:
    """Rebuild a stored exception, with the worker's traceback in its notes.

    :return: an instance of the original class where this process knows it, else a
        :class:`~flask_taskworker.exceptions.TaskFailedError`.
    """
    if isinstance(stored, BaseException):  # a serializer that keeps objects
        exc: BaseException = stored
    elif isinstance(stored, Mapping) and "exc_type" in stored:
        exc = _rebuild(stored)
    else:
        exc = TaskFailedError("Exception", stored)
    if traceback:
        _attach(exc, traceback)
    return exc


def _rebuild(stored: Mapping[str, Any]) -> BaseException:
    name, module = str(stored["exc_type"]), str(stored.get("exc_module") or "builtins")
    message = stored.get("exc_message")
    args = (
        tuple(message)
        if isinstance(message, (list, tuple))
        else ()
        if message is None
        else (message,)
    )
    kind = _known_class(module, name)
    if kind is not None:
        try:
            built: object = kind(*args)
            if isinstance(built, Exception):
                return built
        except Exception:
            pass  # its constructor wants something else
    return TaskFailedError(name, args, module)


def _known_class(module: str, name: str) -> type[Exception] | None:
    kind: Any = _OURS.get((module, name)) or sys.modules.get(module)
    if not isinstance(kind, type):
        for part in name.split("."):
            # vars, not getattr: a module may import something when it is asked for a name
            kind = vars(kind).get(part) if isinstance(kind, (ModuleType, type)) else None
    # Exception, not BaseException: a stored SystemExit must not end the reading process.
    return kind if isinstance(kind, type) and issubclass(kind, Exception) else None


def _attach(exc: BaseException, traceback: str) -> None:
    text = f"Traceback of the worker:\n{traceback.rstrip()}"
    try:
        if sys.version_info >= (3, 11):
            exc.add_note(text)
        elif exc.__cause__ is None:
            exc.__cause__ = RemoteTraceback(text)
    except Exception:
        pass  # a class with slots; the traceback is on the handle as well


class RemoteTraceback(Exception):
    """Carries the worker's traceback where exceptions have no notes (Python 3.10)."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


#: Our own classes by the names they have on the wire.
_OURS: dict[tuple[str, str | None], type[BaseException]] = {
    (kind.wire_module, kind.wire_name): kind
    for kind in vars(exceptions).values()
    if isinstance(kind, type)
    and issubclass(kind, exceptions.TaskWorkerError)
    and kind.__dict__.get("wire_name")
}
