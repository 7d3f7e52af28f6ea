"""Whatever comes in, there is a clear error or a defined outcome, and the queue goes on."""

from __future__ import annotations

import math
import os
from typing import Any

import kombu
import pytest
import sqlalchemy as sa
from kombu import Exchange, Queue

from flask_taskworker import clock
from flask_taskworker.exceptions import (
    ConfigurationError,
    InvalidOptionError,
    MessageTooLargeError,
)
from flask_taskworker.transports.sql import dead_letters
from flask_taskworker.transports.sql.engine import database_for
from flask_taskworker.transports.sql.errors import (
    DatabaseUnusableError,
    QueueNameError,
)

pytestmark = pytest.mark.parametrize(
    "broker",
    [
        "sqlite",
        pytest.param("psycopg", marks=pytest.mark.services),
        pytest.param("pymysql", marks=pytest.mark.services),
    ],
    indirect=True,
)

#: Names that a careless program would trip over.
NAMES = [
    "it's",
    'say "hello"',
    "back`tick",
    "back\\slash\\",
    "'; DROP TABLE taskworker_message; --",
    "1' OR '1'='1",
    "%s %(name)s :name ? {queue} $1",
    "line\nbreak\ttab",
    "naïve ☃ 日本語 🙂",
    "İıẞß",
    "e\u0301",
    "\u200b",
    "../../etc/passwd",
    "🙂" * 255,
    "x" * 255,
]
#: Names that no database of the three keeps unchanged.
REFUSED = ["x" * 256, "🙂" * 256, "nul\0", "\ud800", " before", "after ", "\n"]


def test_hostile_queue_names_are_names_like_any_other(broker):
    channel = broker.connection().channel()
    for name in NAMES:
        Queue(name, routing_key=name)(channel).declare()
        broker.publish(name, queue=name)
    for name in NAMES:
        assert channel.queue_declare(name, passive=True).message_count == 1
    one = broker.receiver(*NAMES)
    assert sorted(one.drain()) == sorted(NAMES)
    one.ack()
    for name in NAMES:
        broker.publish(1, queue=name)
        assert channel.queue_purge(name) == 1
        channel.pause_queue(name)
        channel.queue_delete(name)
        assert not channel._has_queue(name)
    assert broker.count() == 0


def test_hostile_exchanges_and_routing_keys_route_to_their_queue_alone(broker):
    channel = broker.connection().channel()
    producer = kombu.Producer(broker.connection().channel())
    for number, name in enumerate(NAMES):
        for kind in ("direct", "fanout", "topic"):
            exchange = Exchange(f"{name[:240]}{kind}", type=kind)
            Queue(f"{kind}{number}", exchange, routing_key=name)(channel).declare()
    for name in NAMES:
        for kind in ("direct", "fanout", "topic"):
            producer.publish(name, exchange=f"{name[:240]}{kind}", routing_key=name)
    for number, name in enumerate(NAMES):
        for kind in ("direct", "fanout", "topic"):
            assert broker.receiver(f"{kind}{number}").drain() == [name], (kind, name)


@pytest.mark.parametrize(
    "name", REFUSED, ids=["256", "256 wide", "nul", "surrogate", "before", "after", "newline"]
)
def test_a_name_that_no_database_keeps_is_refused_and_nothing_is_written(broker, name):
    connection = broker.connection()
    channel = connection.channel()
    producer = kombu.Producer(channel)
    with pytest.raises(QueueNameError, match=r"must|no valid"):
        producer.publish(1, exchange="", routing_key=name)
    with pytest.raises(QueueNameError):
        channel.queue_declare(name)
    with pytest.raises(QueueNameError):
        Queue("q", Exchange(name, type="topic"), routing_key="k")(channel).declare()
    with pytest.raises(QueueNameError):
        Queue("q", Exchange("x", type="topic"), routing_key=name)(channel).declare()
    with pytest.raises(QueueNameError):
        kombu.Consumer(channel, [Queue(name)], auto_declare=False).consume()
    with pytest.raises(QueueNameError):
        channel.basic_get(name)
    with pytest.raises(QueueNameError):
        producer.publish(1, exchange=name, routing_key="k")
    assert broker.count() == 0
    assert broker.execute("SELECT count(*) FROM {queue} WHERE name <> ?", "q")[0][0] == 0
    broker.publish(1)
    assert broker.receiver().drain() == [1]


@pytest.mark.parametrize("prefix", ["", "a-b", "a'b", 'a"b', "a b", "é", "x" * 41, "1a", "a;--", 5])
def test_a_table_prefix_that_needs_quoting_is_refused_before_anything_happens(broker, prefix):
    connection = broker.connection(table_prefix=prefix)
    with pytest.raises(ConfigurationError, match="table_prefix"):
        connection.channel()


@pytest.mark.only_on("psycopg", "psycopg2")  # only PostgreSQL has schemas
def test_a_schema_with_a_hostile_name_is_quoted(broker, unique):
    schema = f'{unique} "; DROP TABLE x; --'
    quoted = schema.replace('"', '""')
    broker.execute(f'CREATE SCHEMA "{quoted}"')
    try:
        options = {"schema": schema}
        producer = kombu.Producer(broker.connection(**options).channel())
        producer.publish(1, exchange="", routing_key="q")
        one = broker.receiver(**options)
        assert one.drain() == [1]
        one.ack()
        found = broker.execute(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = ?", schema
        )
        assert {name.rsplit("_", 1)[1] for (name,) in found} >= {"message", "queue"}
        one.connection.release()
        producer.connection.release()
        database_for(broker.url, {**broker.options, **options}).dispose()
    finally:
        broker.execute(f'DROP SCHEMA "{quoted}" CASCADE')


@pytest.mark.only_on("psycopg", "psycopg2")
def test_a_missing_schema_is_named(broker):
    connection = broker.connection(schema="no_such_schema")
    with pytest.raises(DatabaseUnusableError, match="no_such_schema"):
        connection.channel().held()
    database_for(broker.url, {**broker.options, "schema": "no_such_schema"}).dispose()


# -- bodies -------------------------------------------------------------------------------


def _send(broker: Any, body: bytes, **options: Any) -> None:
    connection = broker.connection(**options)
    kombu.Producer(connection.channel()).publish(
        body, routing_key="q", content_type="application/data", content_encoding="binary"
    )


def test_bodies_of_nothing_and_of_every_byte_arrive_unchanged(broker):
    bodies = [b"", b"\0", bytes(range(256)) * 16, os.urandom(70_000), b"'\\%s?" * 100]
    for body in bodies:
        _send(broker, body)
    one = broker.receiver()
    one.drain()
    assert [message.body for message in one.messages] == bodies


def test_a_body_of_sixteen_megabytes_arrives_or_the_servers_own_limit_is_named(broker):
    body = bytes(16_000_000)
    try:
        _send(broker, body)
    except MessageTooLargeError as error:
        # A server may be configured for less. It must say so, and nothing be half-written.
        assert broker.database.dialect.name == "mysql"
        assert "max_allowed_packet" in str(error)  # noqa: PT017
        assert broker.count() == 0
        _send(broker, body[:7_000_000])
        body = body[:7_000_000]
    one = broker.receiver()
    one.drain()
    assert one.messages[0].body == body
    one.ack()
    assert broker.count() == 0


def test_a_message_above_the_limit_is_refused_before_anything_is_written(broker):
    with pytest.raises(MessageTooLargeError, match="max_message_bytes=16777216"):
        _send(broker, bytes(16 * 1024 * 1024 + 1))
    with pytest.raises(MessageTooLargeError, match="max_message_bytes=1000"):
        _send(broker, bytes(1001), max_message_bytes=1000)
    producer = kombu.Producer(broker.connection(max_message_bytes=1000).channel())
    with pytest.raises(MessageTooLargeError):
        producer.publish(1, routing_key="q", headers={"big": "x" * 1000})
    if hasattr(producer, "batch"):
        with pytest.raises(MessageTooLargeError), producer.batch(max_size=10):
            producer.publish(1, routing_key="q")
            producer.publish("x" * 1000, routing_key="q")
    assert broker.count() == 0
    assert broker.execute("SELECT count(*) FROM {queue}")[0][0] == 0


def ascii_of(value: Any) -> str:
    """An id for pytest that is short."""
    return ascii(value)[:10]


# -- priorities and times -----------------------------------------------------------------


def test_priorities_out_of_range_count_as_the_nearest_or_none(broker):
    given = {
        -5: 0, 99: 9, 10**30: 9, -(10**30): 0, None: 0, 2.9: 2, True: 1,
        math.inf: 0, math.nan: 0, "7": 7, "urgent": 0,
    }  # fmt: skip
    channel = broker.connection().channel()
    for priority, expected in given.items():
        message = channel.prepare_message(b"%d" % expected, content_encoding="binary")
        message["properties"]["priority"] = priority
        channel.basic_publish(message, "", "q")
    one = broker.receiver()
    one.drain()
    got = [int(message.body) for message in one.messages]
    assert got == sorted(given.values(), reverse=True)
    assert [message.delivery_info["priority"] for message in one.messages] == got


@pytest.mark.parametrize(
    "eta", [math.nan, math.inf, -math.inf, "soon", None, [], 10**400], ids=ascii_of
)
def test_a_time_that_is_none_is_refused(broker, eta):
    with pytest.raises(InvalidOptionError, match="eta_at"):
        broker.publish(1, eta_at=eta)
    assert broker.count() == 0


def test_a_time_long_past_is_now_and_one_far_away_is_kept(broker):
    broker.publish("far", eta_at=1e300)
    for eta in (-1e300, -1, 0, "0", 1e-300):
        broker.publish("now", eta_at=eta)
    one = broker.receiver()
    assert one.drain() == ["now"] * 5
    one.ack()
    assert broker.count() == 1


# -- clocks -------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [3600.0, -3600.0], ids=["forwards", "backwards"])
def test_a_clock_moved_by_an_hour_loses_nothing_and_the_queue_goes_on(broker, monkeypatch, shift):
    channel = broker.connection().channel()
    broker.publish("held", "waiting")
    holder = broker.receiver(prefetch=1)
    holder.connection.drain_events(timeout=0)
    now = broker.database.now()
    broker.publish("in half an hour", eta_at=now + 1800)
    Queue("in use", routing_key="in use", expires=60)(channel).declare()
    reader = broker.receiver("in use")
    real = clock.wall
    held = broker.database.connect()
    broker.database.janitor.expire_queues(held)
    held.close()
    # No heartbeat in between: the next one may be a third of a minute away.
    monkeypatch.setattr(clock, "wall", lambda: real() + shift)

    one = broker.receiver()
    held = broker.database.connect()
    broker.database.janitor.reap(held)
    broker.database.janitor.expire_queues(held)
    held.close()
    # A server has a clock of its own. A file has this host's: what was due within the hour is.
    jumped = broker.database.file is not None and shift > 0
    assert one.drain() == ["waiting", *(["in half an hour"] if jumped else [])]
    broker.publish("new")
    broker.publish("soon", eta_at=broker.database.now() + 2.0)
    assert one.drain()[-1] == "new"
    assert one.wait_for(len(one.messages) + 1)[-1] == "soon"
    holder.messages[0].ack()
    holder.channel.flush()
    assert holder.channel.lost_leases == 0
    one.ack()
    broker.publish("here", queue="in use")
    assert reader.drain() == ["here"]
    assert channel._has_queue("in use")
    reader.ack()
    assert broker.count() == (0 if jumped else 1)


@pytest.mark.only_on("psycopg", "pymysql")  # a file has no clock
@pytest.mark.parametrize("shift", [3600.0, -3600.0], ids=["forwards", "backwards"])
def test_a_servers_clock_moved_by_an_hour_takes_nothing_away(broker, monkeypatch, shift):
    channel = broker.connection().channel()
    broker.publish("held", "waiting")
    holder = broker.receiver(prefetch=1)
    holder.connection.drain_events(timeout=0)
    now = broker.database.now()
    broker.publish("in half an hour", eta_at=now + 1800)
    Queue("in use", routing_key="in use", expires=60)(channel).declare()
    reader = broker.receiver("in use")
    held = broker.database.connect()
    broker.database.janitor.expire_queues(held)
    dialect = type(broker.database.dialect)
    told = dialect.database_time
    monkeypatch.setattr(dialect, "database_time", lambda *args: told(*args) + shift)
    broker.database.keeper.beat()  # reads it
    assert abs(broker.database.now() - now - shift) < 60

    for _ in range(2):
        broker.database.janitor.reap(held)
        broker.database.janitor.expire_queues(held)
    held.close()
    one = broker.receiver()
    assert one.drain() == ["waiting", *(["in half an hour"] if shift > 0 else [])]
    broker.publish("soon", eta_at=broker.database.now() + 0.2)
    assert one.wait_for(len(one.messages) + 1)[-1] == "soon"
    holder.messages[0].ack()
    holder.channel.flush()
    assert holder.channel.lost_leases == 0
    broker.publish("here", queue="in use")
    assert reader.drain() == ["here"]
    assert channel._has_queue("in use")


def test_a_queue_that_nobody_used_for_its_time_expires_also_after_a_jump(broker, monkeypatch):
    channel = broker.connection().channel()
    Queue("unused", expires=0.2)(channel).declare()
    wall, monotonic = clock.wall, clock.monotonic
    monkeypatch.setattr(clock, "wall", lambda: wall() + 3600)
    held = broker.database.connect()
    broker.database.janitor.expire_queues(held)
    monkeypatch.setattr(clock, "wall", lambda: wall() + 3601)
    monkeypatch.setattr(clock, "monotonic", lambda: monotonic() + 1)
    broker.database.janitor.expire_queues(held)
    held.close()
    assert not channel._has_queue("unused")


# -- rows edited by hand ------------------------------------------------------------------

_EDITS = {
    "no json": ("UPDATE {message} SET meta = 'nonsense' WHERE id = ?", "dead"),
    "empty": ("UPDATE {message} SET meta = '' WHERE id = ?", "dead"),
    "a list": ("UPDATE {message} SET meta = '[]' WHERE id = ?", "dead"),
    "null": ("UPDATE {message} SET meta = 'null' WHERE id = ?", "dead"),
    "no properties": ("UPDATE {message} SET meta = '{{}}' WHERE id = ?", "dead"),
    "headers of a wrong kind": (
        'UPDATE {message} SET meta = \'{{"headers":5,"properties":{{}}}}\' WHERE id = ?', "dead",
    ),
    "an unknown type": (
        "UPDATE {message} SET meta = '{{\"headers\":{{\"__type__\":\"no\",\"__value__\":1}},"
        "\"properties\":{{}}}}' WHERE id = ?", "any",
    ),
    "nested without end": ("UPDATE {message} SET meta = ? WHERE id = ?", "dead"),
    "a priority of 99": ("UPDATE {message} SET prio = 99 WHERE id = ?", "delivered"),
    "a negative priority": ("UPDATE {message} SET prio = -99 WHERE id = ?", "delivered"),
    "negative attempts": ("UPDATE {message} SET attempts = -5 WHERE id = ?", "delivered"),
    "countless attempts": ("UPDATE {message} SET attempts = 1000000 WHERE id = ?", "dead"),
    "a time for a ready one": ("UPDATE {message} SET due = 1e300 WHERE id = ?", "delivered"),
    "a time long past": ("UPDATE {message} SET owner = -1, due = -1 WHERE id = ?", "delivered"),
    "no time": ("UPDATE {message} SET owner = -1 WHERE id = ?", "stays"),
    "a state there is not": ("UPDATE {message} SET owner = -77 WHERE id = ?", "stays"),
    "a queue there is not": ("UPDATE {message} SET queue = 987654 WHERE id = ?", "stays"),
    "a consumer there is not": ("UPDATE {message} SET owner = 4711 WHERE id = ?", "freed"),
    "gone": ("DELETE FROM {message} WHERE id = ?", "gone"),
}  # fmt: skip
_SQLITE_EDITS = {
    "attempts in words": ("UPDATE {message} SET attempts = 'many' WHERE id = ?", "delivered"),
    "a priority in words": ("UPDATE {message} SET prio = 'high' WHERE id = ?", "dead"),
    "an owner in words": ("UPDATE {message} SET owner = 'me' WHERE id = ?", "any"),
    "bytes for text": ("UPDATE {message} SET meta = X'FF00' WHERE id = ?", "dead"),
    "text that is none": ("UPDATE {message} SET meta = CAST(X'FF' AS TEXT) WHERE id = ?", "dead"),
    "text for bytes": ("UPDATE {message} SET body = 'text' WHERE id = ?", "dead"),
    "a number for bytes": ("UPDATE {message} SET body = 3 WHERE id = ?", "dead"),
    "a huge number for bytes": ("UPDATE {message} SET body = 1 << 50 WHERE id = ?", "dead"),
    "a time in words": (
        "UPDATE {message} SET owner = -1, due = 'tomorrow' WHERE id = ?", "any",
    ),
}  # fmt: skip


@pytest.mark.parametrize("edit", _EDITS)
def test_a_row_edited_into_nonsense_harms_no_other(broker, edit, caplog):
    edited_row_harms_no_other(broker, _EDITS[edit], caplog)


@pytest.mark.only_on("sqlite")  # a server knows its columns' types
@pytest.mark.parametrize("edit", _SQLITE_EDITS)
def test_a_row_with_values_of_other_types_harms_no_other(broker, edit, caplog):
    edited_row_harms_no_other(broker, _SQLITE_EDITS[edit], caplog)


def edited_row_harms_no_other(broker, edit, caplog):
    sql, fate = edit
    broker.publish("before", "edited", "after")
    row = broker.execute("SELECT id FROM {message} ORDER BY id")[1][0]
    nested = '{"headers":' + "[" * 100_000
    broker.execute(sql, *([nested] if "meta = ?" in sql else []), row)

    one = broker.receiver()
    one.drain()
    held = broker.database.connect()
    broker.database.janitor._free_orphans(held)
    held.close()
    one.drain()
    got = [bytes(message.body).strip(b'"').decode() for message in one.messages]
    assert [body for body in got if body != "edited"] == ["before", "after"]
    one.ack()
    broker.publish("new")
    one.drain()
    one.ack()
    letters = dead_letters.list(broker.database)
    if fate == "dead":
        assert [letter.id for letter in letters] == [row]
        assert letters[0].reason
        assert "becomes a dead letter" in caplog.text
    elif fate in ("delivered", "freed"):
        assert "edited" in got
    elif fate == "stays":
        assert broker.count() == 1
    if fate != "any":
        assert broker.count() == (1 if fate in ("dead", "stays") else 0)


def test_other_tables_edited_into_nonsense(broker):
    channel = broker.connection().channel()
    Queue("a", Exchange("x", type="topic"), routing_key="#")(channel).declare()
    one = broker.receiver("a")
    broker.publish("first", queue="a")
    assert one.drain() == ["first"]
    broker.execute("UPDATE {binding} SET type = ?", "nonsense")
    broker.execute(
        "INSERT INTO {binding} (exchange, rkey, queue, type) VALUES (?, ?, ?, ?)",
        "x", "", 987654, "fanout",
    )  # fmt: skip
    broker.execute(
        "INSERT INTO {consumer} (id, seen, host, pid) VALUES (?, ?, ?, ?)", -5, 1e300, "?", -1
    )
    broker.execute("UPDATE {queue} SET used = ?", 1e300)
    producer = kombu.Producer(broker.connection().channel())
    producer.publish("through x", exchange="x", routing_key="#")
    broker.publish("second", queue="a")
    held = broker.database.connect()
    broker.database.janitor.next_at = 0.0
    broker.database.janitor.run(held)
    held.close()
    assert one.drain()[-1] == "second"
    one.ack()
    assert one.channel.lost_leases == 0


@pytest.mark.parametrize("version", ["banana", "", "1.5", "-"])
def test_a_schema_version_that_is_none_is_a_clear_error(broker, version):
    broker.publish(1)
    broker.execute("UPDATE {meta} SET value = ?", version)
    broker.database.dispose()
    with pytest.raises(DatabaseUnusableError, match="schema_version"):
        broker.connection().channel().held()
    broker.database.dispose()
    engine = sa.create_engine(broker.url.removeprefix("taskworker+"), poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {broker.options['table_prefix']}meta SET value = '1'")
    assert broker.receiver().drain() == [1]
