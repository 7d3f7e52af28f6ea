"""What made SQL queues slow or wrong elsewhere, each shown on the real database, and avoided."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import kombu
import pytest
import sqlalchemy as sa
from kombu import Queue

from flask_taskworker.transports.sql import dead_letters
from flask_taskworker.transports.sql.connection import HeldConnection
from flask_taskworker.transports.sql.dialects import sqlite
from flask_taskworker.transports.sql.engine import database_for
from flask_taskworker.transports.sql.errors import (
    DatabaseUnavailableError,
    DatabaseUnusableError,
)
from flask_taskworker.transports.sql.schema import build_tables, include_object
from support.waiting import wait_until

SQLITE = "sqlite"
POSTGRESQL = pytest.param("psycopg", marks=pytest.mark.services)
MARIADB = pytest.param("pymysql", marks=pytest.mark.services)

all_databases = pytest.mark.parametrize("broker", [SQLITE, POSTGRESQL, MARIADB], indirect=True)
servers = pytest.mark.parametrize("broker", [POSTGRESQL, MARIADB], indirect=True)
only_sqlite = pytest.mark.parametrize("broker", [SQLITE], indirect=True)
only_postgresql = pytest.mark.parametrize("broker", [POSTGRESQL], indirect=True)
only_mariadb = pytest.mark.parametrize("broker", [MARIADB], indirect=True)

_FILL = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count}) "
    "INSERT INTO {table} (queue, prio, owner, attempts, due, meta, body) "
    "SELECT {queue}, 9, {owner}, 0, {due}, '{{}}', X'00' FROM n",
    "postgresql": "INSERT INTO {table} (queue, prio, owner, attempts, due, meta, body) "
    "SELECT {queue}, 9, {owner}, 0, {due}, '{{}}', '' FROM generate_series(1, {count})",
    "mysql": "INSERT INTO {table} (queue, prio, owner, attempts, due, meta, body) "
    "SELECT {queue}, 9, {owner}, 0, {due}, '{{}}', '' FROM seq_1_to_{count}",
}


def fill(broker: Any, count: int, owner: int = 0, due: str = "NULL", queue: int = 1) -> None:
    """Store messages by the thousand, in the database itself."""
    dialect = broker.database.dialect
    held = broker.database.connect()
    held.execute(
        _FILL[dialect.name].format(
            table=dialect.names.message, count=count, owner=owner, due=due, queue=queue
        )
    )
    held.close()


def queue_id(broker: Any, name: str = "q") -> int:
    return int(broker.execute("SELECT id FROM {queue} WHERE name = ?", name)[0][0])


def claim_cost(broker: Any, claims: int = 40) -> float:
    """What a claim of 16 takes in the quieter moments, in seconds."""
    dialect = broker.database.dialect
    held = broker.database.connect()
    queue = queue_id(broker)
    costs = []
    for _ in range(claims):
        started = time.perf_counter()
        rows = held.transaction(lambda: dialect.claim(held, 77, queue, 16))
        costs.append(time.perf_counter() - started)
        assert len(rows) == 16
        dialect.delete_owned(held, 77, [row.id for row in rows])
    held.close()
    return sorted(costs)[len(costs) // 4]


def plan(held: HeldConnection, sql: str, params: Any = ()) -> str:
    """How the database would run a statement, as one text."""
    explain = "EXPLAIN QUERY PLAN " if held.database.dialect.name == "sqlite" else "EXPLAIN "
    return "\n".join(str(tuple(row)) for row in held.execute(explain + sql, params).fetchall())


# -- PostgreSQL ---------------------------------------------------------------------------


@only_postgresql
@pytest.mark.parametrize("statistics", ["none", "of the empty table"])
def test_a_claim_from_a_backlog_that_the_planner_knows_nothing_of_is_cheap(broker, statistics):
    Queue("q", routing_key="q")(broker.connection().channel()).declare()
    broker.execute("ALTER TABLE {message} SET (autovacuum_enabled = false)")
    if statistics != "none":
        broker.execute("ANALYZE {message}")
    fill(broker, 1_000, queue=queue_id(broker))
    few = claim_cost(broker)
    fill(broker, 100_000, queue=queue_id(broker))
    many = claim_cost(broker)
    dialect = broker.database.dialect
    held = broker.database.connect()
    pinned = plan(held, dialect._claim, (77, queue_id(broker), 16))
    for setting in ("enable_sort", "enable_bitmapscan", "enable_seqscan"):
        held.execute(f"RESET {setting}")
    free = plan(held, dialect._claim, (77, queue_id(broker), 16))
    held.close()
    assert "ready_part" in pinned
    assert "Sort" not in pinned
    # The trap: left to itself, the planner reads by bitmap what it knows nothing of.
    assert "Bitmap" in free
    assert "Bitmap" not in pinned
    assert many < 4 * few + 0.002, f"{few * 1000:.2f} ms, then {many * 1000:.2f} ms"


@only_postgresql
def test_a_long_report_makes_claims_dearer_until_it_ends_and_loses_none(broker):
    broker.publish("first")
    broker.execute("ALTER TABLE {message} SET (autovacuum_enabled = false)")
    fill(broker, 1_000, queue=queue_id(broker))
    before = claim_cost(broker)
    count = f"SELECT count(*) FROM {broker.database.dialect.names.message}"
    engine = sa.create_engine(broker.url.removeprefix("taskworker+"), poolclass=sa.NullPool)
    with engine.connect() as report:
        report = report.execution_options(isolation_level="REPEATABLE READ")
        seen = report.exec_driver_sql(count).scalar_one()
        fill(broker, 16_000, queue=queue_id(broker))
        claim_cost(broker, 900)
        broker.execute("VACUUM {message}")  # in vain: the report may still ask for the rows
        during = claim_cost(broker)
        assert report.exec_driver_sql(count).scalar_one() == seen
    engine.dispose()
    broker.execute("VACUUM {message}")
    after = claim_cost(broker)
    figures = f"{before * 1000:.2f} ms, {during * 1000:.2f} ms, {after * 1000:.2f} ms"
    assert during > 2 * before, f"the trap does not show: {figures}"
    assert during < 0.2, figures
    assert after < during / 2, figures
    assert broker.count() == 1 + 1_000 + 16_000 - (40 + 900 + 40 + 40) * 16


@only_postgresql
def test_publishers_wait_for_the_disk_and_consumers_do_not(broker):
    channel = broker.connection(durability="full").channel()
    kombu.Producer(channel).publish(1, routing_key="q")
    show = "SHOW synchronous_commit"
    assert channel.publishing().execute(show).fetchone()[0] == "on"
    one = broker.receiver()
    assert one.drain() == [1]
    assert one.channel.held().execute(show).fetchone()[0] == "off"


# -- MariaDB ------------------------------------------------------------------------------


@only_mariadb
def test_every_connection_is_read_committed_whatever_the_server_says(broker):
    engine = sa.create_engine(broker.url.removeprefix("taskworker+"), poolclass=sa.NullPool)
    with engine.connect() as connection:
        default = connection.exec_driver_sql("SELECT @@tx_isolation").scalar_one()
    assert default == "REPEATABLE-READ"
    one = broker.receiver()
    one.drain()
    broker.publish(1)
    one.drain()
    kinds = {
        held.execute("SELECT @@tx_isolation").fetchone()[0]
        for held in list(broker.database._connections)
        if held.usable and held is not broker.database.keeper._connection  # of its own thread
    }
    assert kinds == {"READ-COMMITTED"}


@only_mariadb
@pytest.mark.parametrize("trap", [True, False], ids=["trap", "avoided"])
def test_publishing_is_not_locked_out_by_an_open_update_of_a_range(broker, trap):
    broker.publish(*range(20), eta_at=broker.database.now() + 3600)
    message = broker.database.dialect.names.message
    held = broker.database.connect(busy_timeout=1)
    due = broker.database.now() + 7200
    if trap:
        held.execute("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        held.begin()
        held.execute(
            f"UPDATE {message} SET owner = 0, due = NULL WHERE owner = -1 AND due <= %s", (due,)
        )
    else:
        held.begin()
        found = held.execute(broker.database.dialect.select_due, (due,)).fetchall()
        ids = broker.database.dialect.ids(row[0] for row in found)
        held.execute(
            f"UPDATE {message} SET owner = 0, due = NULL WHERE owner = -1 AND id IN ({ids})"
        )
    producer = kombu.Producer(broker.connection(busy_timeout=1).channel())
    later = {"eta_at": broker.database.now() + 1800}
    if trap:
        with pytest.raises(DatabaseUnavailableError, match="locked by another session for 1 s"):
            producer.publish("meanwhile", exchange="", routing_key="q", **later)
    else:
        producer.publish("meanwhile", exchange="", routing_key="q", **later)
        producer.publish("meanwhile", exchange="", routing_key="q")
    held.rollback()
    held.close()
    assert broker.count() == (20 if trap else 22)


@only_mariadb
def test_a_claim_looks_beyond_candidates_that_others_have_locked(broker):
    broker.publish(*range(40))
    dialect = broker.database.dialect
    other, held = broker.database.connect(), broker.database.connect()
    other.begin()
    assert len(dialect.select_ready(other, queue_id(broker), 32)) == 32
    # The first four candidates, and the next, are all taken.
    rows = held.transaction(lambda: dialect.claim(held, 77, queue_id(broker), 1))
    other.rollback()  # before anything fails: the tables could not be dropped
    other.close()
    held.close()
    assert len(rows) == 1


@only_mariadb
@pytest.mark.parametrize("count", [1, 4, 300])
def test_the_order_is_kept_however_short_the_table_is(broker, count):
    producer = kombu.Producer(broker.connection().channel())
    for priority in [0, *[5] * (count - 1), 9]:
        producer.publish(priority, routing_key="q", priority=priority)
    dialect = broker.database.dialect
    held = broker.database.connect()
    shown = plan(held, dialect._select_ready, (queue_id(broker), 4, 1))
    held.close()
    assert "join buffer" not in shown
    assert "eq_ref" in shown
    one = broker.receiver(prefetch=1)
    one.connection.drain_events(timeout=0)
    assert one.messages[0].payload == 9


@only_mariadb
def test_a_claim_stays_cheap_while_deleted_messages_are_not_purged(broker):
    broker.publish("first")
    dialect, queue = broker.database.dialect, queue_id(broker)
    # What one would write first: a locking scan, which walks over every deleted entry.
    scan = (
        f"SELECT id, queue, prio, attempts, meta, body FROM {dialect.names.message} "
        f"WHERE queue = {queue} AND owner = 0 ORDER BY prio, id LIMIT 16 FOR UPDATE SKIP LOCKED"
    )
    held = broker.database.connect()
    costs: dict[str, list[float]] = {"ours": [], "scan": []}

    def claim(how: str) -> None:
        held.begin()
        started = time.perf_counter()
        rows = (
            dialect.select_ready(held, queue, 16)
            if how == "ours"
            else held.execute(scan).fetchall()
        )
        costs[how].append(time.perf_counter() - started)
        assert len(rows) == 16
        dialect.delete_ids(held, [row[0] for row in rows])
        held.commit()

    engine = sa.create_engine(broker.url.removeprefix("taskworker+"), poolclass=sa.NullPool)
    with engine.connect() as report:
        report.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        report.exec_driver_sql("START TRANSACTION WITH CONSISTENT SNAPSHOT")
        fill(broker, 12_000, queue=queue)
        for _ in range(300):
            for how in costs:
                claim(how)
        report.rollback()
    engine.dispose()
    held.close()
    ours, naive = (sorted(cost[-100:])[50] for cost in costs.values())
    assert naive > 2 * ours, f"a scan {naive * 1000:.2f} ms, ours {ours * 1000:.2f} ms"


@only_mariadb
def test_a_batch_is_a_few_statements_with_many_rows_each(broker):
    channel = broker.connection().channel()
    held = channel.publishing()

    def inserts() -> int:
        row = held.execute("SHOW SESSION STATUS LIKE 'Com_insert'").fetchone()
        return int(row[1])

    batch = channel.create_publish_batch(500)
    for _ in range(499):
        batch.publish(channel.prepare_message(b"x", content_encoding="binary"), "", "q")
    broker.publish(1)  # the queue is there
    before = inserts()
    batch.flush()
    assert inserts() - before <= 3
    assert broker.count() == 500


# -- deadlocks ----------------------------------------------------------------------------


@servers
def test_the_victim_of_a_deadlock_runs_again_and_both_succeed(broker):
    broker.publish("a", "b")
    first, second = (row[0] for row in broker.execute("SELECT id FROM {message} ORDER BY id"))
    meet = threading.Barrier(2, timeout=20)
    attempts = Counter[int]()
    failures: list[BaseException] = []

    def change(mine: int, other: int) -> None:
        held = broker.database.connect()
        update = broker.database.dialect.sql(
            "UPDATE {message} SET attempts = attempts + 1 WHERE id = ?"
        )

        def work() -> None:
            attempts[mine] += 1
            held.execute(update, (mine,))
            if attempts[mine] == 1:
                meet.wait()
            held.execute(update, (other,))

        try:
            held.transaction(work)
        except BaseException as error:
            failures.append(error)
        finally:
            held.close()

    threads = [threading.Thread(target=change, args=pair) for pair in
               ((first, second), (second, first))]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert sum(attempts.values()) >= 3  # the trap: one of them was undone
    assert broker.execute("SELECT attempts FROM {message} ORDER BY id") == _rows(broker, 2, 2)


def _rows(broker: Any, *values: int) -> Any:
    return [type(row)([value]) for row, value in zip(
        broker.execute("SELECT id FROM {message} ORDER BY id"), values, strict=True
    )]  # fmt: skip


class _Unlucky:
    """A cursor whose every tenth statement is the victim of a deadlock."""

    chance = random.Random(7)
    hits = 0

    def __init__(self, cursor: Any, error: Exception) -> None:
        self._cursor = cursor
        self._error = error

    def execute(self, sql: str, params: Any = ()) -> Any:
        verb = sql.split(None, 1)[0]
        if verb not in ("BEGIN", "ROLLBACK", "SET", "SHOW") and self.chance.random() < 0.1:
            type(self).hits += 1
            raise self._error
        return self._cursor.execute(sql, params)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)


@servers
def test_deadlocks_at_every_tenth_statement_lose_and_double_nothing(broker, monkeypatch):
    broker.publish("the tables are there")
    if broker.database.dialect.name == "postgresql":
        import psycopg

        error: Exception = psycopg.errors.SerializationFailure("made up")
    else:
        import pymysql

        error = pymysql.err.OperationalError(1213, "made up")
    original = HeldConnection.__init__

    def unlucky(self: HeldConnection, *args: Any) -> None:
        original(self, *args)
        self._cursor = _Unlucky(self._cursor, error)

    monkeypatch.setattr(HeldConnection, "__init__", unlucky)
    producer = kombu.Producer(broker.connection().channel())
    for number in range(100):
        producer.publish(number, routing_key="q")
    if hasattr(producer, "batch"):
        with producer.batch(max_size=10):
            for number in range(100, 200):
                producer.publish(number, routing_key="q")
    one = broker.receiver(prefetch=7)
    got: list[Any] = []
    while new := one.drain():
        got += new
        one.ack()
    monkeypatch.undo()
    assert _Unlucky.hits > 20
    assert got[1:] == list(range(len(got) - 1))
    assert len(got) in (101, 201)
    assert broker.count() == 0


# -- partial indexes ----------------------------------------------------------------------


@all_databases
def test_every_search_of_the_messages_uses_the_index_made_for_it(broker):
    Queue("q", routing_key="q")(broker.connection().channel()).declare()
    for owner, due in ((0, "NULL"), (-1, "1e12"), (-2, "NULL"), (4711, "NULL")):
        fill(broker, 500, owner, due, queue_id(broker))
    broker.execute("ANALYZE TABLE {message}" if _name(broker) == "mysql" else "ANALYZE")
    dialect, message = broker.database.dialect, broker.database.dialect.names.message
    partial = _name(broker) != "mysql"
    ready, due = ("ready_part", "due_part") if partial else ("ready_full", "due_full")
    pick = f"SELECT id FROM {message} WHERE queue = %d AND owner = 0 ORDER BY prio, id LIMIT 16"
    searches = {
        pick % queue_id(broker): ready,
        dialect.next_due: due,
        dialect.sql(dialect.select_due.replace("?", "1.0").replace("%s", "1.0")): due,
        f"SELECT id FROM {message} WHERE owner > 0 AND owner = 4711": "owned_part",
        f"DELETE FROM {message} WHERE owner = 0 AND queue = {queue_id(broker)}": ready,
        f"SELECT id FROM {message} WHERE owner = -2 AND id > 3 ORDER BY id LIMIT 5": "dead_part",
    }
    held = broker.database.connect()
    assert len(dialect.owned_by(held, 4711)) == 500
    for sql, index in searches.items():
        if not partial and index not in (ready, due):
            continue
        shown = plan(held, sql)
        assert index in shown, f"{sql}\n{shown}"
        assert "SCAN" not in shown.replace("USING", "").split(index)[0] or "SEARCH" in shown, shown
    if _name(broker) == "sqlite":
        # The trap: a condition that only implies the index's own does not use it.
        assert "due_part" not in plan(held, f"SELECT min(due) FROM {message} WHERE owner < 0")
        assert "owned_part" not in plan(held, f"SELECT id FROM {message} WHERE owner = 4711")
    held.close()


def _name(broker: Any) -> str:
    return str(broker.database.dialect.name)


@all_databases
def test_a_claim_costs_the_same_with_100_000_delayed_messages(broker):
    Queue("q", routing_key="q")(broker.connection().channel()).declare()
    fill(broker, 2_000, queue=queue_id(broker))
    before = claim_cost(broker)
    fill(broker, 100_000, -1, "1e12", queue_id(broker))
    assert claim_cost(broker) < 4 * before + 0.003
    held = broker.database.connect()
    started = time.perf_counter()
    for _ in range(20):
        assert held.execute(broker.database.dialect.next_due).fetchone()[0] == 1e12
    assert (time.perf_counter() - started) / 20 < 0.01
    held.close()


# -- operations ---------------------------------------------------------------------------


@only_postgresql
def test_a_role_that_may_create_nothing_works_with_tables_that_are_there(broker, unique):
    role, prefix = f"{unique}_role", broker.options["table_prefix"]
    url = broker.database.url.set(username=role, password="x").render_as_string(hide_password=False)
    options = {"table_prefix": prefix, "create_tables": False}
    broker.execute("SELECT 1")
    admin = sa.create_engine(
        broker.url.removeprefix("taskworker+"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool
    )
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
        try:
            for name in broker.database.dialect.names:
                connection.exec_driver_sql(
                    f"GRANT SELECT, INSERT, UPDATE, DELETE ON {name} TO {role}"
                )
            for name in ("queue", "message"):
                connection.exec_driver_sql(
                    f"GRANT USAGE ON SEQUENCE {prefix}{name}_id_seq TO {role}"
                )
            with kombu.Connection(f"taskworker+{url}", transport_options=options) as restricted:
                kombu.Producer(restricted.channel()).publish(1, routing_key="q")
                message = restricted.channel().basic_get("q")
                assert message.payload == 1
                message.ack()
            assert broker.count() == 0
            database_for(url, options).dispose()
            # Where there are no tables, both say what is missing.
            missing = {"table_prefix": f"{unique}x_"}
            with pytest.raises(DatabaseUnusableError, match=f"no tables {unique}x_"):
                database_for(url, {**missing, "create_tables": False}).connect()
            database_for(url, missing).dispose()
            with pytest.raises(DatabaseUnusableError, match="permission denied"):
                database_for(url, missing).connect()
            database_for(url, missing).dispose()
        finally:
            connection.exec_driver_sql(f"DROP OWNED BY {role}")
            connection.exec_driver_sql(f"DROP ROLE {role}")


@all_databases
def test_tables_of_a_newer_program_are_refused_and_left_alone(broker):
    broker.publish(1)
    broker.execute("UPDATE {meta} SET value = ?", "2")
    broker.database.dispose()
    with pytest.raises(DatabaseUnusableError, match=r"version 2; .* knows 1\. Upgrade"):
        broker.connection().channel().held()
    with pytest.raises(DatabaseUnusableError):
        broker.publish(2)
    engine = sa.create_engine(broker.url.removeprefix("taskworker+"), poolclass=sa.NullPool)
    prefix = broker.options["table_prefix"]
    with engine.begin() as connection:
        assert connection.exec_driver_sql(f"SELECT count(*) FROM {prefix}message").scalar_one() == 1
        connection.exec_driver_sql(f"UPDATE {prefix}meta SET value = '1'")
    broker.database.dispose()
    assert broker.receiver().drain() == [1]


@all_databases
def test_tables_of_an_older_program_get_what_they_lack_and_keep_what_they_hold(
    broker, monkeypatch, unique
):
    broker.publish("kept")
    letter = broker.receiver()
    letter.drain()
    letter.channel.dead_letter(letter.messages[0].delivery_tag, "for later")
    letter.connection.release()
    broker.publish("waiting")
    prefix, own = broker.options["table_prefix"], _name(broker)
    added = "due_part" if own != "mysql" else "due_full"
    on = f" ON {prefix}message" if own == "mysql" else ""
    # As if the last column, a column with a default and an index had not been thought of yet.
    broker.execute(f"DROP INDEX {prefix}{added}{on}")
    broker.execute("ALTER TABLE {message} DROP COLUMN died")
    broker.execute("ALTER TABLE {queue} DROP COLUMN paused")
    broker.execute("DELETE FROM {meta} WHERE name = ?", "schema_revision")
    broker.database.dispose()

    with pytest.raises(DatabaseUnusableError, match="older flask-taskworker, and create_tables"):
        broker.connection(create_tables=False).channel().held()
    broker.database.dispose()
    programs = [broker.spawn("connection.channel().held()\nconnection.release()") for _ in range(4)]
    for program in programs:
        program.communicate(timeout=60)
    assert [program.returncode for program in programs] == [0] * 4
    one = broker.receiver()
    assert one.drain() == ["waiting"]
    one.channel.dead_letter(one.messages[0].delivery_tag, "too")
    one.channel.flush()
    first, second = dead_letters.list(broker.database)
    assert (first.reason, first.died_at.timestamp(), second.reason) == ("for later", 0, "too")
    assert second.died_at.timestamp() > 0
    held = broker.database.connect()
    assert added in plan(held, broker.database.dialect.next_due)
    held.close()
    inspector = sa.inspect(sa.create_engine(broker.database.url, poolclass=sa.NullPool))
    for table in build_tables(prefix).metadata.sorted_tables:
        found = {column["name"] for column in inspector.get_columns(table.name)}
        assert found == set(table.columns.keys())


@all_databases
def test_two_prefixes_in_one_database_are_two_brokers(broker, unique):
    other = f"{unique}other_"
    broker.publish("ours")
    kombu.Producer(broker.connection(table_prefix=other).channel()).publish(
        "theirs", routing_key="q"
    )
    assert broker.receiver().drain() == ["ours"]
    assert broker.receiver(table_prefix=other).drain() == ["theirs"]
    database = database_for(broker.url, {**broker.options, "table_prefix": other})
    assert database.doorbell.path != broker.database.doorbell.path
    held = database.connect()
    for table in reversed(database.dialect.names):
        held.execute(f"DROP TABLE {table}")
    held.close()
    database.dispose()


_ENV = """
from alembic import context
import sqlalchemy as sa

config = context.config
engine = sa.create_engine(config.get_main_option("sqlalchemy.url"), poolclass=sa.NullPool)
with engine.connect() as connection:
    context.configure(connection=connection, **config.attributes["configure"])
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
"""


def autogenerate(broker: Any, folder: Path, **configure: Any) -> str:
    """What ``alembic revision --autogenerate`` writes."""
    pytest.importorskip("alembic")
    from alembic import command
    from alembic.config import Config

    script = folder / f"alembic{len(list(folder.iterdir()))}"
    (script / "versions").mkdir(parents=True)
    (script / "env.py").write_text(_ENV)
    (script / "script.py.mako").write_text(
        "revision = ${repr(up_revision)}\ndown_revision = None\n"
        "def upgrade():\n    ${upgrades if upgrades else 'pass'}\n"
    )
    config = Config()
    config.set_main_option("script_location", str(script))
    config.set_main_option("path_separator", "os")
    url = broker.url.removeprefix("taskworker+").replace("%", "%%")
    config.set_main_option("sqlalchemy.url", url)
    config.attributes["configure"] = {"version_table": f"{folder.name[-8:]}_v", **configure}
    revision = command.revision(config, autogenerate=True)
    return Path(revision.path).read_text()


@all_databases
def test_alembic_neither_sees_nor_drops_the_tables_of_the_queue(broker, tmp_path, unique, caplog):
    caplog.set_level(logging.ERROR, "alembic")
    folder = tmp_path / unique
    folder.mkdir()
    prefix = broker.options["table_prefix"]
    broker.publish(1)
    metadata = sa.MetaData()
    sa.Table(f"app_{unique}", metadata, sa.Column("id", sa.Integer, primary_key=True))
    sa.Index(f"app_index_{unique}", metadata.tables[f"app_{unique}"].c.id)
    # Only what is this test's own: others share the server's database.
    mine = include_object(prefix)

    def filtered(obj: Any, name: str, type_: str, reflected: bool, compare_to: Any) -> bool:
        return unique in str(name) and mine(obj, name, type_, reflected, compare_to)

    def unfiltered(obj: Any, name: str, *args: Any) -> bool:
        return unique in str(name)

    text = autogenerate(broker, folder, target_metadata=metadata, include_object=filtered)
    assert f"create_table('app_{unique}'" in text
    assert f"app_index_{unique}" in text
    assert prefix not in text
    assert "drop" not in text
    # The trap: without the filter the queue would be dropped.
    text = autogenerate(broker, folder, target_metadata=metadata, include_object=unfiltered)
    assert f"drop_table('{prefix}message'" in text
    assert broker.receiver().drain() == [1]


@all_databases
def test_alembic_finds_nothing_to_change_when_it_is_given_the_tables(broker, tmp_path, unique):
    folder = tmp_path / unique
    folder.mkdir()
    prefix = broker.options["table_prefix"]
    broker.publish(1)

    def mine(obj: Any, name: str, type_: str, *args: Any) -> bool:
        return type_ != "table" or prefix in str(name)

    text = autogenerate(
        broker, folder, include_object=mine,
        target_metadata=build_tables(prefix, dialect=_name(broker)).metadata,
        compare_type=True,
    )  # fmt: skip
    assert "op." not in text, text


# -- the janitor --------------------------------------------------------------------------


@all_databases
def test_the_janitor_promotes_reaps_and_expires(broker):
    now = broker.database.now()
    broker.publish("delayed", eta_at=now + 0.05)
    Queue("short", expires=0.05)(broker.connection().channel()).declare()
    holder = broker.spawn(
        "got = []\n"
        "with kombu.Consumer(connection, [kombu.Queue('q')], on_message=got.append,\n"
        "                    auto_declare=False):\n"
        "    while not got: connection.drain_events(timeout=20)\n"
        "    print('holding', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    assert holder.stdout.readline() == "holding\n"  # promoted by the process that waited for it
    holder.kill()
    holder.wait()
    held = broker.database.connect()
    wait_until(lambda: broker.database.janitor.reap(held) == 1, "the dead consumer is found", 20)
    assert broker.execute("SELECT count(*) FROM {consumer}")[0][0] == 0

    def expired() -> bool:
        broker.database.janitor.expire_queues(held)
        return not broker.execute("SELECT id FROM {queue} WHERE name = ?", "short")

    wait_until(expired, "the unused queue is gone", 20)
    fill(broker, 2500, -1, "0", queue_id(broker))
    promoted = 0
    deadline = time.monotonic() + 30
    while promoted < 2500:
        assert time.monotonic() < deadline
        count = broker.database.janitor.promote(held)
        assert count <= 1000  # no transaction holds up the others for long
        promoted += count
    held.close()
    assert broker.receiver().drain()[0] == "delayed"


@only_sqlite
def test_a_log_that_a_reader_let_grow_is_shortened_when_the_reader_is_gone(broker, monkeypatch):
    broker.publish(1)
    path = broker.database.file
    log = Path(f"{path}-wal")
    monkeypatch.setattr(sqlite, "_WAL_LIMIT", 1_000_000)
    held = broker.database.connect(busy_timeout=0.05)
    reader = sa.create_engine(f"sqlite:///{path}", poolclass=sa.NullPool).connect()
    reader.exec_driver_sql("BEGIN")
    assert reader.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one() > 0
    fill(broker, 30_000)
    assert log.stat().st_size > 1_000_000
    maintain = broker.database.dialect.maintain
    maintain(broker.database, held)  # the reader is in the way: no error, tried again later
    assert log.stat().st_size > 1_000_000
    reader.close()
    maintain(broker.database, held)
    assert log.stat().st_size == 0
    held.close()


@all_databases
def test_messages_whose_answer_was_lost_come_back_while_their_consumer_lives(broker):
    """A claim is committed, and the connection breaks before the consumer hears of it."""
    broker.publish("heard", "unheard")
    one = broker.receiver(prefetch=1)
    one.connection.drain_events(timeout=0)
    assert one.messages[0].payload == "heard"
    broker.execute(
        "UPDATE {message} SET owner = ? WHERE owner = 0", one.channel._consumption.lease().id
    )
    one.channel.held().close()
    other = broker.receiver()
    for consumer in (one, other):
        consumer.drain()
    deadline = time.monotonic() + 20
    while not other.messages:
        assert time.monotonic() < deadline
        for consumer in (one, other):
            with contextlib.suppress(TimeoutError):
                consumer.connection.drain_events(timeout=0.2)
    assert other.messages[0].payload == "unheard"
    one.ack()
    other.ack()
    assert one.channel.lost_leases == 0
    assert broker.count() == 0
    assert dead_letters.list(broker.database) == ()


@only_sqlite
def test_files_beside_the_database_are_for_their_owner_alone(broker):
    broker.publish(1)
    broker.receiver().drain()
    for suffix in ("bell", "live"):
        files = [name for name in os.listdir(Path(broker.database.file).parent) if suffix in name]
        assert files
        for name in files:
            mode = (Path(broker.database.file).parent / name).stat().st_mode
            assert mode & 0o077 == 0
