"""Whether a worker is at work and a broker answers, asked cheaply.

A probe runs every few seconds next to a busy worker. So nothing here loads the app, a
database driver or a broker's client: a broker is asked for the first words it says to
anybody, which needs no login.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import struct
import warnings
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from . import pidfile
from .config import SETTINGS, Config, mask_url
from .exceptions import ConfigurationError
from .urls import SQL_PREFIX, several

#: A worker at work touches its pid file at least this often. Seconds.
MAX_AGE = 60.0


class Health(NamedTuple):
    """What a probe found: whether all is well, and a line that says why."""

    ok: bool
    text: str


class _Greeting(NamedTuple):
    port: int
    question: bytes
    answers: tuple[bytes, ...]


_POSTGRESQL = _Greeting(5432, struct.pack("!ii", 8, 80877103), (b"S", b"N"))  # "may I use TLS?"
_MYSQL = _Greeting(3306, b"", (b"",))  # it speaks first
#: What is said to each kind of server, and how its answer may begin.
_GREETINGS = {
    "redis": _Greeting(6379, b"PING\r\n", (b"+PONG", b"-")),
    "amqp": _Greeting(5672, b"AMQP\x00\x00\x09\x01", (b"\x01", b"AMQP")),
    "pyamqp": _Greeting(5672, b"AMQP\x00\x00\x09\x01", (b"\x01", b"AMQP")),
    "postgresql": _POSTGRESQL,
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
    "beanstalk": _Greeting(11300, b"stats-job 0\r\n", (b"NOT_FOUND",)),
}
#: Behind TLS the connection itself has to do.
_OVER_TLS = {"rediss": 6379, "amqps": 5671}


def of_worker(path: str, max_age: float = MAX_AGE) -> Health:
    """Whether the worker behind a pid file is alive and its loop turns.

    :param max_age: seconds since its last sign of life.
    """
    pid = pidfile.holder(path)
    if pid is None:
        return Health(False, f"no worker holds {path}")
    try:
        seconds = pidfile.age(path)
    except OSError:  # it ended just now
        return Health(False, f"no worker holds {path}")
    if seconds > max_age:
        return Health(False, f"worker {pid} is alive, but stands still for {seconds:.0f} s")
    return Health(True, f"worker {pid} is at work")


def of_broker(url: str, timeout: float = 2.0) -> Health:
    """Whether a broker answers.

    :param url: its address, or several with ``;`` between, of which one has to answer.
    :param timeout: seconds.
    :raises ConfigurationError: for an address that cannot be probed.
    """
    findings = [_one(one.removeprefix(SQL_PREFIX), timeout) for one in several(url)]
    return next((finding for finding in findings if finding.ok), findings[0])


def broker_in(environ: Mapping[str, str]) -> str:
    """The broker that the environment names: ``TASKER_...`` or Flask's ``FLASK_TASKER_...``.

    :raises ConfigurationError: if there is none.
    """
    keys = [setting.key for setting in SETTINGS]
    given = {
        key: environ.get(f"FLASK_{key}", environ.get(key))
        for key in keys
        if key in environ or f"FLASK_{key}" in environ
    }
    if not given.keys() & {"TASKER_BROKER_URL", "TASKER_DATABASE_URI", "TASKER_ENGINE"}:
        raise ConfigurationError(
            "nothing says what to probe. Give --pidfile FILE, the URL of the broker, or set "
            "TASKER_BROKER_URL or TASKER_DATABASE_URI in the environment"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = Config.from_mapping(
            given, debug=False, instance_path=os.path.join(os.getcwd(), "instance")
        )
    return config.broker_url


def _one(url: str, timeout: float) -> Health:
    kind = urlsplit(url).scheme.partition("+")[0]
    if kind == "sqlite":
        return _sqlite(url, timeout)
    greeting = _GREETINGS.get(kind)
    port = greeting.port if greeting else _OVER_TLS.get(kind)
    if port is None:
        raise ConfigurationError(
            f"{mask_url(url)} cannot be probed: known are SQLite, PostgreSQL, MySQL, Redis, "
            "RabbitMQ and beanstalkd. Probe the worker instead, with --pidfile FILE"
        )
    host, port = _address(url, port)
    try:
        with socket.create_connection((host, port), timeout) as connection:
            answer = _ask(connection, greeting) if greeting else b""
    except OSError as exc:
        return Health(False, f"{mask_url(url)} does not answer: {exc.strerror or exc}")
    if greeting and not answer.startswith(greeting.answers):
        return Health(False, f"{mask_url(url)} answers, but not as such a server does")
    return Health(True, f"{mask_url(url)} answers")


def _address(url: str, port: int) -> tuple[str, int]:
    parts = urlsplit(url)
    try:
        return parts.hostname or "127.0.0.1", parts.port or port
    except ValueError:
        raise ConfigurationError(f"{mask_url(url)}: the port is no number") from None


def _ask(connection: socket.socket, greeting: _Greeting) -> bytes:
    if greeting.question:
        connection.sendall(greeting.question)
    answer = connection.recv(64)
    if not answer:
        raise ConnectionError("it closed the connection")
    return answer


def _sqlite(url: str, timeout: float) -> Health:
    path = unquote(url.partition("://")[2].partition("?")[0])[1:]
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{quote(path)}?mode=rw", uri=True, timeout=timeout)
        ) as database:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as exc:
        return Health(False, f"{path} cannot be used: {exc}")
    return Health(True, f"{path} can be used")
