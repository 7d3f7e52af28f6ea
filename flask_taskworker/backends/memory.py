"""Results in this process's memory, for the in-memory broker and for tests."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .. import clock, states
from .base import (
    ChordPart,
    Finish,
    Header,
    ResultBackend,
    TaskRecord,
    Transaction,
    in_order,
    timed_out,
)
from .encoding import dumps, loads

if TYPE_CHECKING:
    from ..config import Config


@dataclass
class _Chord:
    size: int
    shape: Any
    parts: dict[tuple[str, int | None], ChordPart] = field(default_factory=dict)
    #: Held while the body is sent.
    lock: threading.RLock = field(default_factory=threading.RLock)
    over: bool = False


class MemoryBackend(ResultBackend):
    """A dictionary that waits."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        #: The records, each with its result as it would stand in a store.
        self._records: dict[str, tuple[TaskRecord, bytes]] = {}
        self._changed = threading.Condition()
        self._groups: dict[str, Any] = {}
        self._chords: dict[str, _Chord] = {}

    def store(self, record: TaskRecord) -> None:
        # Through the serializer, as every other backend: what works here works there.
        data = dumps(record.result, self.config.result_serializer)
        record = replace(record.done_now(), result=None)
        with self._changed:
            stored = self._records.get(record.task_id)
            if states.may_follow(stored[0].status if stored else None, record.status):
                self._records[record.task_id] = record, data
                self._changed.notify_all()

    def fetch(self, task_id: str) -> TaskRecord | None:
        with self._changed:
            stored = self._records.get(task_id)
        return self._read(*stored) if stored else None

    def wait(self, task_id: str, timeout: float | None = None) -> TaskRecord:
        def ready() -> tuple[TaskRecord, bytes] | None:
            stored = self._records.get(task_id)
            return stored if stored and stored[0].status in states.READY_STATES else None

        with self._changed:
            stored = self._changed.wait_for(ready, timeout)
        if stored is None:
            raise timed_out(task_id, timeout)
        return self._read(*stored)

    def _read(self, record: TaskRecord, data: bytes) -> TaskRecord:
        return replace(record, result=loads(data, self.config.result_serializer))

    def forget(self, task_id: str) -> None:
        with self._changed:
            self._records.pop(task_id, None)

    def save_group(self, group_id: str, shape: Any) -> None:
        self._groups[group_id] = shape

    def restore_group(self, group_id: str) -> Any:
        return self._groups.get(group_id)

    def forget_group(self, group_id: str) -> None:
        self._groups.pop(group_id, None)

    def ensure_chords(self) -> None:
        pass

    def open_chord(
        self,
        group_id: str,
        size: int,
        shape: Any = None,
        transaction: Transaction | None = None,
    ) -> None:
        self._chords[group_id] = _Chord(size, shape)

    def grow_chord(self, group_id: str) -> None:
        chord = self._chords.get(group_id)
        if chord is not None:
            with chord.lock:
                chord.size += 1

    def arrive(
        self, group_id: str, part: ChordPart, finish: Finish, record: TaskRecord | None = None
    ) -> Header | None:
        if record is not None:
            self.store(record)
        # Through the serializer, as every other backend.
        data = loads(dumps(part.result, self.config.result_serializer),
                     self.config.result_serializer)  # fmt: skip
        chord = self._chords.get(group_id)
        if chord is None:
            return None
        with chord.lock:
            chord.parts.setdefault((part.task_id, part.index), replace(part, result=data))
            if chord.over or len(chord.parts) < chord.size:
                return None
            header = Header(group_id, in_order(chord.parts.values()), chord.shape)
            if not finish(header, None):
                chord.over = True
                return header
            chord.over = True
            self._chords.pop(group_id, None)
            return None

    def close_chord(self, group_id: str) -> None:
        self._chords.pop(group_id, None)

    def cleanup(self) -> int:
        expires = self.config.result_expires
        if not expires:
            return 0
        oldest = clock.wall() - expires
        with self._changed:
            old = [
                task_id
                for task_id, (record, _) in self._records.items()
                if record.date_done and record.date_done.timestamp() < oldest
            ]
            for task_id in old:
                del self._records[task_id]
        return len(old)
