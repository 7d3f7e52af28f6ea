"""What passes between a worker and its child processes: frames of JSON, and nothing that runs.

A job is what a broker delivered, as plain data; a report is what became of it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kombu.utils import json as kombu_json

from ...exceptions import WorkerError
from ...message import WireMessage
from ...texts import safe_repr
from ..delivery import Delivery, Outcome, Settlement

_LENGTH = struct.Struct(">I")
#: No frame is longer; a length beyond it is no length. Bytes.
LONGEST = 1 << 30
#: The first byte of a frame that holds more than plain JSON: dates, decimals, bytes.
_RICH = b"k"
_PLAIN = b"j"
_encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode


class _Encoder(kombu_json.JSONEncoder):  # type: ignore[misc,unused-ignore]
    """What even kombu has no form for travels as text."""

    def default(self, o: Any) -> Any:
        try:
            return super().default(o)
        except TypeError:
            return safe_repr(o)


class BrokenFrame(WorkerError):
    """What came in is no frame: something wrote over the channel."""


def frame(content: list[Any]) -> bytes:
    """A frame with this content."""
    try:
        data = _PLAIN + _encode(content).encode("ascii")
    except (TypeError, ValueError):
        data = _RICH + kombu_json.dumps(content, cls=_Encoder).encode()
    return _LENGTH.pack(len(data)) + data


def read_frame(data: bytes | bytearray) -> list[Any]:
    """The content of a frame, given what follows its length."""
    loads = kombu_json.loads if bytes(data[:1]) == _RICH else json.loads
    try:
        content = loads(bytes(data[1:]))
    except Exception as exc:  # whatever a child that lost its senses may write
        raise BrokenFrame(f"no frame: {exc}") from None
    if not isinstance(content, list) or not content:
        raise BrokenFrame("no frame: an empty one")
    return content


def length_of(head: bytes | bytearray) -> int:
    """The length that a frame announces in its first four bytes."""
    (length,) = _LENGTH.unpack(head)
    if not 0 < length <= LONGEST:
        raise BrokenFrame(f"no frame: it would be {length} bytes long")
    return int(length)


class Frames:
    """Cuts a stream into frames."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[list[Any]]:
        """The contents of the frames that are complete with this piece.

        :raises BrokenFrame: if it is none.
        """
        self._data += data
        at, held = 0, len(self._data)
        try:
            while held - at >= _LENGTH.size:
                end = at + _LENGTH.size + length_of(self._data[at : at + _LENGTH.size])
                if end > held:
                    return
                content = read_frame(self._data[at + _LENGTH.size : end])
                at = end
                yield content
        finally:
            del self._data[:at]


# -- jobs -----------------------------------------------------------------------------------


@dataclass
class RawMessage:
    """A received message as a child has it; settling is the parent's."""

    body: bytes | str
    content_type: Any
    content_encoding: Any
    headers: dict[str, Any]
    properties: dict[str, Any]
    delivery_info: dict[str, Any]


@dataclass
class Job:
    """One run for a child."""

    number: int
    raw: RawMessage
    queue: str
    acknowledged: bool
    watched: bool
    limits: tuple[float | None, float | None]


def job_frame(number: int, delivery: Delivery) -> bytes:
    """A delivery as a frame."""
    raw = delivery.raw
    body, binary = raw.body, False
    if not isinstance(body, str):
        body, binary = bytes(body).decode("latin-1"), True
    headers = dict(raw.headers or {})
    headers.pop("compression", None)  # it is unpacked already
    properties = {
        key: value for key, value in (raw.properties or {}).items() if key != "application_headers"
    }
    return frame(
        [number, body, binary, raw.content_type, raw.content_encoding, headers, properties,
         dict(raw.delivery_info or {}), delivery.queue, delivery.acknowledged, delivery.watched,
         delivery.limits]
    )  # fmt: skip


def read_job(content: list[Any]) -> Job:
    """The job in a frame."""
    (number, body, binary, content_type, encoding, headers, properties, info, queue,
     acknowledged, watched, limits) = content  # fmt: skip
    raw = RawMessage(
        body.encode("latin-1") if binary else body,
        content_type,
        encoding,
        headers,
        properties,
        info,
    )
    return Job(number, raw, queue, acknowledged, watched, (limits[0], limits[1]))


# -- reports --------------------------------------------------------------------------------


def start_frame(number: int, started: float, since: float) -> bytes:
    """A run began.

    :param started: in epoch seconds.
    :param since: the same on the monotonic clock, which all processes of a host share.
    """
    return frame(["start", number, started, since])


def end_frame(number: int, started: float, outcome: Outcome, memory: int) -> bytes:
    """A run ended.

    :param memory: what the child has used at most so far, in KiB; 0 if nobody asks.
    """
    statement = None
    if outcome.statement is not None:
        sql, values = outcome.statement
        statement = [sql, [_value(value) for value in values]]
    messages = [[queue, _value(wire.body), *wire[1:]] for queue, wire in outcome.messages]
    return frame(
        ["end", number, started, outcome.settlement.value, statement, outcome.reason,
         outcome.runtime, outcome.state, outcome.shown, outcome.traceback, messages, memory]
    )  # fmt: skip


def _value(value: Any) -> list[Any]:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return ["b", bytes(value).decode("latin-1")]
    return ["v", value]


def _read_value(kind_and_value: list[Any]) -> Any:
    kind, value = kind_and_value
    return value.encode("latin-1") if kind == "b" else value


def read_end(content: list[Any]) -> tuple[int, float, Outcome, int]:
    """The number of the job, when it started, its outcome, and the memory that was used.

    :raises BrokenFrame: if it is no report.
    """
    try:
        (_, number, started, settlement, statement, reason, runtime, state, shown, traceback,
         messages, memory) = content  # fmt: skip
        if statement is not None:
            sql, values = statement
            statement = sql, [_read_value(value) for value in values]
        outcome = Outcome(
            Settlement(settlement),
            None,
            statement,
            str(reason),
            float(runtime),
            str(state),
            str(shown),
            str(traceback),
            tuple(
                (queue, WireMessage(_read_value(body), *rest)) for queue, body, *rest in messages
            ),
        )
        return int(number), float(started), outcome, int(memory)
    except (TypeError, ValueError, AttributeError) as exc:
        raise BrokenFrame(f"no report: {exc}") from None
