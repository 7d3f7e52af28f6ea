"""Probes: what counts as an answer, without any client library."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from flask_taskworker import ConfigurationError
from flask_taskworker.health import broker_in, of_broker, of_worker
from flask_taskworker.pidfile import PidFile


@contextlib.contextmanager
def server(answer: bytes | None) -> Iterator[int]:
    """A server on some port that says one thing to whoever comes, or nothing (None)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        end = threading.Event()

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    if answer is None:
                        end.wait(5)
                    else:
                        connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            end.set()
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join(5)


@pytest.mark.parametrize(
    ("scheme", "answer", "ok"),
    [
        ("redis", b"+PONG\r\n", True),
        ("redis", b"-NOAUTH Authentication required.\r\n", True),
        ("redis", b"HTTP/1.1 400 Bad Request", False),
        ("amqp", b"\x01\x00\x00\x00\x00\x01\xff", True),
        ("pyamqp", b"AMQP\x00\x00\x09\x01", True),
        ("taskworker+postgresql+psycopg", b"N", True),
        ("postgresql", b"S", True),
        ("mysql+pymysql", b"J\x00\x00\x00\n5.5.5", True),
        ("beanstalk", b"NOT_FOUND\r\n", True),
        ("rediss", b"", True),
        ("redis", b"", False),
    ],
)
def test_a_server_that_greets_as_such_is_well(scheme: str, answer: bytes, ok: bool) -> None:
    with server(answer) as port:
        found = of_broker(f"{scheme}://user:s3cret@127.0.0.1:{port}/0", 5)
    assert found.ok is ok, found
    assert "s3cret" not in found.text


def test_a_server_that_says_nothing_is_not_well() -> None:
    with server(None) as port:
        found = of_broker(f"redis://127.0.0.1:{port}", 0.05)
    assert not found.ok
    assert "timed out" in found.text


def test_of_several_brokers_one_has_to_answer() -> None:
    with server(b"+PONG\r\n") as port:
        assert of_broker(f"redis://127.0.0.1:1;redis://127.0.0.1:{port}").ok
    assert not of_broker("redis://127.0.0.1:1;redis://127.0.0.1:2").ok


@pytest.mark.parametrize("url", ["memory://", "nonsense", "sqs://x", "redis://host:port"])
def test_what_cannot_be_probed_is_explained(url: str) -> None:
    with pytest.raises(ConfigurationError):
        of_broker(url)


def test_a_worker_is_well_while_its_loop_turns(tmp_path: object) -> None:
    path = f"{tmp_path}/w.pid"
    assert of_worker(path) == (False, f"no worker holds {path}")
    file = PidFile(path)
    file.acquire()
    assert of_worker(path) == (True, f"worker {os.getpid()} is at work")
    os.utime(path, (0, 0))
    found = of_worker(path)
    assert not found.ok
    assert "is alive, but stands still" in found.text
    file.touch()
    assert of_worker(path).ok
    file.release()


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({"TASKER_BROKER_URL": "redis://h/1"}, "redis://h/1"),
        ({"FLASK_TASKER_BROKER_URL": "redis://h/2", "TASKER_BROKER_URL": "x"}, "redis://h/2"),
        ({"TASKER_ENGINE": "amqp"}, "amqp://guest:guest@127.0.0.1:5672//"),
        ({"TASKER_DATABASE_URI": "sqlite:////tmp/q.db"}, "taskworker+sqlite:////tmp/q.db"),
    ],
)
def test_the_environment_names_the_broker(environ: dict[str, str], url: str) -> None:
    assert broker_in(environ | {"TASKER_WORKER_QUEUES": "a", "PATH": "x"}) == url


def test_an_environment_that_names_none_is_explained() -> None:
    with pytest.raises(ConfigurationError, match="nothing says what to probe"):
        broker_in({"TASKER_LEASE": "9"})
