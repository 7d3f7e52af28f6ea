"""The process that sends tasks: obeys the harness, one JSON object a line on its stdin."""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from .app import client
from .figures import percentile

Answer = dict[str, Any]

_SENDERS: Mapping[str, Callable[..., object]] = {
    "noop": client.send,
    "stored": client.send_stored,
    "nap": client.send_nap,
}


def enqueue(task: str, count: int, seconds: float, extra: list[float], warm: int) -> Answer:
    """Send as fast as possible: ``count`` tasks or ``seconds`` long, whichever ends first."""
    send = _SENDERS[task]
    for _ in range(warm):
        send(-1, *extra)
    took: list[int] = []
    cpu = time.process_time()
    begin = before = time.perf_counter_ns()
    end = begin + int(seconds * 1e9)
    for number in range(count):
        send(number, *extra)
        after = time.perf_counter_ns()
        took.append(after - before)
        before = after
        if after > end:
            break
    cpu = time.process_time() - cpu
    return {
        "sent": len(took),
        "rate": len(took) / ((before - begin) / 1e9),
        "cpu": cpu / len(took) * 1e6,
        "p50": percentile(took, 0.50) / 1e3,
        "p99": percentile(took, 0.99) / 1e3,
    }


def send_apart(first: int, count: int, shortest: float, longest: float) -> Answer:
    """Send one by one with pauses; when each was sent, by its number."""
    pauses = random.Random(first)
    sent: dict[int, int] = {}
    for number in range(first, first + count):
        sent[number] = time.monotonic_ns()
        client.send(number)
        time.sleep(pauses.uniform(shortest, longest))
    return {"sent": sent}


def round_trips(first: int, count: int, seconds: float) -> Answer:
    """Send and wait for the result, again and again; the milliseconds that each took."""
    took: list[float] = []
    end = time.monotonic() + seconds
    for number in range(first, first + count):
        begin = time.perf_counter()
        client.get(client.send_stored(number), 15.0)
        took.append((time.perf_counter() - begin) * 1e3)
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    return {"milliseconds": took}


def clean_up() -> Answer:
    client.clean_up()
    return {}


ORDERS: Mapping[str, Callable[..., Answer]] = {
    "enqueue": enqueue,
    "send_apart": send_apart,
    "round_trips": round_trips,
    "clean_up": clean_up,
}


def obey(orders: TextIO, answers: TextIO) -> None:
    """Answer every order; an exception is an answer as well."""
    for line in orders:
        order = json.loads(line)
        try:
            answer = ORDERS[order.pop("order")](**order)
        except Exception as exc:
            traceback.print_exc()
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    # Whatever a library prints must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    print(json.dumps({"ready": True}), file=answers, flush=True)
    obey(sys.stdin, answers)


if __name__ == "__main__":
    main()
