"""Messages are read from RabbitMQ's frames as py-amqp reads them."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from amqp.basic_message import Message as AMQPMessage

from flask_taskworker.transports.amqp.frames import Message

PLAIN: dict[str, Any] = {
    "text": "ä☃",
    "empty": "",
    "nothing": None,
    "small": -5,
    "large": 2**40,
    "yes": True,
    "list": [1, [None, "x"], {"y": 2}],
    "table": {"a": {"b": "c"}},
}


def both(**properties: Any) -> list[dict[str, Any]]:
    sent = AMQPMessage("", **properties)._serialize_properties()
    frame = struct.pack(">HHQ", 60, 0, 0) + sent
    messages = [Message(), AMQPMessage()]
    for message in messages:
        message.inbound_header(frame, 0)
    return [message.properties for message in messages]


@pytest.mark.parametrize("name", PLAIN)
def test_each_type_of_header(name: str) -> None:
    ours, theirs = both(application_headers={name: PLAIN[name]})
    assert ours == theirs == {"application_headers": {name: PLAIN[name]}}


def test_all_properties() -> None:
    ours, theirs = both(
        content_type="application/json", content_encoding="utf-8", application_headers=PLAIN,
        delivery_mode=2, priority=9, correlation_id="c", reply_to="r", expiration="1000",
        message_id="m",
    )  # fmt: skip
    assert ours == theirs
    assert ours["priority"] == 9


@pytest.mark.parametrize(
    "properties",
    [
        {"timestamp": 1_700_000_000},
        {"type": "t", "app_id": "a", "user_id": "u"},
        {"application_headers": {"float": 1.5, "after": "x"}},
        {"application_headers": {"bytes": b"\xff\xfe"}},
        {},
    ],
    ids=str,
)
def test_what_is_unusual_is_left_to_py_amqp(properties: dict[str, Any]) -> None:
    ours, theirs = both(**properties)
    assert ours == theirs
