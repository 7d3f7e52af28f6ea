"""What a worker remembers of revoked tasks."""

from __future__ import annotations

import pytest

from flask_taskworker.message import Payload, TaskMessage
from flask_taskworker.transports.fleet import Stamp, read_entry
from flask_taskworker.worker.revoked import Revoked
from support import FakeClock

FAR = 1e12


def message(task_id: str = "one", **stamps: object) -> TaskMessage:
    return TaskMessage("task", task_id, Payload(), stamps=stamps)


def test_a_revoked_task_is_covered_and_no_other() -> None:
    revoked = Revoked()
    revoked.add(["one"], FAR)
    assert revoked.covers(message("one"))
    assert not revoked.covers(message("two"))


def test_a_stamp_covers_the_tasks_that_carry_one_of_its_values() -> None:
    revoked = Revoked()
    revoked.add_stamps([Stamp("tenant", "acme")], FAR)
    assert revoked.covers(message(tenant="acme"))
    assert revoked.covers(message(tenant=["other", "acme"]))
    assert not revoked.covers(message(tenant="other"))
    assert not revoked.covers(message(region="acme"))
    assert not revoked.covers(message())


def test_a_revocation_ends(clock: FakeClock) -> None:
    revoked = Revoked()
    revoked.add(["one"], clock.now + 10)
    assert revoked.covers(message("one"))
    clock.advance(11)
    assert not revoked.covers(message("one"))
    assert revoked.ids() == []


def test_the_oldest_go_when_there_are_too_many() -> None:
    revoked = Revoked(limit=2)
    revoked.add(["one", "two"], FAR)
    revoked.add(["one"], FAR)  # now the newest
    revoked.add(["three"], FAR)
    assert revoked.ids() == ["one", "three"]


@pytest.mark.parametrize("stamp", [Stamp("tenant", "acme"), Stamp("a:b", 'c"d')])
def test_what_a_broker_keeps_is_taken_over(stamp: Stamp) -> None:
    revoked = Revoked()
    revoked.load([("one", FAR), (stamp.entry, FAR), ("stamp:nonsense", FAR)])
    assert revoked.ids() == ["one"]
    assert revoked.covers(message("two", **{stamp.header: stamp.value}))
    assert read_entry("stamp:nonsense") is None
