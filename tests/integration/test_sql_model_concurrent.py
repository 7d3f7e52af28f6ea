"""Consumers and publishers at the same time, their history compared with a simple model.

Each thread notes when each of its operations began and ended. What happened in between is open, but
a message has one life: published, ready, in one pair of hands, ready again or gone. The model walks
through the life of each and knows when it was certainly ready. Whatever a fetch returned, nothing
that was certainly ready all the while may have had the right of way.
"""

from __future__ import annotations

import random
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import kombu
import pytest

import flask_taskworker.transports  # noqa: F401 - teaches kombu our transport
from flask_taskworker.transports.sql import dead_letters
from flask_taskworker.transports.sql.engine import database_for

THREADS = 4
STEPS = 200
QUEUES = ("a", "b")
FOR_EVER = float("inf")


class Event(NamedTuple):
    """One operation: on which message, and between which two times it happened."""

    kind: str
    queue: str
    message: int | None
    begin: float
    end: float
    delivery_count: int = 0
    #: A settlement: the fetch it ends.
    ends: Event | None = None


@dataclass
class Life:
    """A message as the model knows it."""

    queue: str
    priority: int
    published: Event
    #: When it was certainly ready: from the end of what made it so to the begin of its fetch.
    ready: list[tuple[float, float]] = field(default_factory=list)
    state: str = "ready"


class Worker(threading.Thread):
    """A thread with a connection of its own that does this and that."""

    def __init__(self, number: int, run: Run) -> None:
        super().__init__()
        self.number = number
        self.run_ = run
        self.chance = random.Random(f"{run.seed}-{number}")
        self.events: list[Event] = []
        self.priorities: dict[int, int] = {}
        self.error: BaseException | None = None
        self._held: list[tuple[Event, Any]] = []
        self._published = 0

    def run(self) -> None:
        try:
            with self.run_.connect() as connection:
                channel = connection.channel()
                self.run_.start_line.wait(30)
                for _ in range(STEPS):
                    self._step(channel)
                begin = time.monotonic()
                channel.give_back()  # all at once
                self.events += [
                    Event(
                        "give back", fetch.queue, fetch.message, begin, time.monotonic(), 0, fetch
                    )
                    for fetch, _ in self._held
                ]
        except BaseException as error:
            self.error = error

    def _step(self, channel: Any) -> None:
        queue = self.chance.choice(QUEUES)
        if self._held and self.chance.random() < 0.4:
            self._settle(channel)
        elif self.chance.random() < 0.5:
            self._publish(channel, queue)
        else:
            self._fetch(channel, queue)

    def _publish(self, channel: Any, queue: str) -> None:
        id = self.number * 1_000_000 + self._published
        self._published += 1
        self.priorities[id] = self.chance.choice((0, 0, 0, 5, 9))
        producer = kombu.Producer(channel)
        self._note(
            "publish", queue, id,
            lambda: producer.publish(
                id, exchange="", routing_key=self.run_.name(queue), priority=self.priorities[id]
            ),
        )  # fmt: skip

    def _fetch(self, channel: Any, queue: str) -> None:
        begin = time.monotonic()
        message = channel.basic_get(self.run_.name(queue))
        end = time.monotonic()
        if message is None:
            self.events.append(Event("nothing", queue, None, begin, end))
            return
        count = message.properties["delivery_count"]
        fetch = Event("fetch", queue, message.payload, begin, end, count)
        self.events.append(fetch)
        self._held.append((fetch, message))

    def _settle(self, channel: Any) -> None:
        fetch, message = self._held.pop(self.chance.randrange(len(self._held)))
        kind = self.chance.choice(("ack", "ack", "discard", "requeue", "give back", "dead letter"))
        tag = message.delivery_tag

        def settle() -> None:
            if kind == "ack":
                channel.basic_ack(tag)
            elif kind == "discard":
                channel.basic_reject(tag, requeue=False)
            elif kind == "requeue":
                channel.basic_reject(tag, requeue=True)
            elif kind == "give back":
                channel.requeue(tag, count_delivery=False)
            else:
                channel.dead_letter(tag, "of no use")
            channel.flush()

        self._note(kind, fetch.queue, fetch.message, settle, fetch)

    def _note(
        self,
        kind: str,
        queue: str,
        id: int | None,
        work: Callable[[], object],
        ends: Event | None = None,
    ) -> None:
        begin = time.monotonic()
        work()
        self.events.append(Event(kind, queue, id, begin, time.monotonic(), 0, ends))


class Run:
    """Some threads on one database, and what came of it."""

    def __init__(self, url: str, seed: int) -> None:
        self.url, self.seed = url, seed
        self.start_line = threading.Barrier(THREADS)
        self.options = {"durability": "normal", "max_deliveries": 0}
        self._suffix = uuid.uuid4().hex
        self.workers = [Worker(number, self) for number in range(THREADS)]
        with self.connect() as connection:
            for queue in QUEUES:
                connection.default_channel.queue_declare(self.name(queue))

    def name(self, queue: str) -> str:
        return f"{queue}-{self._suffix}"

    def connect(self) -> Any:
        return kombu.Connection(self.url, transport_options=self.options)

    def play(self) -> list[Event]:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)  # much shorter than an operation
        try:
            for worker in self.workers:
                worker.start()
            for worker in self.workers:
                worker.join(120)
        finally:
            sys.setswitchinterval(interval)
        assert [worker.error for worker in self.workers] == [None] * THREADS
        return sorted(
            (event for worker in self.workers for event in worker.events),
            key=lambda event: event.begin,
        )

    def left(self) -> tuple[set[int], set[int]]:
        """The messages that are ready, and the dead ones."""
        database = database_for(self.url, self.options)
        dead = {
            int(letter.body)
            for queue in QUEUES
            for letter in dead_letters.list(database, self.name(queue), limit=100_000)
        }
        ready: set[int] = set()
        with self.connect() as connection:
            channel = connection.channel()
            for queue in QUEUES:
                while message := channel.basic_get(self.name(queue), no_ack=True):
                    ready.add(message.payload)
        return ready, dead


class Model:
    """The life of each message, told from the events."""

    def __init__(self, events: list[Event], priorities: dict[int, int]) -> None:
        self.lives: dict[int, Life] = {}
        settlements = {event.ends: event for event in events if event.ends is not None}
        fetches: dict[int, list[Event]] = defaultdict(list)
        for event in events:
            if event.kind == "publish":
                assert event.message is not None
                self.lives[event.message] = Life(event.queue, priorities[event.message], event)
            elif event.kind == "fetch":
                assert event.message is not None
                fetches[event.message].append(event)
        for message, life in self.lives.items():
            self._live(life, fetches[message], settlements)

    def _live(self, life: Life, fetches: list[Event], settlements: dict[Event, Event]) -> None:
        """A message in one pair of hands after the other, and how often that counted."""
        made_ready, counted = life.published, 0
        # A fetch ends before its settlement begins, and that before the next fetch can end.
        for fetch in sorted(fetches, key=lambda event: event.end):
            assert life.state == "ready", f"{fetch} of a message that is gone: {life.state}"
            assert made_ready.begin < fetch.end, f"{fetch} before {made_ready}"
            life.ready.append((made_ready.end, fetch.begin))
            counted += 1
            assert fetch.delivery_count == counted, fetch
            settlement = settlements[fetch]
            if settlement.kind == "give back":
                counted -= 1
            if settlement.kind not in ("requeue", "give back"):
                life.state = settlement.kind
            made_ready = settlement
        if life.state == "ready":
            life.ready.append((made_ready.end, FOR_EVER))

    def in_state(self, state: str) -> set[int]:
        return {message for message, life in self.lives.items() if life.state == state}

    def with_right_of_way(self, fetch: Event) -> Iterator[int]:
        """What was certainly ready during a fetch and should have been its outcome instead."""
        got = None if fetch.message is None else self.lives[fetch.message]
        for message, life in self.lives.items():
            if message == fetch.message or life.queue != fetch.queue:
                continue
            if not any(begin < fetch.begin and fetch.end < end for begin, end in life.ready):
                continue
            more_urgent = got is None or life.priority > got.priority
            older = got is not None and life.published.end < got.published.begin
            if more_urgent or (older and got is not None and life.priority == got.priority):
                yield message


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgresql_url", marks=pytest.mark.services),
        pytest.param("mysql_url", marks=pytest.mark.services),
    ]
)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"taskworker+sqlite:///{tmp_path}/queue.db"
    return f"taskworker+{request.getfixturevalue(request.param)}"


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", range(4))
def test_what_happens_at_the_same_time_could_have_happened_to_the_model(
    url: str, seed: int
) -> None:
    run = Run(url, seed)
    events = run.play()
    model = Model(events, {k: v for worker in run.workers for k, v in worker.priorities.items()})
    wrong = [
        (event, passed_over)
        for event in events
        if event.kind in ("fetch", "nothing")
        for passed_over in model.with_right_of_way(event)
    ]
    assert wrong == []
    fetched = sum(event.kind == "fetch" for event in events)
    overlapping = sum(one.end > other.begin for one, other in pairwise(events))
    print(f"\n{len(events)} operations, {overlapping} overlapping, {fetched} fetches")
    assert fetched > 50
    assert overlapping > 10
    ready, dead = run.left()
    assert ready == model.in_state("ready")
    assert dead == model.in_state("dead letter")
    database_for(url).dispose()
