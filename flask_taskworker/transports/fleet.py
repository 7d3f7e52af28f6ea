"""What a broker keeps for all of its workers: the tasks that are revoked, the queues that rest.

A broker with no place for it (RabbitMQ, memory) has none: there the workers tell each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from .sql.channel import Channel as SQLChannel

#: How many revocations are kept, and read when a worker starts.
LIMIT = 50_000
_STAMP = "stamp:"
_REVOKED, _PAUSED = "taskworker:revoked", "taskworker:paused"


class Fleet(Protocol):
    """Belongs to the thread that owns the channel; raises what the channel raises."""

    def revoke(self, entries: Iterable[str], until: float) -> None:
        """Keep revocations until then, in epoch seconds."""

    def revoked(self) -> list[tuple[str, float]]:
        """What is revoked, and until when; oldest first."""

    def pause(self, queue: str, paused: bool) -> None:
        """Let a queue rest, or no more."""

    def paused(self) -> set[str]:
        """The queues that rest."""

    #: Whether the broker itself hands out nothing from a resting queue.
    pauses_by_itself: bool


def fleet_of(channel: Any) -> Fleet | None:
    """What the broker of a channel keeps for all workers; None if it keeps nothing."""
    if hasattr(channel, "pause_queue"):
        return _SQLFleet(channel)
    if getattr(channel.connection, "driver_type", "") == "redis":
        return _RedisFleet(channel)
    return None


class Stamp(NamedTuple):
    """A stamp whose tasks are revoked."""

    header: str
    value: str

    @property
    def entry(self) -> str:
        """As it is kept among the ids of revoked tasks."""
        return _STAMP + json.dumps(self)


def read_entry(entry: str) -> str | Stamp | None:
    """A task's id or a stamp; None for what is neither."""
    if not entry.startswith(_STAMP):
        return entry
    try:
        header, value = json.loads(entry[len(_STAMP) :])
    except (ValueError, TypeError):
        return None
    return Stamp(str(header), str(value))


class _SQLFleet:
    """In the tables of the queue."""

    pauses_by_itself = True

    def __init__(self, channel: SQLChannel) -> None:
        self._channel = channel

    def revoke(self, entries: Iterable[str], until: float) -> None:
        from .sql import revocations

        revocations.add(self._channel.held(), entries, until)

    def revoked(self) -> list[tuple[str, float]]:
        from .sql import revocations

        return revocations.entries(self._channel.held(), LIMIT)

    def pause(self, queue: str, paused: bool) -> None:
        self._channel.pause_queue(queue, paused)

    def paused(self) -> set[str]:
        return self._channel.paused_queues()


class _RedisFleet:
    """A sorted set of revocations by their end, and a set of queues."""

    pauses_by_itself = False

    def __init__(self, channel: Any) -> None:
        import redis

        prefix = getattr(channel, "global_keyprefix", "") or ""
        self._client: Any = redis.Redis(connection_pool=channel.pool)
        self._revoked, self._paused = prefix + _REVOKED, prefix + _PAUSED

    def revoke(self, entries: Iterable[str], until: float) -> None:
        from .. import clock

        new = dict.fromkeys(entries, until)
        with self._client.pipeline() as pipe:
            if new:
                pipe.zadd(self._revoked, new)
            pipe.zremrangebyscore(self._revoked, "-inf", clock.wall())
            pipe.zremrangebyrank(self._revoked, 0, -LIMIT - 1)
            pipe.execute()

    def revoked(self) -> list[tuple[str, float]]:
        from .. import clock

        found = self._client.zrangebyscore(self._revoked, clock.wall(), "+inf", withscores=True)
        return [(_text(entry), float(until)) for entry, until in found]

    def pause(self, queue: str, paused: bool) -> None:
        change = self._client.sadd if paused else self._client.srem
        change(self._paused, queue)

    def paused(self) -> set[str]:
        return {_text(name) for name in self._client.smembers(self._paused)}


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
