"""Where the messages of a run are kept; every system of a run uses the same kind of store.

``BENCH_STORE`` says which. The servers are those that the tests use, see ``addresses``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

VARIABLE = "BENCH_STORE"
STORES = ("sqlite", "postgresql", "redis", "rabbitmq")

_SERVERS: Mapping[str, tuple[str, str]] = {
    "postgresql": ("TASKWORKER_POSTGRESQL_URL", "postgresql://postgres@127.0.0.1:5432/test"),
    "redis": ("TASKWORKER_REDIS_URL", "redis://127.0.0.1:6379"),
    "rabbitmq": ("TASKWORKER_AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/%2F"),
}


def chosen() -> str:
    """The store of this run."""
    return os.environ.get(VARIABLE, "sqlite")


def server(store: str) -> str:
    """The address of a server, without what belongs to one run."""
    variable, default = _SERVERS[store]
    address = os.environ.get(variable) or default
    # kombu's spelling of the virtual host "/", which not every client knows
    return f"{address[:-2]}/%2F" if address.endswith("//") else address


def redis_database(number: int) -> str:
    """The address of a database of Redis. Numbers from 11 on are emptied after each run."""
    return f"{server('redis').rstrip('/')}/{number}"


def empty_redis(number: int) -> None:
    """Remove all that a run left in a database."""
    import redis

    with redis.Redis.from_url(redis_database(number)) as client:
        client.flushdb()


def postgresql_schema(name: str, dialect: str = "postgresql") -> str:
    """The address of a schema of its own, which is created.

    :param dialect: the URL's scheme, a driver's name included.
    """
    _run_sql(f'CREATE SCHEMA IF NOT EXISTS "{name}"')
    rest = server("postgresql").partition("://")[2]
    mark = "&" if "?" in rest else "?"
    return f"{dialect}://{rest}{mark}options={quote(f'-csearch_path={name}')}"


def drop_schema(name: str) -> None:
    """Remove the schema of a run with all that is in it."""
    _run_sql(f'DROP SCHEMA IF EXISTS "{name}" CASCADE')


def delete_queues(*names: str) -> None:
    """Delete queues of RabbitMQ."""
    import kombu

    with kombu.Connection(server("rabbitmq")) as connection:
        for name in names:
            connection.default_channel.queue_delete(name)


def _run_sql(statement: str) -> None:
    import psycopg

    scheme, _, rest = server("postgresql").partition("://")
    connection: psycopg.Connection[Any]
    with psycopg.connect(f"{scheme.partition('+')[0]}://{rest}", autocommit=True) as connection:
        # "IF NOT EXISTS" is not safe against another process that does the same
        connection.execute("SELECT pg_advisory_lock(7341)")
        connection.execute(statement)  # type: ignore[arg-type]
