"""Database servers of our own, which a test may kill.

Each lies in a folder of its own directly under the temporary folder, because the servers refuse to
run as root and their users may not enter pytest's folders.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from support.processes import eventually

_START = 60.0
S = TypeVar("S", bound="OwnServer")


def _program(name: str) -> str:
    """The path of a program of a database server, or skip the test."""
    folders = sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders, "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"{name} is not installed, so there can be no server of our own")
    return found


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class OwnServer:
    """A server process that can be killed and started again on the same files."""

    #: Ends it as a crash would, without a checkpoint.
    crash_signal = signal.SIGKILL

    def __init__(self, user: str) -> None:
        self.user: str | None = user if os.getuid() == 0 else None
        if self.user is not None:
            try:
                pwd.getpwnam(user)
            except KeyError:
                pytest.skip(f"there is no user {user} to run a server of our own as")
        self.folder = Path(tempfile.mkdtemp(prefix="taskworker-server-"))
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        if self.user is not None:
            shutil.chown(self.folder, self.user)

    def command(self) -> list[str]:
        raise NotImplementedError

    def answers(self) -> bool:
        raise NotImplementedError

    def environment(self) -> dict[str, str] | None:
        """Of the server; None: that of the tests."""
        return None

    def run(self, *command: str) -> None:
        """Run a program to its end, as the server's user."""
        done = subprocess.run(
            command, user=self.user, cwd=self.folder, capture_output=True, text=True, timeout=_START
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        """Start it; it answers when this returns."""
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                self.command(), user=self.user, cwd=self.folder, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True, env=self.environment(),
            )  # fmt: skip

        def answers() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, (self.folder / "log").read_text()
            return self.answers()

        eventually(answers, f"{self.command()[0]} answers", _START)

    def crash(self) -> None:
        """End it without a chance to tidy up, and wait until it is gone."""
        if self._process is not None:
            # A script may have started it, so the whole session gets the signal where it can.
            if self.crash_signal == signal.SIGKILL:
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.send_signal(self.crash_signal)
            self._process.wait(_START)
            self._process = None

    def close(self) -> None:
        self.crash()
        shutil.rmtree(self.folder, ignore_errors=True)


class OwnPostgreSQL(OwnServer):
    crash_signal = signal.SIGQUIT  # "immediate"; after SIGKILL its children hold the memory

    def __init__(self) -> None:
        initdb, self._postgres = _program("initdb"), _program("postgres")
        super().__init__("postgres")
        self.run(initdb, "-D", str(self.folder / "data"), "-U", "postgres", "-A", "trust", "-N")
        self.url = f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"

    def command(self) -> list[str]:
        return [
            self._postgres, "-D", str(self.folder / "data"), "-p", str(self.port),
            "-k", str(self.folder), "-c", "listen_addresses=127.0.0.1",
        ]  # fmt: skip

    def answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url.replace("+psycopg", ""), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


class OwnMariaDB(OwnServer):
    def __init__(self) -> None:
        install, self._mariadbd = _program("mariadb-install-db"), _program("mariadbd")
        super().__init__("mysql")
        self.run(
            install, "--no-defaults", f"--datadir={self.folder}/data", "--skip-test-db",
            "--auth-root-authentication-method=normal", f"--tmpdir={self.folder}",
        )  # fmt: skip
        self.url = f"mysql+pymysql://root@127.0.0.1:{self.port}/mysql"

    def command(self) -> list[str]:
        return [
            self._mariadbd, "--no-defaults", f"--datadir={self.folder}/data",
            f"--port={self.port}", f"--socket={self.folder}/socket", "--bind-address=127.0.0.1",
            f"--pid-file={self.folder}/pid", f"--tmpdir={self.folder}",
            "--innodb-buffer-pool-size=64M",
        ]  # fmt: skip

    def answers(self) -> bool:
        import pymysql

        try:
            pymysql.connect(
                host="127.0.0.1", port=self.port, user="root", connect_timeout=5
            ).close()
        except pymysql.OperationalError:
            return False
        return True


class OwnRedis(OwnServer):
    """A Redis that writes down each change before it answers."""

    def __init__(self, *options: str) -> None:
        self._redis = _program("redis-server")
        self._options = options
        super().__init__("redis")
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        return [
            self._redis, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder),
            "--appendonly", "yes", "--appendfsync", "always", "--save", "", *self._options,
        ]  # fmt: skip

    def client(self) -> Any:
        import redis

        return redis.Redis(port=self.port, socket_timeout=5, socket_connect_timeout=5)

    def answers(self) -> bool:
        import redis

        with contextlib.closing(self.client()) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False


class OwnRabbitMQ(OwnServer):
    def __init__(self) -> None:
        path = "/usr/lib/rabbitmq/bin/rabbitmq-server"
        self._server = path if os.path.exists(path) else _program("rabbitmq-server")
        super().__init__("rabbitmq")
        self._distribution = free_port()
        self.node = f"taskworker{self.port}@localhost"
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        (self.folder / "plugins").write_text("[].\n")
        (self.folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{self.port}\n")

    def command(self) -> list[str]:
        return [self._server]

    def environment(self) -> dict[str, str]:
        folder = str(self.folder)
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": folder,
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "RABBITMQ_MNESIA_BASE": folder,
            "RABBITMQ_LOG_BASE": folder,
            "RABBITMQ_PID_FILE": f"{folder}/pid",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
        }

    def control(self, *command: str) -> None:
        """Run ``rabbitmqctl``."""
        program = self._server.replace("rabbitmq-server", "rabbitmqctl")
        subprocess.run(
            [program, "-n", self.node, *command],
            user=self.user, env=self.environment(), check=True, capture_output=True, timeout=_START,
        )  # fmt: skip

    def answers(self) -> bool:
        import kombu

        try:
            with kombu.Connection(self.url, connect_timeout=5) as connection:
                connection.connect()
        except OSError:
            return False
        return True


@contextlib.contextmanager
def running(kind: Callable[[], S]) -> Iterator[S]:
    """A server that ends with the block."""
    server = kind()
    try:
        server.start()
        yield server
    finally:
        server.close()
