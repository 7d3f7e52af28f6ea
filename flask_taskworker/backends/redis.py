"""Results in Redis, in the keys and the form that Celery uses.

``celery-task-meta-<id>`` holds the record as JSON and is published on a channel of the
same name in the same transaction: a waiting client subscribes, reads once, and listens.
"""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

import redis

from .. import states
from .base import ChordPart, Finish, Header, ResultBackend, TaskRecord, Transaction, timed_out
from .encoding import dumps, loads
from .meta import from_meta, to_meta
from .redis_chords import RedisChords

if TYPE_CHECKING:
    from ..config import Config

PREFIX = "celery-task-meta-"
#: How long a read or a connection attempt may take. Seconds.
TIMEOUT = 5.0


class RedisBackend(ResultBackend):
    """Keeps records in Redis; redis-py's pool makes it safe for threads and forks."""

    transient_errors = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert config.result_backend is not None
        self._client: Any = redis.Redis.from_url(
            config.result_backend,
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            health_check_interval=25,
        )

    def store(self, record: TaskRecord) -> None:
        key = PREFIX + record.task_id
        value = dumps(to_meta(record.done_now()), self.config.result_serializer)
        with self._client.pipeline(transaction=True) as pipe:
            while not self._replace(pipe, key, value, record.status):
                pass  # somebody else wrote in between: look again

    def _replace(self, pipe: Any, key: str, value: bytes, status: str) -> bool:
        """Write a record, unless what is stored has to stay; False if it has to be done again."""
        if status != states.SUCCESS:  # which may replace anything
            pipe.watch(key)
            stored = pipe.get(key)
            known = None if stored is None else self._read(stored).status
            if not states.may_follow(known, status):
                return True
            pipe.multi()
        expires = self.config.result_expires
        pipe.set(key, value, px=int(expires * 1000) if expires else None)
        pipe.publish(key, value)
        try:
            pipe.execute()
        except redis.WatchError:
            return False
        return True

    def fetch(self, task_id: str) -> TaskRecord | None:
        value = self._client.get(PREFIX + task_id)
        return None if value is None else self._read(value)

    def wait(self, task_id: str, timeout: float | None = None) -> TaskRecord:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._client.pubsub(ignore_subscribe_messages=True) as pubsub:
            pubsub.subscribe(PREFIX + task_id)
            record = self.fetch(task_id)
            while record is None or record.status not in states.READY_STATES:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise timed_out(task_id, timeout)
                message = pubsub.get_message(timeout=1.0 if left is None else min(left, 1.0))
                if message is not None and message.get("data"):
                    record = self._read(message["data"])
        return record

    def forget(self, task_id: str) -> None:
        self._client.delete(PREFIX + task_id)

    # -- groups and chords ----------------------------------------------------------------

    @cached_property
    def _chords(self) -> RedisChords:
        serializer = self.config.result_serializer
        return RedisChords(
            self._client,
            lambda value: dumps(value, serializer),
            lambda data: loads(data, serializer),
            self.config.result_expires,
        )

    def save_group(self, group_id: str, shape: Any) -> None:
        self._chords.save_group(group_id, shape)

    def restore_group(self, group_id: str) -> Any:
        return self._chords.restore_group(group_id)

    def forget_group(self, group_id: str) -> None:
        self._chords.forget_group(group_id)

    def ensure_chords(self) -> None:
        pass

    def open_chord(
        self,
        group_id: str,
        size: int,
        shape: Any = None,
        transaction: Transaction | None = None,
    ) -> None:
        self._chords.open(group_id, size, shape)

    def grow_chord(self, group_id: str) -> None:
        self._chords.grow(group_id)

    def arrive(
        self, group_id: str, part: ChordPart, finish: Finish, record: TaskRecord | None = None
    ) -> Header | None:
        if record is not None:
            self.store(record)
        return self._chords.arrive(group_id, part, finish)

    def close_chord(self, group_id: str) -> None:
        self._chords.close(group_id)

    def close(self) -> None:
        self._client.close()

    def _read(self, value: bytes) -> TaskRecord:
        return from_meta(loads(value, self.config.result_serializer))
