"""SQLite in WAL mode: one writer at a time, readers never in the way."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import DatabaseUnavailableError, DatabaseUnusableError
from ..url import file_of
from .base import Dialect, Peer

if TYPE_CHECKING:
    from ..connection import HeldConnection
    from ..engine import Database
    from ..options import Options

#: SQLite's own waiting sleeps up to 100 ms at a time, and unfairly. It waits this long,
#: about six short sleeps; then the loop in HeldConnection begins anew.
_BUSY_MS = 20
#: SQLite's result codes, which the module names from Python 3.11 on.
_BUSY, _LOCKED = 5, 6
_CHECKPOINT_PAGES = 250
_WAL_LIMIT = 64 * 1024 * 1024


def _text(stored: bytes) -> str:
    return stored.decode("utf-8", "replace")


class SQLiteDialect(Dialect):
    name: ClassVar[str] = "sqlite"
    marker: ClassVar[str] = "?"
    begin = "BEGIN IMMEDIATE"
    for_update: ClassVar[str] = ""
    looks_first: ClassVar[bool] = True
    free_lock_is_proof: ClassVar[bool] = True
    driver_errors = (sqlite3.Error,)

    def __init__(self, url: Any, names: Any) -> None:
        super().__init__(url, names)
        self._file = str(file_of(url))
        self._select_ready = self.sql(
            "SELECT id, queue, prio, attempts, meta, body FROM {message} "
            "WHERE queue = ? AND owner = 0 ORDER BY prio, id LIMIT ?"
        )
        self._delete_one = self.sql("DELETE FROM {message} WHERE owner = ? AND id = ?")

    # -- connections ----------------------------------------------------------------------

    def connect_args(self, options: Options) -> dict[str, Any]:
        # A held connection may pass from thread to thread, never be in two at once.
        return {"check_same_thread": False, "isolation_level": None, "timeout": _BUSY_MS / 1000}

    def prepare(self, raw: Any, durable: bool, busy_timeout: float) -> None:
        raw.isolation_level = None
        # A text that was made invalid by hand must not stop whoever reads the rows around it.
        raw.text_factory = _text
        # While somebody creates the file, recovers its log or closes it, nobody may even read.
        raw.execute(f"PRAGMA busy_timeout = {int(busy_timeout * 1000)}")
        # Reading first: a file that is no database must not be touched.
        raw.execute("SELECT count(*) FROM sqlite_master").fetchone()
        mode = raw.execute("PRAGMA journal_mode").fetchone()[0]
        raw.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
        if mode != "wal":
            # Fails while somebody uses the file in another mode; the old mode works, slower.
            with contextlib.suppress(sqlite3.OperationalError):
                raw.execute("PRAGMA journal_mode = WAL")
        raw.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        # A short log is written over and over in place. Growing it costs each durable commit.
        raw.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")

    def set_durable(self, connection: HeldConnection, durable: bool) -> None:
        connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")

    # -- errors ---------------------------------------------------------------------------

    def is_busy(self, exc: Exception) -> bool:
        code = getattr(exc, "sqlite_errorcode", None)
        if code is not None:
            return code & 0xFF in (_BUSY, _LOCKED)
        return "locked" in str(exc)  # Python 3.10 has no error codes

    def may_wait(self, connection: HeldConnection) -> bool:
        return True  # nothing was done when SQLite says "busy"

    def is_lost(self, raw: Any, exc: Exception) -> bool:
        return isinstance(exc, sqlite3.ProgrammingError) and "closed" in str(exc)

    def is_no_transaction(self, exc: Exception) -> bool:
        return "no transaction is active" in str(exc)

    def translate(self, exc: Exception, label: str, waited: float) -> Exception:
        text = str(exc)
        if self.is_busy(exc):
            return DatabaseUnavailableError(
                f"{label} was locked by another connection for {waited:g} s. "
                "Keep write transactions short, or use a file of its own for the queue."
            )
        if "full" in text:
            return DatabaseUnavailableError(
                f"{label} cannot grow: {text}. Free some space on the disk."
            )
        if "not a database" in text or "malformed" in text:
            return DatabaseUnusableError(
                f"{label} is damaged or no SQLite database ({text}). It was left as it is. "
                "Restore it from a backup, or move it away and a new one will be created."
            )
        if "readonly" in text:
            return DatabaseUnusableError(
                f"{label} cannot be written ({text}). Give this user write permission on the "
                "file and on its folder."
            )
        if "unable to open" in text:
            return self._cannot_open(label)
        if "no such" in text or "syntax error" in text:
            return DatabaseUnusableError(f"{label}: {text}")
        return super().translate(exc, label, waited)

    def _cannot_open(self, label: str) -> Exception:
        folder = os.path.dirname(self._file)
        if not os.path.isdir(folder):
            return DatabaseUnusableError(
                f"{label} cannot be opened: the folder {folder} does not exist. Create it."
            )
        if not os.access(folder, os.W_OK):
            return DatabaseUnusableError(
                f"{label} cannot be opened: the folder {folder} is not writable for this user."
            )
        return DatabaseUnusableError(
            f"{label} cannot be opened. Check that it is a file this user may read and write."
        )

    # -- tables ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def schema_lock(self, connection: HeldConnection) -> Iterator[None]:
        connection.begin()
        try:
            yield
            connection.commit()
        except BaseException:
            connection.rollback()
            raise

    def is_missing_table(self, exc: BaseException) -> bool:
        return "no such table" in str(exc)

    # -- messages -------------------------------------------------------------------------

    def select_ready(self, connection: HeldConnection, queue: int, limit: int) -> list[Any]:
        rows: list[Any] = connection.execute(self._select_ready, (queue, limit)).fetchall()
        return rows

    def delete_owned(self, connection: HeldConnection, owner: int, ids: Sequence[int]) -> int:
        if len(ids) > 3:
            return super().delete_owned(connection, owner, ids)
        # A text that does not change is not parsed again.
        return sum(connection.execute(self._delete_one, (owner, id)).rowcount for id in ids)

    # -- life signs -----------------------------------------------------------------------

    def hold_lock(self, database: Database, connection: HeldConnection, consumer: int) -> bool:
        return database.process_locks.hold(consumer)

    def drop_lock(self, database: Database, connection: HeldConnection, consumer: int) -> None:
        database.process_locks.drop(consumer)

    def peers(self, database: Database, connection: HeldConnection) -> list[Peer]:
        rows = connection.execute(self.sql("SELECT id, seen FROM {consumer}")).fetchall()
        return [Peer(id, seen, database.process_locks.is_held(id)) for id, seen in rows]

    def maintain(self, database: Database, connection: HeldConnection) -> None:
        """Shorten a WAL file that a long reader let grow."""
        try:
            size = os.stat(f"{self._file}-wal").st_size
        except OSError as exc:
            if exc.errno != errno.ENOENT:
                raise
            return
        if size > _WAL_LIMIT:
            with contextlib.suppress(DatabaseUnavailableError):  # a reader is still there
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
