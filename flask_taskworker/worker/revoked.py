"""The tasks that must not run: bounded, and forgotten after a while."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .. import clock
from ..transports.fleet import LIMIT, Stamp, read_entry

if TYPE_CHECKING:
    from ..message import TaskMessage


class Revoked:
    """What a worker knows of revocations. Written by one thread, asked by another.

    :param limit: how many ids, and how many stamps, at most; the oldest go first.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        # Until when each holds, in epoch seconds; the oldest first.
        self._ids: dict[str, float] = {}
        self._stamps: dict[Stamp, float] = {}

    def add(self, ids: Iterable[str], until: float) -> None:
        """Revoke tasks by id."""
        for task_id in ids:
            self._ids.pop(task_id, None)
            self._ids[task_id] = until
        _trim(self._ids, self._limit)

    def add_stamps(self, stamps: Iterable[Stamp], until: float) -> None:
        """Revoke the tasks that carry one of these stamps."""
        for stamp in stamps:
            self._stamps.pop(stamp, None)
            self._stamps[stamp] = until
        _trim(self._stamps, self._limit)

    def load(self, entries: Iterable[tuple[str, float]]) -> None:
        """Take over what the broker keeps."""
        for text, until in entries:
            entry = read_entry(text)
            if isinstance(entry, Stamp):
                self.add_stamps([entry], until)
            elif entry is not None:
                self.add([entry], until)

    def ids(self) -> list[str]:
        """The ids that are revoked now, the oldest first."""
        now = clock.wall()
        return [task_id for task_id, until in list(self._ids.items()) if until > now]

    def covers(self, message: TaskMessage) -> bool:
        """Whether the task of a message is revoked."""
        if self._ids:
            until = self._ids.get(message.id)
            if until is not None and until > clock.wall():
                return True
        return bool(self._stamps and message.stamps) and self._is_stamped(message)

    def _is_stamped(self, message: TaskMessage) -> bool:
        now = clock.wall()
        return any(self._stamps.get(stamp, 0.0) > now for stamp in stamps_on(message))


def stamps_on(message: TaskMessage) -> list[Stamp]:
    """The stamps that a message carries."""
    return [
        Stamp(str(header), str(value))
        for header, values in message.stamps.items()
        for value in (values if isinstance(values, (list, tuple)) else [values])
    ]


def _trim(kept: dict[Any, float], limit: int) -> None:
    while len(kept) > limit:
        del kept[next(iter(kept))]
