"""Reading and judging database URLs."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from ...exceptions import ConfigurationError
from ...urls import DATABASES, pick_driver

#: File systems on which SQLite's locks and shared memory do not work between hosts.
_NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "afs", "ncpfs", "9p", "ceph",
     "glusterfs", "lustre", "gpfs", "fuse.sshfs", "fuse.glusterfs", "fuse.s3fs"}
)  # fmt: skip
_DIALECTS = ("sqlite", "postgresql", "mysql", "mariadb")


def parse(text: str) -> URL:
    """A database URL, with or without the ``taskworker+`` in front.

    :raises ConfigurationError: if this transport cannot use it.
    """
    text = text.removeprefix("taskworker+")
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as exc:
        raise ConfigurationError(
            f"{_masked(text)!r} is no database URL ({exc}). Write for example "
            "taskworker+sqlite:////var/lib/app/queue.db or "
            "taskworker+postgresql+psycopg://user:password@host/database"
        ) from None
    backend = url.get_backend_name()
    if backend not in _DIALECTS:
        raise ConfigurationError(
            f"{_masked(text)!r}: the SQL transport knows {', '.join(_DIALECTS)}, not {backend}"
        )
    if backend == "sqlite":
        return _absolute(url)
    if "+" not in url.drivername:
        # kombu takes a name before a "+" for that of the transport, so that a URL next to
        # transport="..." cannot name the driver.
        url = url.set(drivername=f"{backend}+{pick_driver(DATABASES[backend], '')}")
    return url


def identity(url: URL) -> str:
    """What tells one database from another; holds the password, so never show it."""
    return url.render_as_string(hide_password=False)


def _masked(text: str) -> str:
    scheme, separator, rest = text.partition("://")
    return f"{scheme}{separator}***@{rest.rpartition('@')[2]}" if "@" in rest else text


def file_of(url: URL) -> str | None:
    """The path of a SQLite file; None for a server.

    Links are followed, as SQLite does for the files that it keeps beside this one: whoever uses
    the file by another name has to find the same bell and the same locks there.
    """
    if url.get_backend_name() != "sqlite":
        return None
    name = url.database or ""
    if name.startswith("file:"):  # a URI, as SQLite understands it
        name = unquote(urlsplit(name).path)
    return os.path.realpath(Path(name).expanduser())


def _absolute(url: URL) -> URL:
    name = url.database or ""
    is_uri = name.startswith("file:")
    path = unquote(urlsplit(name).path) if is_uri else name
    in_memory = url.query.get("mode") == "memory" or url.query.get("vfs") == "memdb"
    if path in ("", ":memory:") or "mode=memory" in name or in_memory:
        raise ConfigurationError(
            f"{url}: a database in memory cannot be shared, so it cannot carry messages. "
            "Use a file, for example taskworker+sqlite:////tmp/queue.db, or kombu's own "
            "memory:// within one process."
        )
    file = str(file_of(url))
    refuse_network_file_system(Path(file))
    return url.set(database=f"file:{quote(file)}" if is_uri else file)


def refuse_network_file_system(path: Path, mounts: str = "/proc/self/mounts") -> None:
    """Refuse a SQLite file that lies on a file system shared between hosts.

    :raises ConfigurationError: naming the file and its file system.
    """
    kind = _file_system(path, mounts)
    if kind in _NETWORK_FILE_SYSTEMS:
        raise ConfigurationError(
            f"{path} lies on a network file system ({kind}), where SQLite cannot lock reliably. "
            "Put the file on a local disk, or use PostgreSQL or MariaDB to share a queue "
            "between hosts."
        )


def _file_system(path: Path, mounts: str) -> str | None:
    try:
        lines = Path(mounts).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None  # not Linux: nothing to ask
    best, kind = "", None
    real = os.path.realpath(path)
    for line in lines:
        parts = line.split(" ")
        if len(parts) < 3:
            continue
        point = parts[1].replace("\\040", " ")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, parts[2]
    return kind
