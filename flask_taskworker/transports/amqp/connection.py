"""A connection that reads much at once, shows that it lives, and ends quickly."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
import time
import weakref
from typing import Any

from amqp.exceptions import UnexpectedFrame
from amqp.transport import SSLTransport, TCPTransport
from kombu.transport import pyamqp

from ... import clock
from .channel import Channel as AMQPChannel
from .frames import FrameHandler

#: A server that is to confirm the end of a connection or channel has this long. Seconds.
_CLOSE_TIMEOUT = 0.5
#: An acknowledgement waits for others no longer than this, in seconds.
_BUNDLE_DELAY = 0.005
_FOR_EVER = 3600.0
_HEARTBEAT_FRAME = b"\x08\x00\x00\x00\x00\x00\x00\xce"
#: Read at most so many bytes at once.
_PIECE = 256 * 1024
_HEADER = struct.Struct(">BHI")
_FRAME_END = 0xCE
#: Nothing to read now; TLS says so by ENOENT.
_NOT_NOW = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR, errno.ENOENT})


class _Buffered:
    """Frames out of large pieces; whole frames in one writing."""

    first: list[bytes]
    connected: bool
    _quick_recv: Any

    def _setup_transport(self) -> None:
        super()._setup_transport()  # type: ignore[misc]
        self._buffer = b""
        self._at = 0
        self._lock = threading.Lock()

    def next_frame(self) -> tuple[int, int, bytes] | None:
        """The next frame of what was read already: type, channel and content; None if none."""
        buffer, at = self._buffer, self._at
        if len(buffer) - at < 8:
            return None
        kind, channel, size = _HEADER.unpack_from(buffer, at)
        end = at + 7 + size
        if len(buffer) <= end:
            return None
        if buffer[end] != _FRAME_END:
            raise UnexpectedFrame(f"a frame ends with {buffer[end]:#x}")
        self._at = end + 1
        return kind, channel, buffer[at + 7 : end]

    def read_frame(self, unpack: Any = None) -> tuple[int, int, bytes]:
        """Read the next frame.

        :raises socket.timeout: if it does not come in time; what came of it is kept.
        """
        while (frame := self.next_frame()) is None:
            self._fill()
        return frame

    def frame_now(self) -> tuple[int, int, bytes] | None:
        """The next frame; None if it is not there yet, or that costs more to know."""
        return None

    def _fill(self, flags: int = 0) -> None:
        try:
            piece = self._quick_recv(_PIECE, flags) if flags else self._quick_recv(_PIECE)
        except OSError as exc:
            if exc.errno in _NOT_NOW or "timed out" in str(exc):
                raise TimeoutError from exc
            self.connected = False
            raise
        if not piece:
            self.connected = False
            raise ConnectionResetError("the server closed the connection")
        self._buffer = self._buffer[self._at :] + piece
        self._at = 0

    def write(self, data: Any) -> None:
        """Send what was collected, then this."""
        with self._lock:
            waiting = len(self.first)
            if waiting:
                data = b"".join((*self.first[:waiting], data))
            super().write(data)  # type: ignore[misc]
            del self.first[:waiting]


class BufferedTCP(_Buffered, TCPTransport):  # type: ignore[misc]
    """In the clear."""

    def frame_now(self) -> tuple[int, int, bytes] | None:
        # Without the two calls that it takes to make a socket not wait, and wait again.
        if not hasattr(socket, "MSG_DONTWAIT"):
            return None
        while (frame := self.next_frame()) is None:
            self._fill(socket.MSG_DONTWAIT)
        return frame


class BufferedTLS(_Buffered, SSLTransport):  # type: ignore[misc]
    """By TLS."""


class Connection(pyamqp.Connection):  # type: ignore[misc]
    """A connection that ends at once."""

    Channel = AMQPChannel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._frames: list[bytes] = []
        self._oldest = 0.0
        #: So many acknowledgements are sent at once.
        self.bundle = 1
        super().__init__(*args, **kwargs)
        self.frame_handler_cls = FrameHandler

    def Transport(
        self,
        host: str,
        connect_timeout: Any,
        ssl: Any = False,
        read_timeout: float | None = None,
        write_timeout: float | None = None,
        socket_settings: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The socket, wrapped."""
        transport = (BufferedTLS if ssl else BufferedTCP)(
            host, connect_timeout=connect_timeout, ssl=ssl, read_timeout=read_timeout,
            write_timeout=write_timeout, socket_settings=socket_settings, **kwargs,
        )  # fmt: skip
        # Acknowledgements go first; and heartbeats never between the parts of a frame.
        transport.first = self._frames
        self._frames.clear()
        return transport

    def collect_frame(self, frame: bytes) -> None:
        """Send a frame with the next one, or by :meth:`flush`."""
        if not self._frames:
            self._oldest = clock.monotonic()
        self._frames.append(frame)
        self.bytes_sent += 1

    def flush(self) -> None:
        """Send what was collected."""
        if self._frames:
            self.transport.write(b"")

    def flush_if_due(self) -> float:
        """Send what was collected if it is enough, or is waiting for long.

        The server answers a bundle with a bundle, which costs both sides less than one message
        at a time.

        :return: how long the rest may wait, in seconds.
        """
        if not self._frames:
            return _FOR_EVER
        left = self._oldest + _BUNDLE_DELAY - clock.monotonic()
        if left > 0 and len(self._frames) < self.bundle:
            return left
        self.flush()
        return _FOR_EVER

    def blocking_read(self, timeout: float | None = None) -> Any:
        """Handle one frame; read from the socket only if there is none yet."""
        transport = self.transport
        frame = transport.next_frame()
        if frame is None:
            if timeout == 0:
                self.flush_if_due()
                frame = transport.frame_now()
            else:
                self.flush()
        if frame is None:
            with transport.having_timeout(timeout):
                frame = transport.read_frame()
        return self.on_inbound_frame(frame)

    def connect(self, *args: Any, **kwargs: Any) -> Any:
        """Connect, and begin to show that we live."""
        answer = super().connect(*args, **kwargs)
        if self.heartbeat:
            beat = threading.Thread(
                target=_beat, args=(weakref.ref(self), self._transport, self.heartbeat / 3),
                name="taskworker-heartbeat", daemon=True,
            )  # fmt: skip
            beat.start()
        return answer

    @contextlib.contextmanager
    def hurried(self) -> Any:
        """Wait for no answer long, within a block."""
        self._wait_at_most(_CLOSE_TIMEOUT, _CLOSE_TIMEOUT)
        try:
            yield
        finally:
            self._wait_at_most(self.read_timeout or 0.0, self.write_timeout or 0.0)

    def _wait_at_most(self, read: float, write: float) -> None:
        sock = getattr(self._transport, "sock", None)
        if sock is None:
            return
        for option, seconds in ((socket.SO_RCVTIMEO, read), (socket.SO_SNDTIMEO, write)):
            whole = int(seconds)
            value = struct.pack("ll", whole, int((seconds - whole) * 1_000_000))
            with contextlib.suppress(OSError, ValueError):
                sock.setsockopt(socket.SOL_SOCKET, option, value)

    def close(self, *args: Any, **kwargs: Any) -> None:
        """Say goodbye; who does not answer is left without."""
        try:
            with self.hurried():
                super().close(*args, **kwargs)
        except self.connection_errors:
            self.collect()


def _beat(connection: Any, transport: Any, interval: float) -> None:
    """Send a heartbeat each interval as long as a connection has this transport."""
    while True:
        time.sleep(interval)
        alive = connection()
        if alive is None or alive._transport is not transport:
            return
        del alive
        try:
            transport.write(_HEARTBEAT_FRAME)
        except (OSError, AttributeError):
            return
