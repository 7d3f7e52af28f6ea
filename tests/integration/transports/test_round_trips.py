"""How many times a publish and a claim talk to the database, and that nothing is lost by it."""

from __future__ import annotations

from typing import Any

import kombu
import pytest

from flask_taskworker.transports.sql.connection import HeldConnection
from flask_taskworker.transports.sql.errors import DeadlockError

#: Round trips of one claim with the acknowledgements of the last one, at most.
_CLAIM = {"sqlite": 6, "postgresql": 1, "mysql": 2}
_PREFETCH = 4


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The statements sent from here on, one text per round trip."""
    texts: list[str] = []
    execute, script = HeldConnection.execute, HeldConnection.script

    def noted_execute(self: HeldConnection, sql: str, params: Any = ()) -> Any:
        texts.append(sql)
        return execute(self, sql, params)

    def noted_script(self: HeldConnection, sql: str, params: Any = ()) -> Any:
        texts.append(sql)
        return script(self, sql, params)

    monkeypatch.setattr(HeldConnection, "execute", noted_execute)
    monkeypatch.setattr(HeldConnection, "script", noted_script)
    return texts


def about_messages(texts: list[str]) -> list[str]:
    """Without what is due now and then: looks for delayed messages and the janitor's."""
    rare = ("owner = -1", "consumer", "expires", "synchronous", "q.paused")
    return [text for text in texts if not any(word in text for word in rare)]


def acknowledge_until(receiver: Any, count: int) -> None:
    """Acknowledge whatever comes until so many messages came."""
    while len(receiver.messages) < count:
        for message in receiver.messages:
            if not message.acknowledged:
                message.ack()
        receiver.wait_for(len(receiver.messages) + 1)


def test_a_publish_is_one_round_trip(broker: Any, spoken: list[str]) -> None:
    producer = kombu.Producer(broker.connection().channel())
    producer.publish(0, exchange="", routing_key="q")
    del spoken[:]
    for number in range(3):
        producer.publish(number, exchange="", routing_key="q")
    assert len(spoken) == 3
    assert broker.count() == 4


def test_a_busy_consumer_claims_and_acknowledges_together(broker: Any, spoken: list[str]) -> None:
    broker.publish(*range(5 * _PREFETCH))
    receiver = broker.receiver(prefetch=_PREFETCH)
    receiver.wait_for(_PREFETCH)
    per_claim = []
    for turn in range(2, 6):
        del spoken[:]
        for message in receiver.messages:
            if not message.acknowledged:
                message.ack()
        receiver.wait_for(turn * _PREFETCH)
        per_claim.append(len(about_messages(spoken)))
    # The first of them had to see that there is more than one claim takes.
    assert sorted(per_claim)[1] <= _CLAIM[broker.database.dialect.name]
    assert receiver.wait_for(0) == list(range(5 * _PREFETCH))


def test_a_message_taken_away_is_not_acknowledged_with_a_claim(broker: Any) -> None:
    broker.publish(*range(3 * _PREFETCH))
    receiver = broker.receiver(prefetch=_PREFETCH)
    receiver.wait_for(_PREFETCH)
    mine = receiver.messages[0].delivery_tag
    id = receiver.channel.qos.get(mine).id
    broker.execute("UPDATE {message} SET owner = 0 WHERE id = ?", id)
    for message in receiver.messages:
        message.ack()
    receiver.wait_for(2 * _PREFETCH)
    assert receiver.channel.lost_leases == 1
    assert broker.execute("SELECT count(*) FROM {message} WHERE id = ?", id)[0][0] == 1
    acknowledge_until(receiver, 3 * _PREFETCH + 1)
    assert 0 in receiver.wait_for(0)[_PREFETCH:]
    receiver.ack()
    assert broker.count() == 0


def test_a_deadlock_amid_a_claim_loses_and_repeats_nothing(
    broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.publish(*range(3 * _PREFETCH))
    receiver = broker.receiver(prefetch=_PREFETCH)
    receiver.wait_for(_PREFETCH)
    script = HeldConnection.script
    failures = ["UPDATE", "DELETE"]

    def failing(self: HeldConnection, sql: str, params: Any = ()) -> Any:
        if failures and failures[-1] in sql:
            failures.pop()
            raise DeadlockError("chosen as victim")
        return script(self, sql, params)

    monkeypatch.setattr(HeldConnection, "script", failing)
    acknowledge_until(receiver, 3 * _PREFETCH)
    receiver.ack()
    assert receiver.wait_for(0) == list(range(3 * _PREFETCH))
    assert receiver.drain() == []
    assert broker.count() == 0
    assert failures == ([] if broker.database.dialect.name == "mysql" else ["UPDATE", "DELETE"])
