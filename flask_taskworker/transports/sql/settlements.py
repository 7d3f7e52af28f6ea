"""What became of delivered messages, collected until a transaction carries it.

Any thread may add; only the thread that owns the channel writes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ... import clock, failpoints
from . import routing
from .errors import DatabaseUnusableError

if TYPE_CHECKING:
    from .connection import HeldConnection
    from .dialects import Dialect
    from .dialects.base import Encoded

Statement = tuple[str, Sequence[Any]]


class Settlement(NamedTuple):
    """One message leaving this consumer.

    ``owner`` is the consumer's id at the time of the claim; if the message has another
    owner by now, the settlement is refused.
    """

    kind: Literal["ack", "requeue", "dead_letter"]
    id: int
    owner: int
    #: Run in the same transaction, and only if the message was still ours.
    statements: Sequence[Statement] = ()
    #: Stored in the same transaction, and only then: (queue, message).
    messages: Sequence[tuple[str, Encoded]] = ()
    #: The kind of sleeper to wake after the commit.
    ring: int | None = None
    #: Requeue: not before this time, in epoch seconds.
    due: float | None = None
    #: Requeue: whether this delivery counts.
    counted: bool = True
    reason: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether nothing else is to be written with it."""
        return not self.statements and not self.messages


class SettlementBuffer:
    """Settlements that wait for a transaction."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: list[Settlement] = []
        self._since = 0.0

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: Settlement) -> None:
        with self._lock:
            if not self._items:
                self._since = clock.monotonic()
            self._items.append(item)

    def take(self) -> list[Settlement]:
        """Remove and return everything."""
        with self._lock:
            items, self._items = self._items, []
        return items

    def peek(self) -> list[Settlement]:
        """What waits now."""
        return self._items

    def put_back(self, items: list[Settlement]) -> None:
        """Return what could not be written."""
        with self._lock:
            self._items[:0] = items

    def age(self) -> float:
        """Seconds the oldest has waited."""
        return clock.monotonic() - self._since if self._items else 0.0


class NoLongerOwnedError(Exception):
    """Fewer messages were ours than were to be settled; the transaction must not commit."""


def apply(connection: HeldConnection, dialect: Dialect, batch: Sequence[Settlement]) -> None:
    """Write settlements within the current transaction.

    :raises NoLongerOwnedError: if one of the messages is not ours any more.
    """
    for (kind, owner), group in groupby(sorted(batch, key=_by_kind), key=_by_kind):
        items = list(group)
        changed = _WRITERS[kind](connection, dialect, owner, items)
        if changed != len({item.id for item in items}):
            raise NoLongerOwnedError
    _run_statements(connection, batch)
    for item in batch:
        for queue, message in item.messages:
            routing.put(connection, queue, message)


def settle(
    connection: HeldConnection, dialect: Dialect, batch: Sequence[Settlement]
) -> list[Settlement]:
    """Write settlements in a transaction of their own.

    :returns: those that were refused, because the messages had been taken away.
    """
    with_points(batch, "before")
    lost: list[Settlement] = []
    first = batch[0]
    if len(batch) == 1 and first.kind == "ack" and first.is_plain:
        if dialect.delete_owned(connection, first.owner, [first.id]) == 0:
            lost = [first]
    else:
        try:
            connection.transaction(lambda: apply(connection, dialect, batch))
        except NoLongerOwnedError:
            lost = connection.transaction(lambda: _settle_owned(connection, dialect, batch))
    with_points(batch, "after")
    return lost


def with_points(batch: Iterable[Settlement], moment: Literal["before", "after"]) -> None:
    """Hit the failpoints of the settlements' kinds."""
    for kind in sorted({item.kind for item in batch}):
        failpoints.hit(f"{moment}_{kind}")


def _settle_owned(
    connection: HeldConnection, dialect: Dialect, batch: Sequence[Settlement]
) -> list[Settlement]:
    """Settle what is still ours, each message once; return the rest."""
    owned: set[tuple[int, int]] = set()
    for owner in {item.owner for item in batch}:
        ids = [item.id for item in batch if item.owner == owner]
        owned |= {(owner, id) for id in dialect.select_owned(connection, owner, ids)}
    good: list[Settlement] = []
    lost: list[Settlement] = []
    for item in batch:
        key = (item.owner, item.id)
        (good if key in owned else lost).append(item)
        owned.discard(key)
    if good:
        apply(connection, dialect, good)
    return lost


def _by_kind(item: Settlement) -> tuple[str, int]:
    return item.kind, item.owner


def _acknowledge(
    connection: HeldConnection, dialect: Dialect, owner: int, items: list[Settlement]
) -> int:
    return dialect.delete_owned(connection, owner, [item.id for item in items])


def _requeue(
    connection: HeldConnection, dialect: Dialect, owner: int, items: list[Settlement]
) -> int:
    changed = 0
    message = dialect.names.message

    def key(item: Settlement) -> tuple[float, bool]:
        return (-1.0 if item.due is None else item.due), item.counted

    for (due, counted), group in groupby(sorted(items, key=key), key=key):
        ids = dialect.ids(item.id for item in group)
        attempts = "" if counted else ", attempts = attempts - 1"
        where = f"WHERE owner = {owner:d} AND id IN ({ids})"
        if due < 0:
            sql = f"UPDATE {message} SET owner = 0, due = NULL{attempts} {where}"
            changed += connection.execute(sql).rowcount
        else:
            sql = f"UPDATE {message} SET owner = -1, due = {dialect.marker}{attempts} {where}"
            changed += connection.execute(sql, (due,)).rowcount
    return changed


def _dead_letter(
    connection: HeldConnection, dialect: Dialect, owner: int, items: list[Settlement]
) -> int:
    sql = dialect.sql(
        "UPDATE {message} SET owner = -2, due = NULL, reason = ?, died = ? "
        "WHERE owner = ? AND id = ?"
    )
    now = connection.database.now()
    return sum(
        connection.execute(sql, (item.reason, now, owner, item.id)).rowcount for item in items
    )


_WRITERS: dict[str, Callable[[HeldConnection, Dialect, int, list[Settlement]], int]] = {
    "ack": _acknowledge,
    "requeue": _requeue,
    "dead_letter": _dead_letter,
}


def _run_statements(connection: HeldConnection, batch: Sequence[Settlement]) -> None:
    """Run the extra statements, equal ones together."""
    by_text: dict[str, list[Sequence[Any]]] = {}
    for item in batch:
        for sql, params in item.statements:
            by_text.setdefault(sql, []).append(params)
    for sql, rows in by_text.items():
        if len(rows) == 1:
            connection.execute(sql, rows[0])
        else:
            connection.executemany(sql, rows)


def settle_one_by_one(
    connection: HeldConnection, dialect: Dialect, batch: Sequence[Settlement]
) -> tuple[list[Settlement], list[tuple[Settlement, DatabaseUnusableError]]]:
    """Settle each message alone, because one of them has a statement that cannot run.

    :returns: the refused ones, and the faulty ones with their error.
    """
    lost: list[Settlement] = []
    faulty: list[tuple[Settlement, DatabaseUnusableError]] = []
    for item in batch:
        try:
            lost += settle(connection, dialect, [item])
        except DatabaseUnusableError as exc:
            faulty.append((item, exc))
    return lost, faulty
