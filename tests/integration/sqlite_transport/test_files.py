"""SQLite files that are missing, damaged, locked, or the wrong thing."""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
import time
from pathlib import Path

import kombu
import pytest

from flask_taskworker.exceptions import ConfigurationError
from flask_taskworker.transports.sql.engine import database_for
from flask_taskworker.transports.sql.errors import (
    DatabaseUnavailableError,
    DatabaseUnusableError,
)
from flask_taskworker.transports.sql.url import parse, refuse_network_file_system


def _publish(url: str, **options: object) -> None:
    with kombu.Connection(url, transport_options=options) as connection:
        kombu.Producer(connection.channel()).publish(1, exchange="", routing_key="q")


def test_a_damaged_file_is_refused_by_name_and_left_as_it_is(tmp_path):
    path = tmp_path / "queue.db"
    path.write_bytes(b"not a database at all " * 500)
    before = path.read_bytes()
    with pytest.raises(DatabaseUnusableError, match=r"queue\.db is damaged"):
        _publish(f"taskworker+sqlite:///{path}")
    assert path.read_bytes() == before
    assert not Path(f"{path}-wal").exists()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DatabaseUnusableError, match="nowhere does not exist"):
        _publish(f"taskworker+sqlite:///{tmp_path}/nowhere/queue.db")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everything")
def test_a_read_only_file_is_named(tmp_path):
    path = tmp_path / "queue.db"
    sqlite3.connect(path).close()
    path.chmod(0o400)
    with pytest.raises(DatabaseUnusableError, match="cannot be written"):
        _publish(f"taskworker+sqlite:///{path}")


def test_a_file_opened_read_only_is_refused(broker):
    broker.publish(1)
    broker.database.dispose()
    url = f"taskworker+sqlite:///file:{broker.path}?mode=ro&uri=true"
    with pytest.raises(DatabaseUnusableError, match="cannot be written"):
        _publish(url)
    database_for(url).dispose()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_is_refused(url):
    with pytest.raises(ConfigurationError, match=r"memory://"):
        _publish(f"taskworker+{url}")


@pytest.mark.parametrize("url", ["oracle://x/y", "nonsense", "sqlite"])
def test_a_url_that_is_none_of_ours_says_what_to_write(url):
    with pytest.raises(ConfigurationError, match=r"(Write|knows)"):
        parse(f"taskworker+{url}")


def test_a_password_is_not_shown():
    with pytest.raises(ConfigurationError) as caught:
        parse("taskworker+oracle://me:secret@host/db")
    assert "secret" not in str(caught.value)


def test_a_network_file_system_is_refused(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path}/net\\040work nfs4 rw 0 0\n")
    with pytest.raises(ConfigurationError, match="nfs4"):
        refuse_network_file_system(tmp_path / "net work" / "queue.db", str(mounts))
    refuse_network_file_system(tmp_path / "queue.db", str(mounts))


def test_a_relative_path_means_the_same_file_after_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    database = database_for("sqlite:///queue.db")
    monkeypatch.chdir("/")
    database.connect().close()
    assert (tmp_path / "queue.db").exists()
    database.dispose()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("durability", "some"), ("lease", 0), ("busy_timeout", "x"), ("table_prefix", "a b"),
        ("table_prefix", "x;--"), ("create_tables", 1), ("max_deliveries", -1),
        ("lease", float("inf")), ("lease", 1e9), ("busy_timeout", float("nan")),
    ],
)  # fmt: skip
def test_an_impossible_option_is_named(broker, option, value):
    with pytest.raises(ConfigurationError, match=option):
        broker.channel(**{option: value}).held()


def test_options_of_other_transports_are_ignored(broker):
    broker.channel(visibility_timeout=1, polling_interval=1, max_retries=3).held()


def test_a_publish_waits_while_the_application_writes(broker):
    broker.publish(1)
    app = sqlite3.connect(broker.path, isolation_level=None, check_same_thread=False)
    app.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.2, app.execute, ("COMMIT",))
    timer.start()
    broker.publish(2)
    timer.join()
    app.close()
    assert broker.count() == 2


def test_opening_waits_while_the_file_is_locked_even_for_readers(tmp_path):
    path = tmp_path / "queue.db"
    app = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    app.execute("BEGIN EXCLUSIVE")
    app.execute("CREATE TABLE app (x)")
    timer = threading.Timer(0.3, app.execute, ("COMMIT",))
    timer.start()
    database = database_for(f"sqlite:///{path}")
    database.connect(busy_timeout=8).close()
    timer.join()
    app.close()
    database.dispose()


def test_opening_gives_up_after_the_time_that_it_tells(tmp_path):
    path = tmp_path / "queue.db"
    first = sqlite3.connect(path, isolation_level=None)
    first.execute("BEGIN EXCLUSIVE")
    database = database_for(f"taskworker+sqlite:///{path}")
    began = time.monotonic()
    with pytest.raises(DatabaseUnavailableError, match=r"queue\.db was locked.*0\.3 s"):
        database.connect(busy_timeout=0.3)
    assert time.monotonic() - began >= 0.3
    first.execute("COMMIT")
    first.close()
    database.connect().close()
    database.dispose()


def test_a_publish_gives_up_in_time_with_what_to_do(broker):
    broker.publish(1)
    app = sqlite3.connect(broker.path, isolation_level=None)
    app.execute("BEGIN IMMEDIATE")
    producer = kombu.Producer(broker.channel(busy_timeout=0.1))
    with pytest.raises(DatabaseUnavailableError, match=r"queue\.db was locked.*0\.1 s"):
        producer.publish(2, exchange="", routing_key="q")
    app.execute("COMMIT")
    app.close()
    producer.publish(3, exchange="", routing_key="q")
    assert broker.count() == 2


def test_a_reader_does_not_stop_a_publish(broker):
    broker.publish(1)
    reader = sqlite3.connect(broker.path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM taskworker_message").fetchall()
    producer = kombu.Producer(broker.channel(busy_timeout=0.1))
    producer.publish(2, exchange="", routing_key="q")
    reader.close()


def test_a_full_disk_is_an_error_and_leaves_nothing_half_written(broker, receiver):
    channel = broker.channel()
    producer = kombu.Producer(channel)
    producer.publish("kept", exchange="", routing_key="q")
    pages = channel.held().execute("PRAGMA page_count").fetchone()[0]
    channel.held().execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DatabaseUnavailableError, match=r"queue\.db cannot grow.*Free some space"):
        producer.publish(b"x" * 100_000, exchange="", routing_key="q", content_encoding="binary")
    channel.held().execute("PRAGMA max_page_count = 1000000")
    producer.publish("after", exchange="", routing_key="q")
    assert receiver().drain() == ["kept", "after"]


def test_errors_are_those_kombu_expects(broker):
    transport = broker.connection().transport
    assert issubclass(DatabaseUnavailableError, transport.connection_errors)
    assert issubclass(DatabaseUnusableError, transport.channel_errors)
    assert not issubclass(DatabaseUnusableError, transport.recoverable_connection_errors)


def test_missing_tables_are_an_error_where_they_may_not_be_created(tmp_path):
    with pytest.raises(DatabaseUnusableError, match="create_tables"):
        _publish(f"taskworker+sqlite:///{tmp_path}/q.db", create_tables=False)


def test_tables_of_a_newer_program_are_left_alone(broker):
    broker.publish(1)
    held = broker.database.connect()
    held.execute("UPDATE taskworker_meta SET value = '99' WHERE name = 'schema_version'")
    held.close()
    broker.database.dispose()
    with pytest.raises(DatabaseUnusableError, match="Upgrade"):
        _publish(broker.url)


def test_two_prefixes_are_two_brokers(broker, receiver):
    broker.publish(1)
    _publish(broker.url, table_prefix="other_")
    assert receiver(transport_options={"table_prefix": "other_"}).drain() == [1]
    assert broker.count() == 1
    database_for(broker.url, {"table_prefix": "other_"}).dispose()


def test_kombu_takes_the_transport_by_its_class(broker):
    broker.publish(1)
    url = f"sqlite:///{broker.path}"
    with kombu.Connection(url, transport="flask_taskworker.transports.sql:Transport") as connection:
        assert connection.channel().basic_get("q").decode() == 1


def test_the_url_is_shown_without_the_password():
    connection = kombu.Connection("taskworker+postgresql+psycopg://me:secret@host/db")
    assert "secret" not in connection.as_uri()
    assert connection.as_uri().startswith("taskworker+postgresql+psycopg://me:")


def test_importing_the_package_loads_no_database_library():
    import subprocess

    code = "import sys, flask_taskworker.transports; print('sqlalchemy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize(
    "name", ["file::memory:?cache=shared&uri=true", "file:%3Amemory%3A?uri=true",
             "file:x?mode=memory&uri=true", "file:/x?vfs=memdb&uri=true", "file:?uri=true"],
)  # fmt: skip
def test_a_database_in_memory_is_refused_also_as_a_uri(name):
    with pytest.raises(ConfigurationError, match=r"memory://"):
        parse(f"taskworker+sqlite:///{name}")


def test_a_uri_names_the_same_file_as_its_path(broker, receiver):
    Path(f"{broker.path.parent}/with space").mkdir()
    path = f"{broker.path.parent}/with space/queue.db"
    uri = f"taskworker+sqlite:///file:{path.replace(' ', '%20')}?uri=true"
    _publish(uri)
    database = database_for(uri)
    assert database.doorbell.path == f"{path}-taskworker-bell"
    assert database.doorbell.available
    with kombu.Connection(f"taskworker+sqlite:///{path}") as connection:
        assert connection.channel().basic_get("q").payload == 1
    database.dispose()
    database_for(f"sqlite:///{path}").dispose()


def test_a_linked_file_has_one_bell_and_one_set_of_locks(broker, receiver):
    link = broker.path.with_name("link.db")
    link.symlink_to(broker.path)
    linked = database_for(f"sqlite:///{link}")
    assert linked.doorbell.path == broker.database.doorbell.path
    assert linked.file == broker.database.file
