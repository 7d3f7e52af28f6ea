"""Pools: run what they are given, say what became of it, give back what has not started."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from flask_taskworker.worker.delivery import Delivery, Outcome, Settlement
from flask_taskworker.worker.pools.solo import SoloPool
from flask_taskworker.worker.pools.threads import ThreadPool
from support import deliver, wait_until

DONE = Outcome(Settlement.ACKNOWLEDGE)


class Work:
    """Runs that begin and end when the test says so."""

    def __init__(self) -> None:
        self.started: list[Delivery] = []
        self.threads: set[str] = set()
        self.rung = 0
        self._may_end = threading.Semaphore(0)
        self._lock = threading.Lock()

    def run(self, delivery: Delivery) -> Outcome:
        with self._lock:
            self.started.append(delivery)
            self.threads.add(threading.current_thread().name)
        assert self._may_end.acquire(timeout=5)
        return Outcome(Settlement.ACKNOWLEDGE, reason=delivery.message.id)

    def end(self, count: int = 1) -> None:
        self._may_end.release(count)

    def ring(self) -> None:
        with self._lock:
            self.rung += 1


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def pool(work: Work) -> Iterator[ThreadPool]:
    pool = ThreadPool(2, work.run, work.ring)
    yield pool
    pool.stop()
    work.end(100)
    for thread in pool._threads:
        thread.join(5)
        assert not thread.is_alive()


def submit(pool: ThreadPool, count: int) -> list[Delivery]:
    deliveries = [deliver("t", id=f"id-{number}") for number in range(count)]
    for delivery in deliveries:
        pool.submit(delivery)
    return deliveries


def collect(pool: ThreadPool, count: int) -> list[tuple[Delivery, Outcome]]:
    ended: list[tuple[Delivery, Outcome]] = []

    def enough() -> bool:
        ended.extend(pool.finished())
        return len(ended) >= count

    wait_until(enough, f"{count} runs ended")
    return ended


def test_a_fresh_pool_is_empty_and_has_no_threads(pool: ThreadPool) -> None:
    assert (pool.size, pool.load(), pool.waiting()) == (2, 0, 0)
    assert (pool.finished(), pool.withdraw(), pool.running()) == ([], [], [])
    assert pool._threads == []


def test_a_delivery_comes_back_with_its_outcome(pool: ThreadPool, work: Work) -> None:
    (delivery,) = submit(pool, 1)
    work.end()
    ((ended, outcome),) = collect(pool, 1)
    assert ended is delivery
    assert outcome.reason == "id-0"
    assert pool.finished() == []
    wait_until(lambda: work.rung == 1, "the consumer is woken")


def test_no_more_run_at_once_than_there_are_slots(pool: ThreadPool, work: Work) -> None:
    deliveries = submit(pool, 5)
    wait_until(lambda: len(pool.running()) == 2, "two runs")
    assert pool.running() == deliveries[:2]
    assert (pool.load(), pool.waiting()) == (5, 3)
    work.end(3)
    assert len(collect(pool, 3)) == 3
    wait_until(lambda: len(work.started) == 5, "the rest started")
    work.end(2)
    collect(pool, 2)
    assert work.started == deliveries  # in their order
    assert work.threads == {"taskworker-pool-1", "taskworker-pool-2"}
    assert (pool.load(), pool.waiting()) == (0, 0)


def test_threads_are_made_when_they_are_needed(pool: ThreadPool, work: Work) -> None:
    submit(pool, 1)
    assert len(pool._threads) == 1
    work.end()
    collect(pool, 1)
    submit(pool, 1)  # the thread that is idle takes it
    assert len(pool._threads) == 1
    work.end()
    collect(pool, 1)


def test_what_ended_is_no_load_even_before_it_is_collected(pool: ThreadPool, work: Work) -> None:
    submit(pool, 2)
    work.end()
    wait_until(lambda: work.rung == 1, "one run ended")
    assert pool.load() == 1
    work.end()
    wait_until(lambda: work.rung == 2, "both runs ended")
    assert pool.load() == 0
    assert len(pool.finished()) == 2
    assert pool.load() == 0


def test_what_has_not_started_is_given_back(pool: ThreadPool, work: Work) -> None:
    deliveries = submit(pool, 5)
    wait_until(lambda: len(pool.running()) == 2, "two runs")
    assert pool.withdraw() == deliveries[2:]
    assert (pool.load(), pool.waiting()) == (2, 0)
    assert pool.withdraw() == []
    work.end(2)
    assert {delivery.message.id for delivery, _ in collect(pool, 2)} == {"id-0", "id-1"}
    assert len(work.started) == 2


def test_a_stopped_pool_ends_its_threads_after_their_runs(pool: ThreadPool, work: Work) -> None:
    submit(pool, 2)
    wait_until(lambda: len(pool.running()) == 2, "two runs")
    pool.stop()
    assert len(pool.running()) == 2
    work.end(2)
    collect(pool, 2)
    wait_until(lambda: not any(thread.is_alive() for thread in pool._threads), "no thread left")


def test_threads_of_a_pool_do_not_keep_a_program_alive(pool: ThreadPool, work: Work) -> None:
    submit(pool, 1)
    assert all(thread.daemon for thread in pool._threads)


def test_many_deliveries_from_one_consumer_all_come_back() -> None:
    woken = threading.Event()
    pool = ThreadPool(4, lambda delivery: DONE, woken.set)
    template = deliver("t")
    deliveries = [
        Delivery(template.raw, template.message, template.queue, epoch) for epoch in range(500)
    ]
    for delivery in deliveries:
        pool.submit(delivery)
    ended = collect(pool, 500)
    assert sorted(delivery.epoch for delivery, _ in ended) == list(range(500))
    assert pool.load() == 0
    assert woken.is_set()
    pool.stop()


def test_a_solo_pool_runs_in_the_callers_thread() -> None:
    threads: list[Any] = []

    def run(delivery: Delivery) -> Outcome:
        threads.append(threading.current_thread())
        return DONE

    pool = SoloPool(run)
    first, second = deliver("t"), deliver("t")
    pool.submit(first)
    pool.submit(second)
    assert threads == [threading.current_thread()] * 2
    assert pool.finished() == [(first, DONE), (second, DONE)]
    assert (pool.finished(), pool.withdraw(), pool.running()) == ([], [], [])
    assert (pool.size, pool.load(), pool.waiting()) == (1, 0, 0)
    pool.stop()
