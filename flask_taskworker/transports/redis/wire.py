"""One connection to Redis on which scripts run."""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import redis
from redis.exceptions import ConnectionError, NoScriptError, ResponseError, TimeoutError

from .scripts import ALL, Script

#: Closing a connection may take this long. Seconds.
CLOSE_TIMEOUT = 1.0

Then = Callable[[Any], None]


def connection_parameters(parameters: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The class and the arguments of a bare connection, out of those of a kombu channel."""
    kind = parameters.pop("connection_class")
    parameters.pop("max_connections", None)
    if redis.VERSION >= (5,):
        # The older protocol on purpose: answers then look alike in every release of redis-py.
        parameters["protocol"] = 2
    return kind, parameters


def _packed(command: Sequence[Any]) -> bytes:
    """A command as it is sent. redis-py's own way is made for more kinds of values, and slower."""
    parts = [b"*%d\r\n" % len(command)]
    for argument in command:
        if not isinstance(argument, bytes):
            argument = str(argument).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(argument), argument))
    return b"".join(parts)


class Wire:
    """Sends scripts and commands; answers are read in order, some of them later.

    After any error of the connection it is closed. What was sent and not answered may or may not
    have happened. The next call connects anew.

    :param make: a connection of redis-py, not connected yet.
    :param prepare: is called with each new connection.
    """

    def __init__(
        self, make: Callable[[], Any], prepare: Callable[[Wire], None] = lambda wire: None
    ) -> None:
        self._make = make
        self._prepare = prepare
        self._connection: Any = None
        self._unread: deque[Then] = deque()
        self._hurried = False

    @property
    def usable(self) -> bool:
        """Whether it is connected, as far as is known."""
        return self._connection is not None

    def connect(self) -> None:
        """Connect, unless that is done."""
        if self._connection is None:
            self._connection = self._make()
            if self._hurried:
                self._connection.socket_timeout = CLOSE_TIMEOUT
                self._connection.socket_connect_timeout = CLOSE_TIMEOUT
            try:
                self._connection.connect()
                self._prepare(self)
            except BaseException:
                self.close()
                raise

    def load(self) -> None:
        """Let the server know the scripts."""
        for script in ALL:
            self._send("SCRIPT", "LOAD", script.text)
        for _ in ALL:
            self._read()

    def run(self, script: Script, keys: Sequence[Any], arguments: Sequence[Any]) -> Any:
        """Run a script and return its answer."""
        try:
            return self.command("EVALSHA", script.sha, len(keys), *keys, *arguments)
        except ResponseError:
            self.close()  # how far it came is found out with a new connection
            raise

    def post(
        self, script: Script, keys: Sequence[Any], arguments: Sequence[Any], then: Then
    ) -> None:
        """Send a script; ``then`` gets its answer when the next one is read."""
        self.connect()
        self._send("EVALSHA", script.sha, len(keys), *keys, *arguments)
        self._unread.append(then)

    def command(self, *command: Any) -> Any:
        """Send a command and return its answer."""
        self.connect()
        self._send(*command)
        self.collect()
        return self._read()

    def push(self, list: str, text: str) -> None:
        """``LPUSH``, without what makes redis-py's way slow; nothing may have been posted."""
        self.connect()
        sock = self._connection._sock
        try:
            sock.sendall(_packed(("LPUSH", list, text)))
            answer = sock.recv(4096)
            while answer and not answer.endswith(b"\r\n"):
                more = sock.recv(4096)
                answer = answer + more if more else b""
        except OSError as exc:
            self.close()
            if isinstance(exc, socket.timeout):
                raise TimeoutError("the server did not answer in time") from exc
            raise ConnectionError(f"the connection failed: {exc}") from exc
        except BaseException:
            self.close()
            raise
        if not answer:
            self.close()
            raise ConnectionError("the server closed the connection")
        if not answer.startswith(b":"):
            raise ResponseError(answer[1:-2].decode(errors="replace"))

    def collect(self) -> None:
        """Read the answers to what was posted."""
        while self._unread:
            answer = self._read()
            self._unread.popleft()(answer)

    def _send(self, *command: Any) -> None:
        try:
            self._connection.send_packed_command([_packed(command)], check_health=False)
        except BaseException:
            self.close()
            raise

    def _read(self) -> Any:
        try:
            return self._connection.read_response()
        except NoScriptError as exc:
            self.close()
            raise ConnectionError("the server has forgotten the scripts") from exc
        except ResponseError:
            if self._unread:  # whose answer it is does not matter: all are sent again
                self.close()
            raise
        except BaseException:
            self.close()
            raise

    def hurry(self) -> None:
        """From now on wait for nothing longer than closing may take."""
        self._hurried = True
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError, AttributeError):
                connection._sock.settimeout(CLOSE_TIMEOUT)
            connection.socket_timeout = CLOSE_TIMEOUT

    def close(self) -> None:
        """Close the connection. Answers that were not read are lost."""
        self._unread.clear()
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.disconnect()

    def socket(self) -> socket.socket:
        """The socket of an open connection."""
        return self._connection._sock  # type: ignore[no-any-return]
