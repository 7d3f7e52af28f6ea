"""The queues of an app, from outside: what is in them, empty them, pause them.

Each function opens a connection of its own and closes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import kombu
from kombu.exceptions import ChannelError

from .broker import Capabilities, broker_connection, capabilities_of, recoverable_errors
from .config import mask_url
from .exceptions import BrokerUnavailableError, UnsupportedByBrokerError

if TYPE_CHECKING:
    from .app import TaskApp

#: What is appended to a queue's name for its dead letters, where the broker keeps none.
DEAD_SUFFIX = ".dead"


class QueueState(NamedTuple):
    """A queue and the number of messages in it; None is what the broker cannot say.

    ``delayed`` wait for their time, ``unacked`` are in the hands of workers, ``dead`` were
    set aside. ``consumers`` read the queue now; ``paused`` ones hand out nothing.
    """

    name: str
    waiting: int
    delayed: int | None = None
    unacked: int | None = None
    dead: int | None = None
    consumers: int | None = None
    paused: bool | None = None


def known_queues(app: TaskApp) -> list[str]:
    """The default queue, and each queue that one of the app's tasks names."""
    named = {task.options_.get("queue") for task in app.registry.values()}
    return list(dict.fromkeys([app.config.default_queue, *sorted(filter(None, named))]))


def states(app: TaskApp, queues: Sequence[str] | None = None) -> list[QueueState]:
    """What is in some queues.

    :param queues: which; the default is every queue that the broker can list, and
        :func:`known_queues`.
    :raises BrokerUnavailableError: if the broker cannot be reached.
    """
    names = list(queues) if queues else known_queues(app)
    with broker(app) as connection:
        capabilities = capabilities_of(connection)
        if not capabilities.queue_states:
            return [_counted(connection, name, capabilities) for name in names]
        found = {
            state.name: QueueState(
                state.name,
                state.waiting,
                state.delayed,
                state.unacked,
                state.dead,
                paused=state.paused,
            )
            for state in connection.default_channel.queue_states()
        }
    absent = [name for name in names if name not in found]
    rows = [*found.values(), *(QueueState(name, 0, 0, 0, 0, paused=False) for name in absent)]
    return sorted(row for row in rows if not queues or row.name in names)


def purge(app: TaskApp, queues: Iterable[str]) -> dict[str, int]:
    """Delete what waits in some queues; what a worker has in its hands stays.

    :return: how many messages were deleted, by queue.
    :raises BrokerUnavailableError: if the broker cannot be reached.
    """
    with broker(app) as connection:
        return {name: _purge(connection, name) for name in dict.fromkeys(queues)}


def pause(app: TaskApp, queue: str, paused: bool = True) -> None:
    """Stop handing out the messages of a queue, to any worker, or begin again.

    Where the broker cannot do so, the workers are asked; see
    :meth:`~flask_taskworker.control.Control.pause_queue`.

    :raises UnsupportedByBrokerError: if the broker cannot keep that.
    :raises BrokerUnavailableError: if it cannot be reached.
    """
    with broker(app) as connection:
        capabilities = capabilities_of(connection)
        if capabilities.pause:
            connection.default_channel.pause_queue(queue, paused)
        elif capabilities.fanout:
            (app.control.pause_queue if paused else app.control.resume_queue)(queue)
        else:
            raise UnsupportedByBrokerError(
                f"the broker {mask_url(app.config.broker_url)} cannot pause a queue for all "
                "workers; a SQL database, Redis and RabbitMQ can"
            )


@contextlib.contextmanager
def broker(app: TaskApp) -> Iterator[kombu.Connection]:
    """A connection to the app's broker.

    :raises BrokerUnavailableError: if it, or something inside the block, fails for that.
    """
    connection = broker_connection(app.config, role="publish")
    try:
        yield connection
    except recoverable_errors(connection) as exc:
        if isinstance(exc, BrokerUnavailableError):
            raise
        cause = str(exc).rstrip(".") or type(exc).__name__
        raise BrokerUnavailableError(
            f"broker {mask_url(app.config.broker_url)} cannot be used: {cause}. Is it running?"
        ) from exc
    finally:
        with contextlib.suppress(Exception):  # it may be broken
            connection.release()


def _counted(connection: kombu.Connection, name: str, capabilities: Capabilities) -> QueueState:
    waiting, consumers = _declared(connection, name)
    dead, _ = _declared(connection, name + DEAD_SUFFIX)
    counted = consumers if capabilities.counts_consumers else None
    return QueueState(name, waiting, dead=dead, consumers=counted)


def _declared(connection: kombu.Connection, name: str) -> tuple[int, int]:
    """Messages and consumers of a queue, which is not made for that."""
    with _own_channel(connection) as channel:
        try:
            declared = channel.queue_declare(queue=name, passive=True)
        except ChannelError:  # there is none
            return 0, 0
        return int(declared.message_count), int(declared.consumer_count)


def _purge(connection: kombu.Connection, name: str) -> int:
    with _own_channel(connection) as channel:
        try:
            return int(channel.queue_purge(name) or 0)
        except ChannelError:
            return 0


@contextlib.contextmanager
def _own_channel(connection: kombu.Connection) -> Iterator[Any]:
    """A channel for one question: RabbitMQ closes it when the answer is no."""
    connection.ensure_connection(max_retries=1, interval_start=0)
    channel = connection.channel()
    try:
        yield channel
    finally:
        with contextlib.suppress(Exception):
            channel.close()
