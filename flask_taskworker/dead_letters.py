"""Messages that were set aside: look at them, run them once more, delete them.

Where the transport keeps dead letters itself, its channel has ``dead_letters()``, which
gives an object with ``list``, ``replay`` and ``delete``. Elsewhere they lie in a queue of
their own, next to the one they came from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import kombu

from .broker import Capabilities, capabilities_of
from .message import copy_of
from .queues import DEAD_SUFFIX, broker, known_queues

if TYPE_CHECKING:
    from .app import TaskApp

#: More than anybody keeps.
_ALL = 1_000_000


@dataclass(frozen=True)
class DeadLetter:
    """A message that is not delivered any more.

    ``id`` names it to :func:`replay` and :func:`delete`, which take ``task_id`` as well;
    ``deliveries`` and ``died_at`` are None where the broker does not say.
    """

    id: str
    queue: str
    reason: str
    task: str | None = None
    task_id: str | None = None
    deliveries: int | None = None
    died_at: datetime | None = None


def listing(app: TaskApp, queue: str | None = None, limit: int = 100) -> list[DeadLetter]:
    """Dead letters, oldest first.

    :param queue: only of this queue.
    :param limit: at most so many.
    :raises BrokerUnavailableError: if the broker cannot be reached.
    """
    with broker(app) as connection:
        if capabilities_of(connection).lists_dead_letters:
            kept = connection.default_channel.dead_letters().list(queue, limit)
            return [_kept(letter) for letter in kept]
        found: list[DeadLetter] = []
        for name in _queues(app, queue):
            with contextlib.closing(_lying(connection, name, limit - len(found))) as lying:
                found += [_parked(raw, name) for raw in lying]
        return found


def replay(app: TaskApp, ids: Iterable[str] | None = None, queue: str | None = None) -> int:
    """Put dead letters back on their queues, as if they had never been delivered.

    :param ids: which; None: all.
    :param queue: only of this queue.
    :return: how many.
    :raises BrokerUnavailableError: if the broker cannot be reached.

    A crash in the middle leaves each message in one of the two places, or in both.
    """

    def again(raw: Any, name: str) -> None:
        app.publisher.send(name, copy_of(raw, {}))

    return _change(app, "replay", again, ids, queue)


def delete(app: TaskApp, ids: Iterable[str] | None = None, queue: str | None = None) -> int:
    """Delete dead letters for good; the arguments are those of :func:`replay`.

    :return: how many.
    :raises BrokerUnavailableError: if the broker cannot be reached.
    """
    return _change(app, "delete", lambda raw, name: None, ids, queue)


def _change(
    app: TaskApp,
    verb: str,
    before: Callable[[Any, str], None],
    ids: Iterable[str] | None,
    queue: str | None,
) -> int:
    wanted = None if ids is None else set(ids)
    with broker(app) as connection:
        if capabilities_of(connection).lists_dead_letters:
            store = connection.default_channel.dead_letters()
            letters = [
                letter for letter in store.list(queue, _ALL) if _is_in(_kept(letter), wanted)
            ]
            return int(getattr(store, verb)([letter.id for letter in letters], queue))
        count = 0
        for name in _queues(app, queue):
            with contextlib.closing(_lying(connection, name, _ALL)) as lying:
                for raw in lying:
                    if _is_in(_parked(raw, name), wanted):
                        before(raw, name)
                        raw.ack()
                        count += 1
        return count


def _is_in(letter: DeadLetter, wanted: set[str] | None) -> bool:
    return wanted is None or letter.id in wanted or letter.task_id in wanted


def _queues(app: TaskApp, queue: str | None) -> list[str]:
    return [queue] if queue else known_queues(app)


def _lying(connection: kombu.Connection, queue: str, limit: int) -> Generator[Any, None, None]:
    """The messages in the queue of dead letters; those not acknowledged lie there afterwards."""
    name = queue + DEAD_SUFFIX
    if not _exists(connection, name):
        return
    channel = connection.channel()
    seen: list[Any] = []
    try:
        while len(seen) < limit:
            raw = channel.basic_get(name)
            if raw is None:
                return
            if hasattr(channel, "message_to_python"):  # RabbitMQ's client has a form of its own
                raw = channel.message_to_python(raw)
            seen.append(raw)
            yield raw
    finally:
        for raw in seen:
            if not raw.acknowledged:
                _put_back(raw, channel, capabilities_of(connection))
        channel.close()


def _put_back(raw: Any, channel: Any, capabilities: Capabilities) -> None:
    if capabilities.leased:  # it counts deliveries, and to look at a message is none
        channel.requeue(raw.delivery_tag, count_delivery=False)
    else:
        raw.requeue()


def _exists(connection: kombu.Connection, name: str) -> bool:
    channel = connection.channel()
    try:
        channel.queue_declare(queue=name, passive=True)
    except connection.channel_errors:
        return False
    finally:
        channel.close()
    return True


def _kept(letter: Any) -> DeadLetter:
    """A dead letter as a transport keeps it."""
    task, task_id = _names(letter.headers)
    return DeadLetter(
        str(letter.id), letter.queue, letter.reason, task, task_id, letter.attempts, letter.died_at
    )


def _parked(raw: Any, queue: str) -> DeadLetter:
    """A dead letter that lies in a queue."""
    headers = raw.headers if isinstance(raw.headers, Mapping) else {}
    task, task_id = _names(headers)
    return DeadLetter(
        task_id or "-", queue, str(headers.get("x-dead-letter-reason", "")), task, task_id
    )


def _names(headers: Mapping[str, Any]) -> tuple[str | None, str | None]:
    task, task_id = headers.get("task"), headers.get("id")
    return (task if isinstance(task, str) else None, task_id if isinstance(task_id, str) else None)
