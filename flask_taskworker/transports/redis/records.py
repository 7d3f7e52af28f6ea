"""Messages as text, and their records in kombu's ``unacked`` hash.

A record is ``[message, exchange, routing key]`` in JSON. Ours name the anonymous exchange and the
queue itself: whoever puts the message back then puts it where it came from.
"""

from __future__ import annotations

import base64
import json
from functools import lru_cache
from typing import Any

from kombu.utils import json as kombu_json

_plain = json.JSONEncoder().encode
#: Marks a value that is no plain data, in kombu's codec.
_TAG = b'"__type__"'


@lru_cache(maxsize=4096)
def suffix(queue: str) -> str:
    """What follows a message in its record."""
    return f',"",{json.dumps(queue)}]'


def read_record(record: bytes) -> tuple[bytes, str]:
    """The text of a message and its queue, out of a record of ours.

    The text may be no JSON at all, so the end is looked for.
    """
    at = record.rindex(b',"","')
    return record[1:at], json.loads(record[at + 4 : -1])


def dumps(payload: Any) -> str:
    """A message as kombu writes it."""
    try:  # plain data, the usual case, without the cost of kombu's codec
        return _plain(payload)
    except (TypeError, ValueError):
        return str(kombu_json.dumps(payload))


def loads(text: bytes) -> dict[str, Any]:
    """A message out of its text.

    :raises ValueError: if it is none that kombu could have written.
    """
    try:
        payload = kombu_json.loads(text) if _TAG in text else json.loads(text)
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc
    if not isinstance(payload, dict) or not isinstance(payload.get("properties"), dict):
        raise ValueError("it is no envelope with properties")
    return payload


def delivery_count(payload: dict[str, Any]) -> int:
    """How often a message was delivered."""
    count = payload["properties"].get("delivery_count")
    return count if isinstance(count, int) and count > 0 else 0


def redelivered(payload: dict[str, Any], count: int) -> dict[str, Any]:
    """Mark a message that goes back after ``count`` deliveries."""
    properties = payload["properties"]
    properties["delivery_count"] = count
    info = properties.get("delivery_info")
    if isinstance(info, dict):
        info["redelivered"] = True
    return payload


def dead_letter(text: bytes | dict[str, Any], reason: str) -> dict[str, Any]:
    """A message with the reason why it is dead; one that cannot be read becomes a body."""
    if isinstance(text, dict):
        headers = text.get("headers")
        headers = dict(headers) if isinstance(headers, dict) else {}
        properties = {k: v for k, v in text["properties"].items() if k != "delivery_count"}
        return {
            **text, "headers": headers | {"x-dead-letter-reason": reason}, "properties": properties
        }  # fmt: skip
    return {
        "body": base64.b64encode(text).decode(),
        "content-type": "application/octet-stream",
        "content-encoding": "binary",
        "headers": {"x-dead-letter-reason": reason},
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": ""},
            "delivery_mode": 2,
            "delivery_tag": "",
            "priority": 0,
        },
    }
