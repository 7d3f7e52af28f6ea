"""Death, competition and haste, on every database."""

from __future__ import annotations

import os
import time
from collections import Counter

import kombu
import pytest

from flask_taskworker.transports.sql.engine import database_for

HOLD = """
got = []
with kombu.Consumer(connection, [kombu.Queue("q")], on_message=got.append, prefetch_count=8,
                    auto_declare=False):
    while len(got) < 8:
        connection.drain_events(timeout=10)
    print("holding", flush=True)
    sys.stdin.read()
"""

WORK = """
def work(message):
    print(message.decode(), flush=True)
    message.ack()
with kombu.Consumer(connection, [kombu.Queue("q")], on_message=work, prefetch_count=4,
                    auto_declare=False):
    while True:
        try:
            connection.drain_events(timeout=float(arguments[0]))
        except socket.timeout:
            break
connection.release()
"""


def test_a_killed_consumer_loses_nothing_and_a_peer_notices_at_once(broker):
    broker.publish(*range(20))
    holder = broker.spawn(HOLD)
    assert holder.stdout.readline() == "holding\n"
    one = broker.receiver()
    assert len(one.wait_for(12)) == 12
    holder.kill()
    holder.wait()
    killed = time.monotonic()
    assert sorted(one.wait_for(20)) == list(range(20))
    assert time.monotonic() - killed < 5  # the lease is 30 s
    assert [message.properties["delivery_count"] for message in one.messages[12:]] == [2] * 8


def test_kills_at_random_lose_nothing(broker):
    broker.publish(*range(400))
    done: Counter[int] = Counter()
    for _ in range(5):
        worker = broker.spawn(WORK, "20")
        for _ in range(40):
            done[int(worker.stdout.readline())] += 1
        worker.kill()
        worker.wait()
        done.update(int(line) for line in worker.stdout.read().split())
    deadline = time.monotonic() + 40
    while broker.count() and time.monotonic() < deadline:  # it leaves when it is idle
        last = broker.spawn(WORK, "3")
        done.update(int(line) for line in last.communicate(timeout=60)[0].split())
    assert sorted(done) == list(range(400))
    # Acknowledgements that were buffered at the kill run again, never more than that.
    assert sum(done.values()) - 400 <= 5 * (64 + 4)
    assert broker.count() == 0


def test_competing_consumers_share_without_loss_or_duplicate(broker):
    workers = [broker.spawn(WORK, "3") for _ in range(4)]
    producer = kombu.Producer(broker.connection().channel())
    for number in range(600):
        producer.publish(number, exchange="", routing_key="q")
    done = Counter[str]()
    for worker in workers:
        done.update(worker.communicate(timeout=60)[0].split())
    assert set(done) == {str(number) for number in range(600)}
    assert set(done.values()) == {1}
    assert broker.count() == 0


def test_eight_processes_may_create_the_tables_at_once(broker):
    code = (
        "sys.stdin.readline()\n"
        "kombu.Producer(connection.channel()).publish(1, exchange='', routing_key='q')\n"
        "connection.release()\n"
    )
    processes = [broker.spawn(code) for _ in range(8)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0] * 8
    assert broker.count() == 8


def test_forked_children_publish_and_the_parents_connection_lives(broker):
    producer = kombu.Producer(broker.connection().channel())
    producer.publish(0, exchange="", routing_key="q")
    one = broker.receiver()
    pids = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for number in range(50):
                    producer.publish(number, exchange="", routing_key="q")
                status = 0
            finally:
                os._exit(status)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    producer.publish(0, exchange="", routing_key="q")
    assert len(one.wait_for(102)) == 102


def test_a_connection_lost_in_between_is_opened_anew(broker):
    producer = kombu.Producer(broker.connection().channel())
    producer.publish(1, exchange="", routing_key="q")
    producer.channel.held().raw.close()
    with pytest.raises(producer.connection.connection_errors):
        producer.publish(2, exchange="", routing_key="q")
    producer.publish(3, exchange="", routing_key="q")
    assert broker.receiver().drain() == [1, 3]


@pytest.mark.not_on("sqlite")  # a file has no connections to break
def test_a_living_consumer_whose_connections_broke_keeps_its_messages(broker):
    broker.publish(1)
    one = broker.receiver()
    one.drain()
    keeper = broker.database.keeper
    _break_connections(broker, keeper._connection)
    other = broker.spawn(WORK, "2")
    assert other.communicate(timeout=30)[0] == ""
    one.ack()
    assert one.channel.lost_leases == 0
    assert broker.count() == 0


def _break_connections(broker, connection) -> None:
    if broker.database.dialect.name == "postgresql":
        pid = connection.raw.info.backend_pid
        broker.execute("SELECT pg_terminate_backend(?)", pid)
    else:
        broker.execute(f"KILL {connection.raw.thread_id():d}")


@pytest.mark.slow
def test_a_claim_costs_the_same_however_long_the_queue_is(broker):
    one = broker.receiver(prefetch=16)
    channel = broker.connection().channel()

    def fill(count: int) -> None:
        for _start in range(0, count, 1000):
            batch = channel.create_publish_batch(1000)
            for _ in range(1000):
                message = channel.prepare_message(b"x" * 100, content_encoding="binary")
                batch.publish(message, "", "q")
            batch.flush()

    def cost() -> float:
        costs = []
        for _ in range(30):
            start = time.perf_counter()
            one.connection.drain_events(timeout=0)
            costs.append(time.perf_counter() - start)
            for message in one.messages:
                message.ack()
            one.messages.clear()
        return sorted(costs)[len(costs) // 2]

    fill(1000)
    few = cost()
    fill(100_000)
    assert cost() < few * 3 + 0.002


@pytest.mark.not_on("sqlite")  # a file is always reachable
def test_an_unreachable_server_is_an_error_in_time(broker):
    url = broker.database.url.set(port=1).render_as_string(hide_password=False)
    start = time.monotonic()
    with pytest.raises(OSError, match="127"):
        database_for(url, broker.options).connect()
    assert time.monotonic() - start < 6
    database_for(url, broker.options).dispose()
