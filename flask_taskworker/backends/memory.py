"""Results in this process's memory, for the in-memory broker and for tests."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from .. import clock, states
from .base import ResultBackend, TaskRecord, timed_out
from .encoding import dumps, loads

if TYPE_CHECKING:
    from ..config import Config


class MemoryBackend(ResultBackend):
    """A dictionary that waits."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        #: The records, each with its result as it would stand in a store.
        self._records: dict[str, tuple[TaskRecord, bytes]] = {}
        self._changed = threading.Condition()

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
