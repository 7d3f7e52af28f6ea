"""Waking a sleeping process on the same host without polling.

A small file, mapped into memory by everybody, has one byte per sleeper that says what it
waits for. Whoever commits something looks at these bytes; only if one is set is a UDP
datagram sent to that sleeper's port on the loopback interface. A sleeper sets its byte
first and looks at the database once more before it sleeps, so no wake-up is lost::

    sleeper:  arm -> look -> sleep          publisher:  commit -> look at the bytes -> ring

Ringing nobody costs a fraction of a microsecond.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import mmap
import os
import socket
import stat
import struct
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

#: A slot's kind: somebody waits for messages ...
MESSAGES = 1
#: ... or for results ...
RESULTS = 2
#: ... or for what goes through an exchange: broadcasts, and answers to them.
BROADCASTS = 3

_MAGIC = b"TWBELL1\0"
_STATES = 64
_SLOTS = 512
_RECORDS = _STATES + _SLOTS
_RECORD = struct.Struct("<IHxx")  # pid, port
_SIZE = _RECORDS + _SLOTS * _RECORD.size
_OFF = b"\0"


class Doorbell:
    """A bell for everybody who uses one database on this host.

    :param path: the shared file; created if missing, for its owner only.

    If the file cannot be had, the bell is dumb: :attr:`available` is False, ringing does
    nothing, and sleepers have to look at the database now and then.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._sender: socket.socket | None = None
        self._map: mmap.mmap | None = None
        self._fd = -1
        if path is not None:
            try:
                self._fd, self._map = _open(path)
            except OSError as exc:
                log.warning(
                    "no doorbell at %s (%s): sleepers look for work now and then", path, exc
                )

    @property
    def available(self) -> bool:
        """Whether sleepers can be woken."""
        return self._map is not None

    def ring(self, kind: int) -> None:
        """Wake every sleeper of a kind. Call it after the commit, never before."""
        shared = self._map
        if shared is None:
            return
        wanted = _BYTES[kind]
        index = shared.find(wanted, _STATES, _RECORDS)
        while index >= 0:
            # Cleared first: a byte cleared after the datagram could be the next sleep's.
            shared[index] = 0
            self._send(shared, index - _STATES)
            index = shared.find(wanted, index + 1, _RECORDS)

    def slot(self, kind: int) -> Slot:
        """A place to sleep at; one per sleeping thread.

        :raises OSError: if there is no socket, no file, or no free place.
        """
        shared = self._map
        if shared is None:
            raise OSError(errno.ENOENT, "no doorbell file")
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            receiver.setblocking(False)
            receiver.bind(("127.0.0.1", 0))
            port = receiver.getsockname()[1]
            with self._lock, _exclusive(self._fd):
                index = _free_slot(shared)
                shared[_STATES + index] = 0
                _RECORD.pack_into(shared, _RECORDS + index * _RECORD.size, os.getpid(), port)
        except BaseException:
            receiver.close()
            raise
        return Slot(self, shared, index, kind, receiver)

    def close(self) -> None:
        """Let go of the file. Slots have to be closed before."""
        shared, self._map = self._map, None
        if shared is not None:
            shared.close()
            os.close(self._fd)
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def _send(self, shared: mmap.mmap, index: int) -> None:
        _, port = _RECORD.unpack_from(shared, _RECORDS + index * _RECORD.size)
        with contextlib.suppress(OSError):  # gone, or its buffer is full: then it is awake
            if self._sender is None:
                self._sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                self._sender.setblocking(False)
            self._sender.sendto(b"!", ("127.0.0.1", port))


class Slot:
    """The place of one sleeper. Only its own thread may use it."""

    def __init__(
        self, bell: Doorbell, shared: mmap.mmap, index: int, kind: int, receiver: socket.socket
    ) -> None:
        self._bell = bell
        self._shared = shared
        self._index = index
        self._kind = kind
        self._receiver = receiver
        self._pid = os.getpid()

    def arm(self) -> None:
        """Ask to be woken. Look at the database once more after this."""
        self._shared[_STATES + self._index] = self._kind

    def disarm(self) -> None:
        """Spare the others the ringing."""
        self._shared[_STATES + self._index] = 0

    def fileno(self) -> int:
        """Readable when somebody rang, until :meth:`drain`."""
        return self._receiver.fileno()

    def drain(self) -> None:
        """Forget the rings so far."""
        with contextlib.suppress(OSError):
            while True:
                self._receiver.recv(16)

    def close(self) -> None:
        """Give the place back. In a forked child only the child's copy is closed."""
        if self._receiver.fileno() < 0:
            return
        self._receiver.close()
        if self._pid == os.getpid() and self._bell.available:
            self._shared[_STATES + self._index] = 0
            _RECORD.pack_into(self._shared, _RECORDS + self._index * _RECORD.size, 0, 0)

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


_BYTES = {kind: bytes([kind]) for kind in (MESSAGES, RESULTS, BROADCASTS)}


def path_for(url: str, prefix: str, file: str | None) -> str:
    """Where the bell of a database lies.

    :param url: the identity of a database server's database.
    :param prefix: the table prefix.
    :param file: the path of the SQLite file; the bell lies next to it. None: a server.
    """
    if file is not None:
        return f"{file}-{prefix.rstrip('_') or '_'}-bell"
    digest = hashlib.sha256(f"{url}\0{prefix}".encode()).hexdigest()[:20]
    user = os.getuid() if hasattr(os, "getuid") else 0
    return os.path.join(tempfile.gettempdir(), f"taskworker-{user}-{digest}-bell")


def _open(path: str) -> tuple[int, mmap.mmap]:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    fd = os.open(path, flags, 0o600)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if hasattr(os, "getuid") and status.st_uid not in (os.getuid(), 0):
            raise OSError(errno.EPERM, "belongs to another user")
        with _exclusive(fd):
            if os.fstat(fd).st_size < _SIZE:
                # Written, not stretched: a full disk has to show here, and not as a signal that
                # ends the process at the first use of the memory.
                content = _MAGIC + bytes(_SIZE - len(_MAGIC))
                if not _write_all(fd, content):
                    os.ftruncate(fd, 0)
                    raise OSError(errno.ENOSPC, "no space for it on the disk")
        shared = mmap.mmap(fd, _SIZE)
        if shared[: len(_MAGIC)] != _MAGIC:
            shared.close()
            raise OSError(errno.EINVAL, "not a doorbell file")
        return fd, shared
    except BaseException:
        os.close(fd)
        raise


def _write_all(fd: int, content: bytes) -> bool:
    try:
        return os.pwrite(fd, content, 0) == len(content)
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False


@contextlib.contextmanager
def _exclusive(fd: int) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def _free_slot(shared: mmap.mmap) -> int:
    dead: int | None = None
    for index in range(_SLOTS):
        pid, _ = _RECORD.unpack_from(shared, _RECORDS + index * _RECORD.size)
        if pid == 0:
            return index
        if dead is None and not _exists(pid):
            dead = index
    if dead is None:
        raise OSError(errno.ENOSPC, f"all {_SLOTS} places of the doorbell are taken")
    return dead


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def doorbell_for(url: str, options: Any = None) -> Doorbell:
    """The bell of a database, shared within this process.

    :param url: as for :func:`.engine.database_for`.
    """
    from .engine import database_for

    return database_for(url, options).doorbell
