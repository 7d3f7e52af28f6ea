"""Death, competition and haste, on every database."""

from __future__ import annotations

import contextlib
import os
import queue as queue_module
import threading
import time
from collections import Counter
from collections.abc import Iterable

import kombu
import pytest
from kombu import Exchange, Queue

from flask_taskworker.transports.sql import janitor as janitor_module
from flask_taskworker.transports.sql.engine import database_for
from support.waiting import wait_until

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


CREATE = """
from flask_taskworker.transports.sql.engine import database_for
url, options = connection.transport.url, connection.transport_options
for _ in range(3):
    database = database_for(url, options)
    print("ready", flush=True)
    start = float(sys.stdin.readline())
    while time.monotonic() < start:
        pass
    database.connect().close()  # nobody tries again here
    with connection.clone() as own:
        kombu.Producer(own.channel()).publish(1, exchange="", routing_key="q")
    database.dispose()
    print("done", flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_eight_processes_may_create_the_tables_at_once_three_times(broker):
    processes = [broker.spawn(CREATE) for _ in range(8)]
    for _ in range(3):
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 8
        start = time.monotonic() + 0.1
        for process in processes:
            process.stdin.write(f"{start}\n")
            process.stdin.flush()
        assert [process.stdout.readline() for process in processes] == ["done\n"] * 8
        assert broker.count() == 8
        for table in reversed(broker.database.dialect.names):
            broker.execute(f"DROP TABLE {table}")
        broker.database.dispose()
    assert [process.wait(60) for process in processes] == [0] * 8


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
        return min(costs)  # what others do on this machine is no cost of ours

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


# -- queues that end ----------------------------------------------------------------------


def test_what_a_dead_consumer_held_of_a_deleted_queue_goes_with_it(broker):
    broker.publish(*range(8))
    holder = broker.spawn(HOLD)
    assert holder.stdout.readline() == "holding\n"
    broker.connection().channel().queue_delete("q")
    assert broker.count() == 8  # whoever holds one may still settle it
    holder.kill()
    holder.wait()
    held = broker.database.connect()
    wait_until(lambda: broker.database.janitor.reap(held) == 8, "its death is noticed", 20)
    broker.database.janitor._free_orphans(held)
    held.close()
    assert broker.count() == 0


USE = """
queue = kombu.Queue("mine", kombu.Exchange("x", type="fanout"), expires=1.0)
def work(message):
    message.ack()
    print(message.payload, flush=True)
with kombu.Consumer(connection, [queue], on_message=work):
    print("using", flush=True)
    while True:
        connection.drain_events()
"""


def test_a_queue_expires_when_its_last_consumer_is_dead_and_not_before(broker):
    user = broker.spawn(USE)
    assert user.stdout.readline() == "using\n"
    channel = broker.connection().channel()
    Queue("unused", expires=1.0)(channel).declare()
    onlooker = broker.receiver("another")  # somebody must look after what is nobody's
    exchange = kombu.Producer(channel, exchange=Exchange("x", type="fanout"))

    def gone(queue: str) -> bool:
        onlooker.drain()
        return not channel._has_queue(queue)

    wait_until(lambda: gone("unused"), "the unused one is gone", 30)
    for number in range(3):  # the other one is older, and still there with its binding
        exchange.publish(number)
        assert user.stdout.readline() == f"{number}\n"
    assert not gone("mine")
    user.kill()
    user.wait()
    wait_until(lambda: gone("mine"), "nobody uses the other one any more", 30)
    assert channel.list_bindings() == []


@pytest.mark.parametrize("moment", ["delete", "declare"])
def test_a_queue_that_is_used_again_as_it_expires_is_there(broker, monkeypatch, moment):
    channel = broker.connection().channel()
    queue = Queue("late", Exchange("x", type="fanout"), expires=0.05)
    queue(channel).declare()
    time.sleep(0.1)  # the time after which it may go
    janitor, other = broker.database.janitor, broker.database.connect()
    if moment == "delete":  # used between the janitor's look and its deletion
        look = other.execute(
            broker.database.dialect.expired_queues, (broker.database.now(),)
        ).fetchall()
        assert len(look) == 1
        delete = janitor_module.delete_queue

        def late(*args: object, **kwargs: object) -> bool:
            Queue("late", Exchange("x", type="fanout"), expires=60)(channel).declare()
            return bool(delete(*args, **kwargs))

        monkeypatch.setattr(janitor_module, "delete_queue", late)
        janitor.expire_queues(other)
    else:  # gone between the declaration's look and its note
        note = channel._note_expiry

        def noted(*args: object) -> bool:
            monkeypatch.undo()
            janitor.expire_queues(other)
            return bool(note(*args))

        monkeypatch.setattr(channel, "_note_expiry", noted)
        Queue("late", Exchange("x", type="fanout"), expires=60)(channel).declare()
    other.close()
    kombu.Producer(channel, exchange=Exchange("x", type="fanout")).publish("hear")
    assert broker.receiver("late").drain() == ["hear"]


PAUSED = """
def work(message):
    print(message.payload, flush=True)
    time.sleep(0.002)  # the work
    message.ack()
with kombu.Consumer(connection, [kombu.Queue("q"), kombu.Queue("other")], on_message=work,
                    prefetch_count=2, auto_declare=False):
    while True:
        connection.drain_events()
"""


def test_a_pause_is_seen_by_busy_and_by_sleeping_consumers_of_other_processes(broker):
    consumers = [broker.spawn(PAUSED) for _ in range(2)]
    got: queue_module.Queue[int] = queue_module.Queue()

    def read(lines: Iterable[str]) -> None:
        for line in lines:
            got.put(int(line))

    for consumer in consumers:
        threading.Thread(target=read, args=(consumer.stdout,), daemon=True).start()
    channel = broker.connection().channel()
    batch = channel.create_publish_batch(1000)
    for number in range(2000):
        message = channel.prepare_message(
            str(number), content_type="application/json", content_encoding="utf-8"
        )
        batch.publish(message, "", "q")
    batch.flush()
    seen = {got.get(timeout=30) for _ in range(20)}
    channel.pause_queue("q")  # both are busy with it
    with contextlib.suppress(queue_module.Empty):
        while True:
            seen.add(got.get(timeout=0.7))  # they look every quarter of a second
    assert channel.queue_declare("q", passive=True).message_count == 2000 - len(seen) > 0
    broker.publish(9000)
    broker.publish(9001, queue="other")  # another queue goes on
    assert got.get(timeout=30) == 9001
    assert got.empty()
    channel.pause_queue("q", False)  # both are asleep
    resumed = time.monotonic()
    seen.add(got.get(timeout=30))
    assert time.monotonic() - resumed < 4  # the longest sleep is five seconds
    while len(seen) < 2001:
        seen.add(got.get(timeout=30))
    assert got.empty()
