"""A database connection that one thread holds for as long as it likes.

SQLAlchemy opens it (and knows each driver's URL and arguments); statements then go
straight to the driver, because a publish costs little more than its INSERT.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ... import clock
from .errors import DatabaseUnavailableError, DeadlockError
from .forking import gate as _gate

if TYPE_CHECKING:
    from .dialects.base import Dialect
    from .engine import Database

T = TypeVar("T")
_DEADLOCK_RETRIES = 10


class Result(NamedTuple):
    """What one statement of a script did."""

    rowcount: int
    rows: Sequence[Any]


class HeldConnection:
    """A driver's connection in autocommit mode.

    One thread at a time may use it. After :func:`os.fork` a child finds it closed: it
    neither uses nor closes what belongs to its parent.

    :ivar usable: False once closed, lost, or inherited over a fork; take a new one then.
    """

    __slots__ = (
        "__weakref__", "_cursor", "_dialect", "busy_timeout", "database", "durable",
        "in_transaction", "raw", "usable",
    )  # fmt: skip

    def __init__(self, database: Database, raw: Any, durable: bool, busy_timeout: float) -> None:
        self.database = database
        self.raw = raw
        self.busy_timeout = busy_timeout
        self.durable = durable
        self.in_transaction = False
        self.usable = True
        self._dialect: Dialect = database.dialect
        self._cursor = raw.cursor()

    def execute(self, sql: str, params: Sequence[Any] = ()) -> Any:
        """Run one statement in the driver's own parameter style.

        :returns: the driver's cursor; read it before the next statement.
        :raises DatabaseUnavailableError: locked, lost, full; see there.
        :raises DatabaseUnusableError: corrupt, read-only.
        """
        _gate.enter(self)
        try:
            self._cursor.execute(sql, params)
        except self._dialect.driver_errors as exc:
            self._recover(exc, lambda: self._cursor.execute(sql, params))
        finally:
            _gate.leave(self)
        return self._cursor

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        """Run one statement for each row, inside a transaction.

        :returns: how many rows were changed in all.
        """
        _gate.enter(self)
        try:
            return self._dialect.executemany(self._cursor, sql, rows)
        except self._dialect.driver_errors as exc:
            self._give_up(exc)
            raise  # not reached
        finally:
            _gate.leave(self)

    def script(self, sql: str, params: Sequence[Any] = ()) -> list[Result]:
        """Run several statements, with ``;`` between them, in one round trip.

        Only where the dialect connects for that. What follows a failed statement is not run,
        and nothing is tried again: call it within :meth:`retried`.
        """
        cursor = self._cursor
        _gate.enter(self)
        try:
            cursor.execute(sql, params)
            results = [_result(cursor)]
            while cursor.nextset():
                results.append(_result(cursor))
            return results
        except self._dialect.driver_errors as exc:
            self._give_up(exc)
            raise  # not reached
        finally:
            _gate.leave(self)

    def heard(self) -> list[str]:
        """The payloads of the notifications that came in so far; see the dialect's ``listen``.

        :raises DatabaseUnavailableError: if the connection is lost.
        """
        _gate.enter(self)
        try:
            return self._dialect.heard(self.raw)
        except self._dialect.driver_errors as exc:
            self._give_up(exc)
            raise  # not reached
        finally:
            _gate.leave(self)

    def begin(self) -> None:
        """Begin a transaction that may write."""
        self.execute(self._dialect.begin)
        self.in_transaction = True

    def commit(self) -> None:
        self.execute("COMMIT")
        self.in_transaction = False

    def rollback(self) -> None:
        """Undo the transaction; a connection that cannot even do that is closed."""
        self.in_transaction = False
        if not self.usable:
            return
        try:
            with _gate.inside():
                self._cursor.execute("ROLLBACK")
        except self._dialect.driver_errors as exc:
            # SQLite ends the transaction itself after some errors.
            if not self._dialect.is_no_transaction(exc):
                self.close()

    def transaction(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a transaction, again if the database chose it as deadlock victim.

        :param work: called once per attempt; must not keep anything from a failed one.
        """

        def whole() -> T:
            self.begin()
            outcome = work()
            self.commit()
            return outcome

        return self.retried(whole)

    def retried(self, work: Callable[[], T]) -> T:
        """Run ``work``, a whole transaction, again if it is chosen as deadlock victim.

        :param work: called once per attempt; what it leaves open is rolled back if it raises.
        """
        for attempt in range(_DEADLOCK_RETRIES):
            try:
                return work()
            except DeadlockError:
                self.rollback()
                if attempt == _DEADLOCK_RETRIES - 1:
                    raise
            except BaseException:
                self.rollback()
                raise
        raise AssertionError("unreachable")

    def set_durable(self, durable: bool) -> None:
        """Choose whether a commit waits until the data has reached the disk."""
        if durable != self.durable:
            self._dialect.set_durable(self, durable)
            self.durable = durable

    @contextlib.contextmanager
    def lasting(self) -> Iterator[None]:
        """Have what is committed inside reach the disk: a table that is made must stay."""
        before = self.durable
        self.set_durable(True)
        try:
            yield
        finally:
            if self.usable:
                self.set_durable(before)

    def close(self) -> None:
        """Close it. Safe to call again, and in a forked child, where it does nothing."""
        if self.usable:
            self.usable = False
            with contextlib.suppress(Exception):  # a broken connection may fail to close
                self._cursor.close()
            with _gate.inside(), contextlib.suppress(Exception):
                self.raw.close()

    def abandon(self) -> None:
        """Forget it without a word to the database; for a forked child."""
        self.usable = False

    def _recover(self, exc: Exception, again: Callable[[], object]) -> None:
        """Wait for a lock as long as allowed; raise a translated error otherwise."""
        deadline = clock.monotonic() + self.busy_timeout
        while self._dialect.is_busy(exc) and self._dialect.may_wait(self):
            if clock.monotonic() >= deadline:
                break
            try:
                again()
                return
            except self._dialect.driver_errors as again_exc:
                exc = again_exc
        self._give_up(exc)

    def _give_up(self, exc: Exception) -> None:
        if self._dialect.is_lost(self.raw, exc):
            self.close()
            self.database.janitor.lost_touch()
            raise DatabaseUnavailableError(
                f"the connection to {self.database.label} was lost: {_text(exc)}"
            ) from exc
        raise self._dialect.translate(exc, self.database.label, self.busy_timeout) from exc


def _result(cursor: Any) -> Result:
    return Result(cursor.rowcount, cursor.fetchall() if cursor.description else ())


def _text(exc: BaseException) -> str:
    return str(exc).strip() or type(exc).__name__
