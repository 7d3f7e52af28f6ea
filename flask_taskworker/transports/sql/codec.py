"""kombu's message mapping and the row it is stored in."""

from __future__ import annotations

import json
import math
from typing import Any

from kombu.utils import json as kombu_json

from ...exceptions import InvalidOptionError, MessageTooLargeError
from .dialects.base import Encoded, Row
from .errors import QueueNameError
from .schema import DELAYED, NAME_LENGTH, READY

_MAX_PRIORITY = 9
_plain_json = json.JSONEncoder(separators=(",", ":")).encode


def encode(
    message: dict[str, Any], exchange: str, routing_key: str, now: float, limit: int
) -> Encoded:
    """The row of a message.

    :param message: as made by ``channel.prepare_message``. The property ``eta_at`` (epoch
        seconds) delays it; ``priority`` 0-9 orders it, 9 first.
    :param now: epoch seconds.
    :param limit: bytes that body and envelope may have together.
    :raises MessageTooLargeError: above the limit.
    :raises InvalidOptionError: if ``eta_at`` is no time.
    """
    properties = message["properties"]
    body = message["body"]
    if isinstance(body, str):
        body = body.encode("utf-8", "surrogatepass")
    elif not isinstance(body, bytes):
        body = bytes(body)
    due = None
    if "eta_at" in properties:
        due = _due(properties["eta_at"], now)
    kept = properties.copy()
    kept.pop("delivery_info", None)  # made anew at each delivery
    envelope = {
        "content_type": message["content-type"],
        "content_encoding": message["content-encoding"],
        "exchange": exchange,
        "routing_key": routing_key,
        "headers": message["headers"],
        "properties": kept,
    }
    try:
        meta = _plain_json(envelope)
    except TypeError:  # dates, bytes and the like, which kombu can write and read
        meta = kombu_json.dumps(envelope)
    size = len(body) + len(meta)
    if size > limit:
        raise MessageTooLargeError(
            f"a message of {size} bytes for {routing_key!r} is larger than max_message_bytes="
            f"{limit}. Store the data elsewhere and send a reference, or raise the limit."
        )
    owner = READY if due is None else DELAYED
    return Encoded(_MAX_PRIORITY - priority_of(properties), owner, due, meta, body)


def decode(row: Row, tag: int) -> dict[str, Any]:
    """The mapping of which kombu makes its message object.

    :param row: a claimed row.
    :param tag: the delivery tag.
    :raises ValueError: if the row holds no message.
    """
    envelope = json.loads(row.meta)
    if not isinstance(envelope, dict):
        raise ValueError("the envelope is no JSON object")
    if '"__type__"' in row.meta:
        envelope = kombu_json.loads(row.meta)
    properties = envelope.get("properties")
    headers = envelope.get("headers")
    if not isinstance(properties, dict) or not isinstance(headers, dict):
        raise ValueError("the envelope has no properties or no headers")
    if not isinstance(row.body, (bytes, bytearray, memoryview)):
        raise ValueError("the body is no sequence of bytes")
    properties["delivery_tag"] = tag
    properties["delivery_count"] = row.attempts
    properties["delivery_info"] = {
        "exchange": envelope.get("exchange", ""),
        "routing_key": envelope.get("routing_key", ""),
        "redelivered": row.attempts > 1,
        "priority": _MAX_PRIORITY - row.prio,
    }
    return {
        "body": bytes(row.body),
        "content-type": envelope.get("content_type"),
        "content-encoding": envelope.get("content_encoding"),
        "headers": headers,
        "properties": properties,
    }


def priority_of(properties: dict[str, Any]) -> int:
    """The priority, brought into 0-9; 0 if it is none."""
    given = properties.get("priority")
    if not given:
        return 0
    try:
        return max(0, min(_MAX_PRIORITY, int(given)))
    except (TypeError, ValueError, OverflowError):
        return 0


def checked_name(name: Any, what: str) -> str:
    """A queue, exchange or routing key that every database keeps unchanged.

    :raises QueueNameError: if it is not.
    """
    if not isinstance(name, str) or len(name) > NAME_LENGTH:
        raise QueueNameError(
            f"{what} {name!r:.80} must be text of at most {NAME_LENGTH} characters"
        )
    if "\0" in name or name != name.strip():
        raise QueueNameError(
            f"{what} {name!r:.80} must not hold NUL, nor begin or end with a space"
        )
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise QueueNameError(f"{what} {name!r:.80} is no valid Unicode") from None
    return name


def _due(value: Any, now: float) -> float | None:
    try:
        due = float(value)
    except (TypeError, ValueError, OverflowError):
        due = math.nan
    if not math.isfinite(due):
        raise InvalidOptionError(f"eta_at={value!r:.80}: write seconds since the epoch")
    return due if due > now else None
