"""What passes between a worker and its children: everything that brokers carry, and no nonsense."""

from __future__ import annotations

import contextlib
import datetime
import os
from decimal import Decimal
from typing import Any

import pytest

from flask_taskworker.message import WireMessage
from flask_taskworker.worker.delivery import Outcome, Settlement
from flask_taskworker.worker.pools import wire
from support import deliver


def through(data: bytes, piece: int = 7) -> list[Any]:
    """The contents of frames that come in pieces."""
    frames, found = wire.Frames(), []
    for at in range(0, len(data), piece):
        found += list(frames.feed(data[at : at + piece]))
    return found


def test_frames_are_found_in_whatever_pieces_they_come() -> None:
    contents = [[1], ["größe \ud800", {"a": [None, 1.5]}], [list(range(50))]]
    data = b"".join(map(wire.frame, contents))
    for piece in (1, 3, 1000):
        assert through(data, piece) == contents


@pytest.mark.parametrize("body", [b'{"x": "\xff"}', "text", b"", bytes(range(256))])
def test_a_job_is_what_the_broker_delivered(body: bytes | str) -> None:
    delivery = deliver("t", 1, headers={"x-own": "1"})
    delivery.raw.body = body
    delivery.raw.headers["moment"] = datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)
    delivery.raw.headers["price"] = Decimal("1.50")
    delivery.raw.headers["compression"] = "application/x-gzip"
    delivery.watched, delivery.limits = True, (5, 4.5)
    (content,) = through(wire.job_frame(12, delivery))
    job = wire.read_job(content)
    assert job.raw.body == body
    assert job.raw.headers == {
        name: value for name, value in delivery.raw.headers.items() if name != "compression"
    }
    assert job.raw.properties == delivery.raw.properties
    assert job.raw.delivery_info == delivery.raw.delivery_info
    assert (job.number, job.queue, job.watched, job.acknowledged) == (12, "celery", True, False)
    assert job.limits == (5, 4.5)


def test_a_report_is_the_outcome() -> None:
    outcome = Outcome(
        Settlement.DEAD_LETTER,
        statement=("INSERT ?", ("id", b"\x00\xff", None, 1.5)),
        reason="because",
        runtime=0.25,
        state="FAILURE",
        shown="'x'",
        traceback="Traceback",
        messages=(("q", WireMessage(b"\xff", "application/x", "binary", {"a": 1}, {"b": [2]})),),
    )
    assert all(outcome[:1] + outcome[2:]), "each field but the record says something here"
    (content,) = through(wire.end_frame(3, 100.5, outcome, 9000))
    number, started, read, memory = wire.read_end(content)
    assert (number, started, memory) == (3, 100.5, 9000)
    assert read._replace(statement=None) == outcome._replace(statement=None)
    assert read.statement == ("INSERT ?", ["id", b"\x00\xff", None, 1.5])


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 20,
        b"\0\0\0\0",
        b"\0\0\0\5jnope",
        b"\0\0\0\3j{}",
        b"\0\0\0\3j[]",
        b"HTTP/1.1 200 OK",
    ],
)
def test_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(wire.BrokenFrame):
        through(data)


@pytest.mark.parametrize(
    "content",
    [["end"], ["end", 1, 2, "nothing", *[""] * 8], ["end", *[None] * 11]],
)
def test_a_report_that_is_none_is_refused(content: list[Any]) -> None:
    with pytest.raises(wire.BrokenFrame):
        wire.read_end(content)


def test_random_bytes_raise_nothing_else() -> None:
    for _ in range(300):
        with contextlib.suppress(wire.BrokenFrame):
            through(os.urandom(40))
