"""Which queues a consumer reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import kombu

from ..publisher import task_queue


class Subscriptions:
    """Changed in the consumer's thread, while it is connected; any thread may look.

    :param queues: the queues to read, by name.
    """

    def __init__(self, queues: Sequence[str]) -> None:
        #: The names of the queues, those that rest included.
        self.queues = list(queues)
        #: Queues that rest, because the broker itself would hand out their messages.
        self.resting: set[str] = set()
        #: What is read from, by the queue's name, where it is not what the name says.
        self._entities: dict[str, kombu.Queue] = {}

    def entity(self, name: str) -> kombu.Queue:
        """The queue that is read under a name."""
        return self._entities.get(name) or task_queue(name)

    def connect(
        self, channel: Any, on_message: Callable[[Any], None], prefetch_count: int
    ) -> kombu.Consumer:
        """Read the queues from a new channel."""
        self._consumer = kombu.Consumer(
            channel,
            queues=[self.entity(name) for name in self.queues if name not in self.resting],
            on_message=on_message,
            # kombu could not decompress it; parse() says so
            on_decode_error=lambda raw, exc: on_message(raw),
            prefetch_count=prefetch_count,
            tag_prefix="taskworker-",
        )
        self._consumer.consume()
        return self._consumer

    def add(self, queue: kombu.Queue) -> None:
        """Read another queue."""
        name = queue.name
        before = self._entities.get(name)
        self._entities[name] = queue
        try:
            if name not in self.resting:
                self._read(name)
        except BaseException:  # the broker refuses it: it must not be tried for ever
            self._entities.pop(name)
            if before is not None:
                self._entities[name] = before
            raise
        if name not in self.queues:
            self.queues.append(name)

    def cancel(self, name: str) -> None:
        """Read a queue no more."""
        if name in self.queues:
            self.queues.remove(name)
        self._consumer.cancel_by_queue(name)

    def rest(self, name: str) -> None:
        """Stop reading a queue until :meth:`resume`."""
        self.resting.add(name)
        if name in self.queues:
            self._consumer.cancel_by_queue(name)

    def resume(self, name: str) -> None:
        """Undo :meth:`rest`."""
        self.resting.discard(name)
        if name in self.queues:
            self._read(name)

    def _read(self, name: str) -> None:
        if not self._consumer.consuming_from(name):
            self._consumer.add_queue(self.entity(name))
            self._consumer.consume()
