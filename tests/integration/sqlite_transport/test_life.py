"""Leases, dead consumers, threads, forks and sleeping."""

from __future__ import annotations

import os
import socket
import threading
import time

import kombu
import pytest

from flask_taskworker.transports.sql.dialects.base import Peer
from flask_taskworker.transports.sql.locks import ProcessLocks


def _in_child(work) -> None:
    """Run ``work`` in a forked child and raise if it failed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    deadline = time.monotonic() + 5
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            pytest.fail("the child hangs")
        time.sleep(0.001)
    assert os.waitstatus_to_exitcode(status) == 0


def _counting(held):
    """Count the statements a connection runs."""
    statements: list[str] = []
    held.raw.set_trace_callback(statements.append)
    return statements


def test_messages_of_a_dead_consumer_are_delivered_at_once(broker, receiver):
    broker.publish(1, 2, 3)

    def die_holding() -> None:
        connection = kombu.Connection(broker.url)
        channel = connection.channel()
        assert channel.basic_get("q").decode() == 1
        os._exit(0)

    _in_child(die_holding)
    one = receiver()
    one.connection.transport.wait(one.connection, 5)
    assert sorted(one.drain()) == [1, 2, 3]
    first = next(message for message in one.messages if message.decode() == 1)
    assert first.delivery_info["redelivered"] is True


def test_messages_of_a_living_consumer_are_left_alone(broker, receiver):
    broker.publish(1)
    one = receiver()
    one.drain()
    held = broker.database.connect()
    assert broker.database.janitor.reap(held) == 0
    held.close()


@pytest.mark.parametrize("other", ["option", "scheme", "query"])
def test_one_file_by_two_names_in_one_process_takes_nothing_from_the_living(broker, other):
    broker.publish(1)
    one = broker.connection()
    message = one.channel().basic_get("q")
    url = {
        "option": broker.url,
        "scheme": broker.url.replace("sqlite:", "sqlite+pysqlite:"),
        "query": f"{broker.url}?cached_statements=50",
    }[other]
    options = {"doorbell": False} if other == "option" else {}
    with kombu.Connection(url, transport_options=options) as connection:
        channel = connection.channel()
        database = channel.database
        assert database is not broker.database
        held = channel.held()
        assert database.janitor.reap(held) == 0
        assert channel.basic_get("q") is None
    database.dispose()  # the locks of the other one stay
    assert not _in_child_free(broker, message)
    message.ack()
    message.channel.flush()
    assert message.channel.lost_leases == 0


def _in_child_free(broker, message) -> bool:
    """Whether another process finds the lock of a message's owner free."""
    owner = message.channel.qos.get(message.delivery_tag).owner
    path = broker.database.process_locks._path
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, b"1" if ProcessLocks(path).is_held(owner) else b"0")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    held = os.read(read, 1) == b"1"
    os.close(read)
    os.close(write)
    return not held


def test_a_consumer_whose_registration_was_taken_away_gets_a_new_one(broker, receiver, caplog):
    broker.publish(1, 2)
    one = receiver(prefetch=1)
    one.drain()
    held = broker.database.connect()
    held.execute("DELETE FROM taskworker_consumer")
    held.close()
    broker.database.keeper.beat()
    assert "lost its lease" in caplog.text
    one.channel.basic_qos(0, 2, False)
    assert one.drain() == [2]
    held = broker.database.connect()
    assert broker.database.janitor._free_orphans(held) == 1
    held.close()


def test_a_silent_consumer_loses_its_messages_after_the_lease_by_our_own_clock(
    broker, receiver, monkeypatch
):
    from flask_taskworker import clock

    broker.publish(1)
    held = broker.database.connect()
    held.execute("INSERT INTO taskworker_consumer VALUES (77, 0, 'elsewhere', 1)")
    held.execute("UPDATE taskworker_message SET owner = 77")
    janitor = broker.database.janitor
    monkeypatch.setattr(broker.database.process_locks, "is_held", lambda number: True)
    assert janitor.reap(held) == 0
    now = clock.monotonic()
    monkeypatch.setattr(clock, "monotonic", lambda: now + 31)
    assert janitor.reap(held) == 1
    held.close()


def test_nobody_is_dead_because_the_database_was_away(broker, monkeypatch):
    """Peers could not show that they live, and a server that restarts forgets their locks."""
    janitor, lease = broker.database.janitor, broker.database.options.lease
    monkeypatch.setattr(broker.database.dialect, "free_lock_is_proof", False)
    now = time.monotonic()

    def dead_after(seconds: float, alive: bool | None) -> bool:
        monkeypatch.setattr("flask_taskworker.clock.monotonic", lambda: now + seconds)
        return janitor._is_dead(Peer(7, 100.0, alive))

    for alive in (None, False):
        assert not dead_after(0, alive)
    monkeypatch.setattr("flask_taskworker.clock.monotonic", lambda: now + 10 * lease)
    janitor.lost_touch()  # the last failure before it is back
    assert not dead_after(10 * lease, None)
    assert not dead_after(10 * lease + 1, False)
    assert not dead_after(10.9 * lease, False)
    assert dead_after(11.2 * lease, None), "it said nothing since"


def test_a_clock_set_forward_an_hour_takes_nothing_away(broker, receiver, monkeypatch):
    from flask_taskworker import clock

    broker.publish(1)
    one = receiver()
    one.drain()
    now = clock.wall()
    held = broker.database.connect()
    broker.database.janitor.reap(held)
    for shift in (3600, -3600):
        monkeypatch.setattr(clock, "wall", lambda shift=shift: now + shift)
        assert broker.database.janitor.reap(held) == 0
    held.close()
    assert one.drain() == []


def test_closing_signs_off(broker, receiver):
    broker.publish(1)
    one = receiver()
    one.drain()
    one.connection.release()
    held = broker.database.connect()
    assert held.execute("SELECT count(*) FROM taskworker_consumer").fetchone() == (0,)
    held.close()


def test_a_lock_ends_with_its_process(tmp_path):
    path = str(tmp_path / "locks")
    locks = ProcessLocks(path)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ProcessLocks(path).hold(2**61)
            os.write(write, b"x")
            threading.Event().wait()
        finally:
            os._exit(1)
    os.read(read, 1)
    assert locks.is_held(2**61) is True
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert locks.is_held(2**61) is False
    locks.hold(5)
    locks.close()  # not while it holds one
    assert locks.is_held(5) is True
    locks.drop(5)
    locks.close()
    os.close(read)
    os.close(write)


def test_a_forked_child_opens_its_own_connection_and_keeps_off_its_parents(broker, receiver):
    broker.publish(1, 2)
    one = receiver()
    one.connection.drain_events(timeout=0)
    producer = kombu.Producer(one.channel)

    def publish_and_close() -> None:
        inherited = one.channel._held
        producer.publish(3, exchange="", routing_key="q")
        assert one.channel._held is not inherited
        assert one.channel.qos.tags() == []
        one.connection.release()

    _in_child(publish_and_close)
    for message in one.messages:
        message.ack()
    one.channel.flush()
    assert one.channel.lost_leases == 0
    assert one.drain() == [3]


def test_a_child_forked_while_other_threads_use_the_database_does_not_hang(broker, receiver):
    stop = threading.Event()

    def work() -> None:
        channel = broker.channel()
        while not stop.is_set():
            channel._size("q")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            _in_child(lambda: broker.database.connect().close())
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_children_of_a_publishing_parent_publish_side_by_side(broker):
    producer = kombu.Producer(broker.channel())
    producer.publish(0, exchange="", routing_key="q")
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                for number in range(50):
                    producer.publish(number, exchange="", routing_key="q")
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    producer.publish(0, exchange="", routing_key="q")
    assert broker.count() == 152


def test_an_idle_claim_is_one_read_and_no_transaction(broker, receiver):
    broker.publish(1)
    one = receiver()
    one.drain()
    janitor = broker.database.janitor
    janitor.next_at = float("inf")
    one.channel._consumption._due_check_at = float("inf")
    statements = _counting(one.channel.held())
    with pytest.raises(socket.timeout):
        one.connection.drain_events(timeout=0)
    assert len(statements) == 1
    assert statements[0].startswith("SELECT")


def test_a_publish_is_one_statement(broker):
    channel = broker.channel()
    producer = kombu.Producer(channel)
    producer.publish(0, exchange="", routing_key="q")
    statements = _counting(channel.held())
    producer.publish(1, exchange="", routing_key="q")
    assert len(statements) == 1


def test_a_publish_waits_for_the_disk_only_where_that_was_asked_for(broker):
    for durability, expected in (("full", 2), ("normal", 1)):
        channel = broker.channel(durability=durability)
        kombu.Producer(channel).publish(0, exchange="", routing_key="q")
        assert channel.held().execute("PRAGMA synchronous").fetchone() == (expected,)


def test_waiting_ends_when_somebody_publishes(broker, receiver):
    one = receiver()
    one.drain()
    timer = threading.Timer(0.05, broker.publish, ("x",))
    timer.start()
    start = time.monotonic()
    one.connection.transport.wait(one.connection, 5)
    assert time.monotonic() - start < 2
    assert one.drain() == ["x"]
    timer.join()


def test_waiting_returns_at_once_when_there_is_a_message(broker, receiver):
    one = receiver()
    broker.publish(1)
    start = time.monotonic()
    one.connection.transport.wait(one.connection, 5)
    assert time.monotonic() - start < 1


def test_waiting_writes_settlements_first(broker, receiver):
    broker.publish(1)
    one = receiver(transport_options={"ack_delay": 60})
    one.drain()
    one.messages[0].ack()
    one.connection.transport.wait(one.connection, 0)
    assert broker.count() == 0


def test_waiting_ends_when_the_given_descriptor_is_readable_and_leaves_it(broker, receiver):
    one = receiver()
    read, write = os.pipe()
    os.write(write, b"x")
    start = time.monotonic()
    one.connection.transport.wait(one.connection, 5, read)
    assert time.monotonic() - start < 1
    assert os.read(read, 1) == b"x"
    os.close(read)
    os.close(write)


def test_waiting_with_full_hands_is_ended_by_an_acknowledgement_of_another_thread(broker, receiver):
    broker.publish(1, 2)
    one = receiver(prefetch=1)
    one.drain()
    timer = threading.Timer(0.05, one.messages[0].ack)
    timer.start()
    start = time.monotonic()
    one.connection.drain_events(timeout=5)
    assert time.monotonic() - start < 2
    assert one.bodies() == [1, 2]
    timer.join()


def test_without_a_doorbell_messages_are_found_by_looking(broker, receiver):
    options = {"doorbell": False}
    one = receiver(transport_options=options)
    one.drain()
    timer = threading.Timer(0.02, broker.publish, ("x",))
    timer.start()
    one.connection.drain_events(timeout=5)
    assert one.bodies() == ["x"]
    timer.join()
    one.channel.database.dispose()


def test_draining_without_messages_times_out(broker, receiver):
    one = receiver()
    with pytest.raises(socket.timeout):
        one.connection.drain_events(timeout=0.01)


def test_a_publish_in_the_callers_transaction_appears_with_its_commit(broker, receiver):
    import sqlalchemy as sa

    one = receiver()
    channel = broker.channel()
    channel.held().close()
    engine = sa.create_engine(f"sqlite:///{broker.path}")

    def publish(connection: sa.Connection, body: str) -> None:
        message = channel.prepare_message(body, content_type="text/plain", content_encoding="utf-8")
        channel.publish_in(connection, message, "brand new")

    with engine.connect() as connection:
        publish(connection, "no")
        connection.rollback()
        publish(connection, "yes")
        assert one.drain() == []
        connection.commit()
    engine.dispose()
    channel.wake_consumers()
    assert receiver("brand new").drain() == ["yes"]
