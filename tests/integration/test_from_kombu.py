"""What waits in the tables of kombu's own SQL transport is taken over, and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import kombu
import pytest
import sqlalchemy as sa

import flask_taskworker.transports  # noqa: F401 - teaches kombu our transport
from flask_taskworker.exceptions import ConfigurationError
from flask_taskworker.transports.sql.from_kombu import migrate

# kombu's transport uses what SQLAlchemy 2.1 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

SERVERS = [
    pytest.param("postgresql_url", marks=pytest.mark.services),
    pytest.param("mysql_url", marks=pytest.mark.services),
]


@pytest.fixture(params=["sqlite", *SERVERS])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/broker.db"
    server: str = request.getfixturevalue(request.param)
    engine = sa.create_engine(server, poolclass=sa.NullPool)
    with engine.begin() as connection:
        for table in ("kombu_message", "taskworker_message"):
            if sa.inspect(connection).has_table(table):  # from the test before
                connection.execute(sa.text(f"DELETE FROM {table}"))
    return server


@contextmanager
def ours(url: str) -> Iterator[Any]:
    with kombu.Connection(f"taskworker+{url}") as connection:
        yield connection


@contextmanager
def theirs(url: str) -> Iterator[Any]:
    connection = kombu.Connection(f"sqla+{url}")
    try:
        yield connection
    finally:
        session = connection.default_channel.session
        session.close()
        session.get_bind().dispose()
        connection.release()


def publish(connection: Any, queue: str, body: object, **options: Any) -> None:
    connection.Producer().publish(body, routing_key=queue, declare=[kombu.Queue(queue)], **options)


def received(connection: Any, queue: str, count: int) -> list[Any]:
    messages: list[Any] = []
    with kombu.Consumer(connection, [kombu.Queue(queue)], on_message=messages.append):
        while len(messages) < count:
            connection.drain_events(timeout=10)
    for message in messages:
        message.ack()
    return messages


def test_visible_messages_arrive_whole_in_order_and_once(url: str) -> None:
    with theirs(url) as source:
        for number in range(30):
            publish(source, "mail", {"number": number}, headers={"id": str(number)})
        publish(
            source, "mail", b"\x00\xff", content_type="application/data", content_encoding="binary"
        )
    with ours(url) as target:
        done = migrate(url, target.default_channel)
        assert done.moved == {"mail": 31}
        messages = received(target, "mail", 31)
        assert [message.payload["number"] for message in messages[:30]] == list(range(30))
        assert [message.headers["id"] for message in messages[:30]] == list(map(str, range(30)))
        assert bytes(messages[30].body) == b"\x00\xff"
        assert not migrate(url, target.default_channel).moved


def test_what_a_worker_had_fetched_is_counted_and_left(url: str) -> None:
    with theirs(url) as source:
        for number in range(3):
            publish(source, "mail", number)
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "UPDATE kombu_message SET visible = :no WHERE id = (SELECT m FROM "
                "(SELECT min(id) AS m FROM kombu_message) first)"
            ),
            {"no": False},
        )
    with ours(url) as target:
        done = migrate(url, target.default_channel)
        assert (done.moved, done.unknown) == ({"mail": 2}, 1)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM kombu_message")).scalar() == 1


def test_priority_and_due_time_are_kept(url: str) -> None:
    due = datetime.now(timezone.utc) + timedelta(hours=1)
    with theirs(url) as source:
        publish(source, "mail", "usual", priority=0)
        publish(source, "mail", "urgent", priority=9)
        publish(source, "mail", "later", headers={"eta": due.isoformat()})
    with ours(url) as target:
        assert migrate(url, target.default_channel).moved == {"mail": 3}
        assert [message.payload for message in received(target, "mail", 2)] == ["urgent", "usual"]
        assert target.default_channel.basic_get("mail") is None, "it is not due yet"


def test_a_dry_run_only_counts(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/broker.db"
    with theirs(url) as source:
        publish(source, "mail", 1)
    with ours(url) as target:
        assert migrate(url, target.default_channel, dry_run=True).moved == {"mail": 1}
        assert target.default_channel.basic_get("mail") is None
        assert migrate(url, target.default_channel).moved == {"mail": 1}


def test_another_database_can_be_the_source(tmp_path: Path) -> None:
    source_url, target_url = (f"sqlite:///{tmp_path}/{name}.db" for name in ("old", "new"))
    with theirs(source_url) as source:
        publish(source, "mail", "hello")
    with ours(target_url) as target:
        assert migrate(f"sqla+{source_url}", target.default_channel).moved == {"mail": 1}
        assert received(target, "mail", 1)[0].payload == "hello"
        assert not migrate(source_url, target.default_channel).moved


def test_a_row_that_holds_no_message_is_named_and_left(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/broker.db"
    with theirs(url) as source:
        publish(source, "mail", 1)
        publish(source, "mail", 2)
    with sa.create_engine(url, poolclass=sa.NullPool).begin() as connection:
        connection.execute(sa.text("UPDATE kombu_message SET payload = 'nonsense' WHERE id = 1"))
    with ours(url) as target:
        done = migrate(url, target.default_channel)
        assert (done.moved, done.unreadable) == ({"mail": 1}, [1])


def test_answers_of_processes_that_are_gone_are_left(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/broker.db"
    with theirs(url) as source:
        publish(source, "celery@host.celery.pidbox", {"method": "ping"})
    with ours(url) as target:
        done = migrate(url, target.default_channel)
        assert (done.moved, done.passing) == ({}, 1)


def test_a_database_without_the_tables_is_refused_and_not_touched(tmp_path: Path) -> None:
    with ours(f"sqlite:///{tmp_path}/new.db") as target:
        with pytest.raises(ConfigurationError, match="there is no file"):
            migrate(f"sqlite:///{tmp_path}/missing.db", target.default_channel)
        assert not (tmp_path / "missing.db").exists()
        with pytest.raises(ConfigurationError, match="has no table kombu_queue"):
            migrate(f"sqlite:///{tmp_path}/new.db", target.default_channel)
