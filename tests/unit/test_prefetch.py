"""How many messages are reserved: what can run, and a little more while runs are short."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_taskworker.transports import Capabilities
from flask_taskworker.worker.prefetch import AHEAD_MESSAGES, AHEAD_SECONDS, Prefetch


class Channel:
    """Keeps what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, bool]] = []

    def basic_qos(self, size: int, count: int, all_consumers: bool) -> None:
        self.asked.append((size, count, all_consumers))


CHEAP = Capabilities(cheap_prefetch=True)
DEAR = Capabilities(cheap_prefetch=False)


def after(*runtimes: float, slots: int = 4) -> Prefetch:
    prefetch = Prefetch(slots)
    for runtime in runtimes:
        prefetch.observe(runtime)
    return prefetch


def test_at_first_only_free_slots_are_filled() -> None:
    prefetch = Prefetch(4)
    assert [prefetch.room(load) for load in range(7)] == [4, 3, 2, 1, 0, 0, 0]
    assert prefetch.ahead() == 0


def test_long_tasks_are_not_hoarded() -> None:
    prefetch = after(10.0)
    assert prefetch.ahead() == 0
    assert [prefetch.room(load) for load in (0, 3, 4, 5)] == [4, 1, 0, 0]


@pytest.mark.parametrize(
    ("runtime", "ahead"),
    [
        (0.1, 0),
        (0.02, 4),
        (0.01, 8),
        (0.001, 80),
        (0.0001, AHEAD_MESSAGES),
        (5e-324, AHEAD_MESSAGES),
        (0.0, AHEAD_MESSAGES),
    ],
)
def test_short_tasks_are_reserved_ahead(runtime: float, ahead: int) -> None:
    assert after(runtime).ahead() == ahead


def test_a_clock_that_goes_back_does_no_harm() -> None:
    assert after(-1.0).ahead() == AHEAD_MESSAGES


def test_a_portion_is_asked_for_and_not_single_messages() -> None:
    prefetch = after(0.01)  # eight ahead of four slots
    assert prefetch.room(12) == 0
    assert prefetch.room(9) == 0
    assert prefetch.room(8) == 4
    assert prefetch.room(4) == 8
    assert prefetch.room(0) == 12


def test_the_newest_runs_count_most() -> None:
    prefetch = after(0.001)
    for _ in range(50):
        prefetch.observe(1.0)
    assert prefetch.ahead() == 0
    for _ in range(100):
        prefetch.observe(0.001)
    assert prefetch.ahead() > 40


def test_one_long_run_among_short_ones_lowers_the_reserve_at_once() -> None:
    prefetch = after(*[0.0005] * 20)
    before = prefetch.ahead()
    prefetch.observe(5.0)
    assert prefetch.ahead() == 0
    assert before == AHEAD_MESSAGES


def test_what_was_learned_can_be_forgotten() -> None:
    prefetch = after(0.0001)
    prefetch.apply(Channel(), DEAR, 100, 0)
    prefetch.reset()
    assert prefetch.ahead() == 0
    assert prefetch.limit == prefetch.slots


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.integers(1, 64),
    st.lists(st.floats(0, 100), max_size=8),
    st.integers(0, 400),
)
def test_never_less_than_nothing_nor_more_than_the_reserve(
    slots: int, runtimes: list[float], load: int
) -> None:
    prefetch = after(*runtimes, slots=slots)
    room = prefetch.room(load)
    assert room >= 0
    assert room == 0 or load + room == slots + prefetch.ahead()
    assert prefetch.ahead() <= AHEAD_MESSAGES
    assert load >= slots or room > 0  # a free slot is never left empty


def test_the_reserve_is_a_bounded_amount_of_work() -> None:
    for runtime in (0.0003, 0.001, 0.004, 0.02):
        assert after(runtime).ahead() * runtime <= 4 * AHEAD_SECONDS


def test_the_channel_may_deliver_what_is_unsettled_and_what_fits() -> None:
    channel, prefetch = Channel(), Prefetch(4)
    prefetch.apply(channel, CHEAP, room=4, unsettled=0)
    prefetch.apply(channel, CHEAP, room=1, unsettled=6)
    assert channel.asked == [(0, 4, False), (0, 7, False)]


def test_a_broker_that_has_to_be_asked_is_asked_seldom() -> None:
    channel, prefetch = Channel(), Prefetch(4)
    prefetch.apply(channel, DEAR, room=4, unsettled=0)  # that is what it has already
    prefetch.apply(channel, DEAR, room=1, unsettled=2)
    assert channel.asked == []
    prefetch.apply(channel, DEAR, room=40, unsettled=0)
    prefetch.apply(channel, DEAR, room=10, unsettled=0)
    assert channel.asked == [(0, 40, True)]
    prefetch.apply(channel, DEAR, room=4, unsettled=0)
    assert channel.asked[-1] == (0, 4, True)
