"""Several consumers in any order of operations, compared with a queue of a dozen lines.

The model keeps every message in one list. Whatever hypothesis makes of publishing,
fetching, settling and closing, the transport must hand out the same message next.
"""

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kombu
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import flask_taskworker.transports  # noqa: F401 - teaches kombu our transport
from flask_taskworker.transports.sql import dead_letters
from flask_taskworker.transports.sql.engine import database_for

QUEUES = st.sampled_from(["a", "b"])
CONSUMERS = st.integers(0, 2)
MAX_DELIVERIES = 3


@dataclass
class Message:
    number: int
    queue: str
    priority: int
    attempts: int = 0


class Model:
    """What a queue is: the most urgent first, and the oldest of those."""

    def __init__(self) -> None:
        self.ready: list[Message] = []
        self.dead: list[Message] = []

    def waiting(self, queue: str) -> list[Message]:
        found = [message for message in self.ready if message.queue == queue]
        return sorted(found, key=lambda message: (-message.priority, message.number))

    def fetch(self, queue: str) -> Message | None:
        waiting = self.waiting(queue)
        if not waiting:
            return None
        message = waiting[0]
        self.ready.remove(message)
        message.attempts += 1
        if message.attempts > MAX_DELIVERIES:
            self.dead.append(message)
            return None
        return message


class CompareWithModel(RuleBasedStateMachine):
    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.suffix = uuid.uuid4().hex  # queues of its own: earlier runs may have left something
        self.options = {"durability": "normal", "max_deliveries": MAX_DELIVERIES}
        self.connections = [self.connect() for _ in range(3)]
        self.held: list[dict[int, Message]] = [{}, {}, {}]
        self.model = Model()
        self.published = 0
        for queue in ("a", "b"):
            self.channel(0).queue_declare(self.name(queue), durable=True)

    def name(self, queue: str) -> str:
        return f"{queue}-{self.suffix}"

    def connect(self) -> Any:
        return kombu.Connection(self.url, transport_options=self.options)

    def channel(self, consumer: int) -> Any:
        return self.connections[consumer].default_channel

    def pick(self, consumer: int, data: st.DataObject) -> tuple[int, Message]:
        tag = data.draw(st.sampled_from(sorted(self.held[consumer])))
        return tag, self.held[consumer].pop(tag)

    @rule(consumer=CONSUMERS, queue=QUEUES, priority=st.integers(0, 9))
    def publish(self, consumer: int, queue: str, priority: int) -> None:
        producer = kombu.Producer(self.channel(consumer))
        producer.publish(self.published, routing_key=self.name(queue), priority=priority)
        self.model.ready.append(Message(self.published, queue, priority))
        self.published += 1

    @rule(consumer=CONSUMERS, queue=QUEUES)
    def fetch(self, consumer: int, queue: str) -> None:
        expected = self.model.fetch(queue)
        message = self.channel(consumer).basic_get(self.name(queue))
        assert (message and message.payload) == (expected and expected.number)
        if message is not None and expected is not None:
            assert message.properties["delivery_count"] == expected.attempts
            assert message.delivery_info["redelivered"] == (expected.attempts > 1)
            assert message.delivery_info["priority"] == expected.priority
            self.held[consumer][message.delivery_tag] = expected

    @precondition(lambda self: any(self.held))
    @rule(
        data=st.data(),
        how=st.sampled_from(["ack", "discard", "requeue", "give back", "dead letter"]),
    )
    def settle(self, data: st.DataObject, how: str) -> None:
        consumer = data.draw(st.sampled_from([i for i in range(3) if self.held[i]]))
        channel = self.channel(consumer)
        tag, message = self.pick(consumer, data)
        if how == "ack":
            channel.basic_ack(tag)
            return  # it may wait for the next claim: nobody else can see the difference
        if how == "discard":
            channel.basic_reject(tag, requeue=False)
        elif how == "requeue":
            channel.basic_reject(tag, requeue=True)
            self.model.ready.append(message)
        elif how == "give back":
            channel.requeue(tag, count_delivery=False)
            message.attempts -= 1
            self.model.ready.append(message)
        else:
            channel.dead_letter(tag, "of no use")
            self.model.dead.append(message)
        channel.flush()

    @rule(consumer=CONSUMERS)
    def leave_and_come_back(self, consumer: int) -> None:
        self.connections[consumer].release()
        for message in self.held[consumer].values():
            message.attempts -= 1
            self.model.ready.append(message)
        self.held[consumer] = {}
        self.connections[consumer] = self.connect()

    @rule(consumer=CONSUMERS, queue=QUEUES)
    def purge(self, consumer: int, queue: str) -> None:
        waiting = self.model.waiting(queue)
        assert self.channel(consumer).queue_purge(self.name(queue)) == len(waiting)
        for message in waiting:
            self.model.ready.remove(message)

    def letters(self) -> list[dead_letters.DeadLetter]:
        database = database_for(self.url, self.options)
        return [
            letter
            for queue in ("a", "b")
            for letter in dead_letters.list(database, self.name(queue), limit=1000)
        ]

    @rule()
    def replay_dead_letters(self) -> None:
        dead_letters.replay(
            database_for(self.url, self.options), [letter.id for letter in self.letters()]
        )
        for message in self.model.dead:
            message.attempts = 0
            self.model.ready.append(message)
        self.model.dead = []

    @invariant()
    def sizes_agree(self) -> None:
        for queue in ("a", "b"):
            declared = self.channel(0).queue_declare(self.name(queue), durable=True)
            assert declared.message_count == len(self.model.waiting(queue))

    @invariant()
    def dead_letters_agree(self) -> None:
        assert {letter.body for letter in self.letters()} == {
            str(message.number).encode() for message in self.model.dead
        }

    def teardown(self) -> None:
        for connection in self.connections:
            connection.release()


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


@pytest.mark.timeout(240)  # every step is a commit, and some disks take their time
def test_any_order_of_operations_gives_what_the_model_gives(url: str) -> None:
    run_state_machine_as_test(
        lambda: CompareWithModel(url),
        settings=settings(
            max_examples=25 if "sqlite" in url else 3,  # a server takes ten times as long
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    database_for(url).dispose()
