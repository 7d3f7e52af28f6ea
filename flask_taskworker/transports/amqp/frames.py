"""Messages out of frames; as py-amqp does it, but for the time it takes to read headers.

A task message has some twenty headers. Those of the usual types are read here; a message with
any other is left to py-amqp.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from amqp.basic_message import Message as AMQPMessage

_METHOD = struct.Struct(">HH")
#: ``basic.return``, ``basic.deliver`` and ``basic.get-ok``: a content follows.
_WITH_CONTENT = frozenset({(60, 50), (60, 60), (60, 71)})
_METHOD_FRAME, _HEADER_FRAME, _HEARTBEAT_FRAME = 1, 2, 8
_BASIC = 60
#: The properties of a message in their order; a bit for each says whether it is there.
_PROPERTIES = (
    "content_type", "content_encoding", "application_headers", "delivery_mode", "priority",
    "correlation_id", "reply_to", "expiration", "message_id",
)  # fmt: skip
#: The bits of properties that are not among them.
_OTHERS = 0b0000_0000_0111_1111


class _Unusual(Exception):
    """A type that is left to py-amqp."""


class Message(AMQPMessage):  # type: ignore[misc]
    """A message of py-amqp."""

    def _load_properties(self, class_id: int, buf: Any, offset: int) -> None:
        data = bytes(buf)
        if class_id == _BASIC:
            try:
                self.properties = _properties(data, offset)
                return
            except (_Unusual, IndexError, UnicodeDecodeError):
                pass
        super()._load_properties(class_id, buf, offset)


class FrameHandler:
    """Puts frames together; py-amqp calls it with each.

    :param callback: gets channel, method, its arguments and its message.
    """

    def __init__(self, connection: Any, callback: Callable[[int, Any, Any, Any], object]) -> None:
        self._connection = connection
        self._callback = callback
        self._unfinished: dict[int, Message] = {}

    def __call__(self, frame: tuple[int, int, bytes]) -> bool:
        """Take a frame; True if something came of it."""
        kind, channel, content = frame
        self._connection.bytes_recv += 1
        if kind == _HEARTBEAT_FRAME:
            return False
        if kind == _METHOD_FRAME:
            method = _METHOD.unpack_from(content, 0)
            if method in _WITH_CONTENT:
                self._unfinished[channel] = Message(frame_method=method, frame_args=content)
                return False
            self._callback(channel, method, content, None)
            return True
        message = self._unfinished[channel]
        if kind == _HEADER_FRAME:
            message.inbound_header(content)
        else:
            message.inbound_body(content)
        if not message.ready:
            return False
        del self._unfinished[channel]
        self._callback(channel, message.frame_method, message.frame_args, message)
        return True


def _properties(data: bytes, at: int) -> dict[str, Any]:
    flags = data[at] << 8 | data[at + 1]
    if flags & _OTHERS:
        raise _Unusual
    at += 2
    found: dict[str, Any] = {}
    bit = 0x8000
    for name in _PROPERTIES:
        if flags & bit:
            if name == "application_headers":
                size = int.from_bytes(data[at : at + 4], "big")
                at += 4
                found[name] = _table(data, at, at + size)
                at += size
            elif name in ("delivery_mode", "priority"):
                found[name] = data[at]
                at += 1
            else:
                end = at + 1 + data[at]
                found[name] = data[at + 1 : end].decode()
                at = end
        bit >>= 1
    return found


def _table(data: bytes, at: int, end: int) -> dict[str, Any]:
    table: dict[str, Any] = {}
    while at < end:
        start = at + 1
        at = start + data[at]
        name = data[start:at].decode()
        table[name], at = _value(data, at)
    return table


def _value(data: bytes, at: int) -> tuple[Any, int]:
    """The value whose type stands at a position, and where the next thing is."""
    kind = data[at]
    at += 1
    if kind == 0x53:  # S, a text
        start = at + 4
        end = start + int.from_bytes(data[at:start], "big")
        return data[start:end].decode(), end
    if kind == 0x56:  # V, nothing
        return None, at
    if kind == 0x49:  # I, four bytes
        return int.from_bytes(data[at : at + 4], "big", signed=True), at + 4
    if kind in (0x6C, 0x4C):  # l, L, eight bytes
        return int.from_bytes(data[at : at + 8], "big", signed=True), at + 8
    if kind == 0x74:  # t, true or false
        return data[at] != 0, at + 1
    if kind == 0x46:  # F, a table
        start = at + 4
        end = start + int.from_bytes(data[at:start], "big")
        return _table(data, start, end), end
    if kind == 0x41:  # A, a list
        start = at + 4
        end = start + int.from_bytes(data[at:start], "big")
        items = []
        while start < end:
            item, start = _value(data, start)
            items.append(item)
        return items, end
    raise _Unusual
