"""A task message and its form on the wire: Celery's message protocol 2.

This is the only module that knows header names. It writes protocol 2 and reads
protocols 2 and 1 (https://docs.celeryq.dev/en/stable/internals/protocol.html).
Whatever is read from outside passes :func:`parse`, which returns a task message or
the reason why it is none, and cannot raise.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from kombu import serialization

from . import clock
from .exceptions import EncodeError, InvalidMessageError
from .fields import count, moment, optional_name, readable_name, required_name, timelimit, typed
from .texts import safe_repr, storable, text_of

#: Longest ``expiration`` that RabbitMQ takes, in milliseconds. What expires later does so
#: in the worker alone.
LONGEST_EXPIRATION = 2**32 - 1
#: Most urgent priority that any broker knows.
PRIORITY_LIMIT = 255

_plain_json = json.JSONEncoder().encode
#: Marks a value in JSON that is no plain data, in kombu's codec.
_TAG = b"__type__"

#: Header names that have a meaning of their own; a sender's own headers have other names.
PROTOCOL_HEADERS = frozenset(
    {
        "lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries",
        "timelimit", "root_id", "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result",
        "replaced_task_nesting", "stamped_headers", "stamps", "compression",
    }
)  # fmt: skip
#: Properties that a copy of a message has as well.
_COPIED = ("correlation_id", "reply_to", "priority")
#: What brokers and workers note on a message underway. It ends with it: a retry is another one.
UNDERWAY_HEADERS = frozenset(
    {
        "x-taskworker-deliveries", "x-delivery-count", "x-acquired-count", "x-dead-letter-reason",
    }
)  # fmt: skip


class Received(Protocol):
    """What :func:`parse` needs of a received message (a kombu ``Message`` is one)."""

    headers: Any
    properties: Any
    body: Any
    content_type: Any
    content_encoding: Any


class Payload(NamedTuple):
    """The body of a message: what the task is called with, and what comes after it."""

    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = {}
    callbacks: Sequence[Any] | None = None
    errbacks: Sequence[Any] | None = None
    chain: Sequence[Any] | None = None
    chord: Any = None

    @property
    def leads_on(self) -> bool:
        """Whether anything comes after the task, however it ends."""
        return bool(self.callbacks or self.errbacks or self.chain or self.chord)


#: Stands for a payload that nobody has read in this process.
UNREAD = Payload()


class WireMessage(NamedTuple):
    """A message as a broker carries it."""

    body: bytes | str
    content_type: str
    content_encoding: str
    headers: dict[str, Any]
    properties: dict[str, Any]


@dataclass(frozen=True)
class TaskMessage:
    """One call of one task.

    ``eta`` and ``expires`` are aware datetimes, ``timelimit`` is hard and soft limit
    in seconds, ``headers`` are the sender's own. ``ignore_result`` None leaves it to the
    task as the worker knows it.
    """

    task: str
    id: str
    payload: Payload
    root_id: str | None = None
    parent_id: str | None = None
    group: str | None = None
    group_index: int | None = None
    eta: datetime | None = None
    expires: datetime | None = None
    retries: int = 0
    timelimit: tuple[float | None, float | None] = (None, None)
    shadow: str | None = None
    ignore_result: bool | None = False
    replaced_task_nesting: int = 0
    stamped_headers: Sequence[str] | None = None
    stamps: Mapping[str, Any] = field(default_factory=dict)
    argsrepr: str | None = None
    kwargsrepr: str | None = None
    origin: str | None = None
    reply_to: str | None = None
    correlation_id: str | None = None
    priority: int = 0
    headers: Mapping[str, Any] = field(default_factory=dict)

    def copy(self, **changes: Any) -> TaskMessage:
        """The same message with some fields changed."""
        return replace(self, **changes)

    def has_expired(self) -> bool:
        """Whether ``expires`` has passed."""
        return self.expires is not None and self.expires.timestamp() <= clock.wall()

    def seconds_until_due(self) -> float:
        """Seconds until ``eta``; 0 or less if it is due."""
        return 0.0 if self.eta is None else self.eta.timestamp() - clock.wall()


def encode(
    message: TaskMessage, serializer: str = "json", compression: str | None = None
) -> WireMessage:
    """Write a message as protocol 2.

    :param serializer: a serializer registered with kombu.
    :param compression: a compression method registered with kombu.
    :raises EncodeError: if an argument or a header cannot be serialized; the text names it.
    """
    if message.headers:
        _check_headers(message)
    payload = message.payload
    embed = {
        "callbacks": payload.callbacks,
        "errbacks": payload.errbacks,
        "chain": payload.chain,
        "chord": payload.chord,
    }
    content_type, encoding, body = _dumps(
        (payload.args, payload.kwargs, embed), message, serializer
    )
    headers: dict[str, Any] = {
        **message.headers,
        "lang": "py",
        "task": message.task,
        "id": message.id,
        "shadow": message.shadow,
        "eta": message.eta and message.eta.isoformat(),
        "expires": message.expires and message.expires.isoformat(),
        "group": message.group,
        "group_index": message.group_index,
        "retries": message.retries,
        "timelimit": list(message.timelimit),
        "root_id": message.root_id or message.id,
        "parent_id": message.parent_id,
        "argsrepr": message.argsrepr
        if message.argsrepr is not None
        else safe_repr(tuple(payload.args), len(body)),
        "kwargsrepr": message.kwargsrepr
        if message.kwargsrepr is not None
        else safe_repr(payload.kwargs, len(body)),
        "origin": message.origin or origin(),
        "ignore_result": message.ignore_result,
        "replaced_task_nesting": message.replaced_task_nesting,
        "stamped_headers": message.stamped_headers,
        "stamps": message.stamps,
    }
    if compression is not None:
        body, headers["compression"] = _compress(body, encoding, compression)
    properties: dict[str, Any] = {
        "correlation_id": message.correlation_id or message.id,
        "reply_to": message.reply_to,
        "priority": message.priority,
        "delivery_mode": 2,
    }
    if message.expires is not None:
        left = max(0, round((message.expires.timestamp() - clock.wall()) * 1000))
        if left <= LONGEST_EXPIRATION:
            properties["expiration"] = str(left)
    return WireMessage(body, content_type, encoding, headers, properties)


def _dumps(body: object, message: TaskMessage, serializer: str) -> tuple[str, str, bytes | str]:
    if serializer == "json":
        try:  # plain data, the usual case, without the cost of kombu's codec
            return "application/json", "utf-8", _plain_json(body)
        except (TypeError, ValueError, RecursionError):
            pass
    try:
        content_type, encoding, data = serialization.dumps(body, serializer)
    except serialization.SerializerNotInstalled:
        raise EncodeError(
            f"task {message.task!r} cannot be sent: no serializer {serializer!r} is registered; "
            f"use one of {', '.join(sorted(serialization.registry._encoders))}"
        ) from None
    except Exception as exc:
        raise EncodeError(_name_the_culprit(message, serializer, exc)) from exc
    return content_type, encoding, data


def _name_the_culprit(message: TaskMessage, serializer: str, exc: Exception) -> str:
    """Find the argument that the serializer refused."""
    named: list[tuple[str, Any]] = [
        (f"argument {i}", a) for i, a in enumerate(message.payload.args, 1)
    ]
    named += [(f"argument {key!r}", value) for key, value in message.payload.kwargs.items()]
    for name, value in named:
        try:
            serialization.dumps(value, serializer)
        except Exception as cause:
            return (
                f"{name} of task {message.task!r} cannot be serialized as {serializer}: "
                f"{safe_repr(value)} is a {type(value).__name__} ({text_of(cause)}). "
                "Pass plain data, for example an id that the task looks up."
            )
    return f"task {message.task!r} cannot be serialized as {serializer}: {text_of(exc)}"


def _check_headers(message: TaskMessage) -> None:
    """Headers become JSON in most transports, and tables of the same types in AMQP."""
    for name, value in message.headers.items():
        try:
            serialization.dumps(value, "json")
        except Exception as exc:
            raise EncodeError(
                f"header {name!r} of task {message.task!r} cannot be sent: {safe_repr(value)} "
                f"is a {type(value).__name__} ({text_of(exc)}). Pass plain data."
            ) from exc


def _compress(body: bytes | str, encoding: str, compression: str) -> tuple[bytes, str]:
    from kombu.compression import compress, encoders, get_encoder

    try:
        get_encoder(compression)
    except KeyError:
        known = ", ".join(name.removeprefix("application/x-") for name in sorted(encoders()))
        raise EncodeError(
            f"there is no compression {compression!r}; use gzip or one of {known}"
        ) from None
    data = (
        body
        if isinstance(body, bytes)
        else body.encode("utf-8" if encoding == "binary" else encoding)
    )
    compressed, content_type = compress(data, compression)
    return compressed, content_type


_origins: dict[int, str] = {}


def origin() -> str:
    """Who sends: ``gen<pid>@<host>``, as Celery writes it."""
    pid = os.getpid()
    if pid not in _origins:
        _origins.clear()  # a forked child has its own
        _origins[pid] = f"gen{pid}@{socket.gethostname()}"
    return _origins[pid]


def copy_of(received: Received, more_headers: Mapping[str, Any]) -> WireMessage:
    """A received message to be sent again, without what was noted on it underway.

    :param more_headers: headers to add to its own.
    """
    headers = dict(received.headers) if isinstance(received.headers, Mapping) else {}
    # kombu unpacked the body; a header that says it is packed would be wrong now
    for name in ("compression", *UNDERWAY_HEADERS):
        headers.pop(name, None)
    known = received.properties if isinstance(received.properties, Mapping) else {}
    properties = {name: known[name] for name in _COPIED if known.get(name) is not None}
    body, content_type, encoding = received.body, received.content_type, received.content_encoding
    return WireMessage(
        body if isinstance(body, (bytes, str)) else repr(body),
        content_type if isinstance(content_type, str) else "application/data",
        encoding if isinstance(encoding, str) else "binary",
        headers | dict(more_headers),
        {**properties, "delivery_mode": 2},
    )


# -- reading ------------------------------------------------------------------------------


class Unreadable(NamedTuple):
    """A message that is no task message: why, and whose result should say so."""

    reason: str
    task_id: str | None = None
    task: str | None = None


def parse(
    received: Received, accept: Collection[str], *, body: bool = True
) -> TaskMessage | Unreadable:
    """Read what came from a broker. Never raises.

    :param accept: the serializers, or content types, that may be decoded.
    :param body: False leaves the body to another process; the payload is :data:`UNREAD`. A
        message of protocol 1 is all body, and read in any case.
    """
    # Where the id and the task's name are: in the headers, or in a body of protocol 1.
    names: Mapping[str, Any] = received.headers if isinstance(received.headers, Mapping) else {}
    try:
        _refuse_packed(received)
        properties = received.properties if isinstance(received.properties, Mapping) else {}
        if not body and "task" in names:
            _refuse_foreign(received.content_type, accept)
            return _parse_2(names, properties, ((), {}, None)).copy(payload=UNREAD)
        content = _loads(received, accept)
        if "task" in names:
            return _parse_2(names, properties, content)
        if isinstance(content, Mapping) and "task" in content:
            names = content
            return _parse_1(content, properties)
        reason = "not a task message: no header 'task', and no 'task' in the body"
    except InvalidMessageError as exc:
        reason = str(exc)
    except Exception as exc:  # a hostile body can raise anything, RecursionError included
        reason = f"the message cannot be read: {type(exc).__name__}: {text_of(exc)}"
    return Unreadable(
        storable(reason[:2000]), readable_name(names.get("id")), readable_name(names.get("task"))
    )


def _refuse_packed(received: Received) -> None:
    errors = getattr(received, "errors", None)
    if errors:  # kombu could not decompress it
        raise InvalidMessageError(f"the message cannot be unpacked: {text_of(errors[0][1])}")


@lru_cache(maxsize=64)
def _content_types(accept: frozenset[str]) -> frozenset[str]:
    """The content types behind a set of serializer names."""
    return frozenset(serialization.prepare_accept_content(accept))


def _refuse_foreign(content_type: Any, accept: Collection[str]) -> frozenset[str]:
    """Refuse a content type that may not be decoded; return those that may."""
    if not isinstance(content_type, str):
        raise InvalidMessageError(f"content type {content_type!r} is no text")
    allowed = _content_types(frozenset(accept))
    if content_type not in allowed:
        raise InvalidMessageError(
            f"content type {content_type!r} is refused; TASKER_ACCEPT_CONTENT allows "
            f"{', '.join(sorted(accept))}"
        )
    return allowed


def _loads(received: Received, accept: Collection[str]) -> Any:
    content_type = received.content_type
    allowed = _refuse_foreign(content_type, accept)
    try:
        body = received.body
        plain = content_type == "application/json" and received.content_encoding == "utf-8"
        if plain and isinstance(body, bytes) and _TAG not in body:
            return json.loads(body)  # plain data: kombu's codec would find no more in it
        return serialization.loads(
            body, content_type, received.content_encoding or "utf-8", accept=allowed
        )
    except Exception as exc:
        raise InvalidMessageError(f"the body is no valid {content_type}: {text_of(exc)}") from exc


def _parse_2(headers: Mapping[str, Any], properties: Mapping[str, Any], body: Any) -> TaskMessage:
    if not isinstance(body, (list, tuple)) or len(body) != 3:
        raise InvalidMessageError("the body is not [args, kwargs, embed]")
    args, kwargs, embed = body
    embed = typed(embed, "embed", (dict,), {})
    return TaskMessage(
        task=required_name(headers.get("task"), "task"),
        id=required_name(headers.get("id"), "id"),
        payload=_payload(args, kwargs, embed),
        root_id=optional_name(headers.get("root_id"), "root_id"),
        parent_id=optional_name(headers.get("parent_id"), "parent_id"),
        group=optional_name(headers.get("group"), "group"),
        group_index=typed(headers.get("group_index"), "group_index", (int,), None),
        eta=moment(headers.get("eta"), "eta"),
        expires=moment(headers.get("expires"), "expires"),
        retries=count(headers.get("retries"), "retries"),
        timelimit=timelimit(headers.get("timelimit")),
        shadow=typed(headers.get("shadow"), "shadow", (str,), None),
        ignore_result=None
        if headers.get("ignore_result", False) is None
        else bool(headers.get("ignore_result")),
        replaced_task_nesting=count(headers.get("replaced_task_nesting"), "replaced_task_nesting"),
        stamped_headers=typed(
            headers.get("stamped_headers"), "stamped_headers", (list, tuple), None
        ),
        stamps=typed(headers.get("stamps"), "stamps", (dict,), {}),
        argsrepr=typed(headers.get("argsrepr"), "argsrepr", (str,), None),
        kwargsrepr=typed(headers.get("kwargsrepr"), "kwargsrepr", (str,), None),
        origin=typed(headers.get("origin"), "origin", (str,), None),
        headers={
            k: v
            for k, v in headers.items()
            if k not in PROTOCOL_HEADERS and k not in UNDERWAY_HEADERS
        },
        **_from_properties(properties),
    )


def _parse_1(body: Mapping[str, Any], properties: Mapping[str, Any]) -> TaskMessage:
    task_id = required_name(body.get("id"), "id")
    return TaskMessage(
        task=required_name(body.get("task"), "task"),
        id=task_id,
        payload=_payload(body.get("args"), body.get("kwargs"), body),
        root_id=task_id,
        group=optional_name(body.get("taskset") or body.get("group"), "taskset"),
        group_index=typed(body.get("group_index"), "group_index", (int,), None),
        eta=moment(body.get("eta"), "eta"),
        expires=moment(body.get("expires"), "expires"),
        retries=count(body.get("retries"), "retries"),
        timelimit=timelimit(body.get("timelimit")),
        **_from_properties(properties),
    )


def _payload(args: Any, kwargs: Any, embed: Mapping[str, Any]) -> Payload:
    args = typed(args, "args", (list, tuple), ())
    kwargs = typed(kwargs, "kwargs", (dict,), {})
    for key in kwargs:
        if not isinstance(key, str):
            raise InvalidMessageError(f"a keyword argument is named {key!r}, not by a text")
    chord = embed.get("chord")
    if chord is not None:
        _check_signature(chord, "chord")
    return Payload(
        args,
        kwargs,
        callbacks=_signatures(embed.get("callbacks"), "callbacks"),
        errbacks=_signatures(embed.get("errbacks"), "errbacks"),
        chain=_signatures(embed.get("chain"), "chain"),
        chord=chord,
    )


def _signatures(value: Any, name: str) -> Sequence[Any] | None:
    signatures: Sequence[Any] | None = typed(value, name, (list, tuple), None)
    for signature in signatures or ():
        _check_signature(signature, name)
    return signatures


def _check_signature(value: Any, name: str) -> None:
    """A call to be sent later; what nobody reads yet may be as it likes."""
    if not isinstance(value, dict) or readable_name(value.get("task")) is None:
        raise InvalidMessageError(f"{name} holds {safe_repr(value)[:80]}, not a signature")


def _from_properties(properties: Mapping[str, Any]) -> dict[str, Any]:
    priority = properties.get("priority")
    return {
        "reply_to": optional_name(properties.get("reply_to"), "reply_to"),
        "correlation_id": optional_name(properties.get("correlation_id"), "correlation_id"),
        "priority": min(max(int(priority), 0), PRIORITY_LIMIT) if isinstance(priority, int) else 0,
    }
