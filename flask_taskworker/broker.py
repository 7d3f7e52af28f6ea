"""Connections to the broker, with every wait bounded."""

from __future__ import annotations

import os
import select
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import kombu
from kombu.exceptions import OperationalError

from .exceptions import BrokerError, BrokerUnavailableError
from .transports import Capabilities, capabilities_of, cut

if TYPE_CHECKING:
    from .config import Config

__all__ = [
    "Capabilities",
    "broker_connection",
    "capabilities_of",
    "drop",
    "interrupt",
    "is_hopeless",
    "recoverable_errors",
    "sql_options",
    "wait_for_messages",
]

#: How long a consumer waits for a lock in a database. Seconds.
CONSUMER_BUSY_TIMEOUT = 15.0
#: How much longer than for locks a publisher waits for a database to answer. Seconds.
PUBLISHER_ANSWER_TIMEOUT = 0.5
#: One server of Redis, reached in the clear, by TLS, by a file. More than one is left to kombu.
_REDIS = frozenset({"redis", "rediss", "redis+socket"})
_AMQP = frozenset({"amqp", "amqps", "pyamqp"})
#: A broker that is silent for twice as long is gone. Seconds.
_HEARTBEAT = 10
#: How often a transport that can neither wake nor be selected on is asked. Seconds.
_POLL_BUSY, _POLL_IDLE = 0.002, 0.02
#: kombu tries to connect again by itself; who asks for a connection here does so already.
_NO_RETRY = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}


def broker_connection(
    config: Config, role: Literal["publish", "consume", "control"]
) -> kombu.Connection:
    """A connection to the configured broker; nothing is opened yet.

    :param role: a publisher's waits are cut by ``TASKER_PUBLISH_TIMEOUT``; a consumer
        may wait for messages as long as it likes. Remote control does both, and reads
        broadcasts alone.
    """
    options = {**_NO_RETRY, **_defaults(config, role), **config.transport_options}
    transport = None
    if config.broker_url.startswith("filesystem:"):
        _make_folders(options)
        transport = "flask_taskworker.transports.filesystem:Transport"
    elif _scheme(config.broker_url) in _AMQP:
        transport = "flask_taskworker.transports.amqp:Transport"
    elif _scheme(config.broker_url) in _REDIS:
        transport = "flask_taskworker.transports.redis:Transport"
    connection = kombu.Connection(
        config.broker_url,
        transport=transport,
        connect_timeout=config.publish_timeout / 2,
        transport_options=options,
        heartbeat=_HEARTBEAT if role != "publish" else 0,
    )
    if transport is not None:  # an address with a "+" names kombu's, whatever was given
        connection.transport_cls = transport
    return connection


def drop(connection: kombu.Connection) -> None:
    """Close a connection that failed. Never raises, and never waits for the other side."""
    with suppress(Exception):  # it was broken already
        if hasattr(connection.transport, "_collect"):
            connection.collect()  # AMQP says goodbye, and would wait for the answer
        else:
            connection.release()


def _scheme(url: str) -> str:
    return url.split("://", 1)[0]


def _make_folders(options: dict[str, Any]) -> None:
    """kombu's file transport expects its folders to be there."""
    for name in ("data_folder_in", "data_folder_out", "processed_folder", "control_folder"):
        if options.get(name):
            os.makedirs(options[name], mode=0o700, exist_ok=True)


def _defaults(config: Config, role: str) -> dict[str, Any]:
    timeout = config.publish_timeout / 2
    scheme = _scheme(config.broker_url)
    if scheme.startswith("taskworker+"):
        broadcasts = {"broadcasts": role == "control"}
        if role == "consume":
            return {**sql_options(config), "busy_timeout": CONSUMER_BUSY_TIMEOUT}
        busy = {"busy_timeout": config.publish_timeout, "answer_timeout": PUBLISHER_ANSWER_TIMEOUT}
        return {**sql_options(config), **busy, **broadcasts}
    if scheme in _AMQP:
        # A consumer reads only what is there, or the answer to a question of its own. What
        # remote control sends is of use now or never.
        wait = 2 * timeout if role == "consume" else timeout
        return {
            "confirm_publish": role != "control",
            "read_timeout": wait,
            "write_timeout": wait,
        }
    if scheme in _REDIS:
        # A consumer reads only what is there, or comes within a second: it needs no longer.
        return {
            "socket_connect_timeout": timeout,
            "socket_timeout": timeout if role == "publish" else 2 * timeout,
            "socket_keepalive": True,
            "retry_on_timeout": False,
            "lease": config.lease,
            "max_deliveries": config.max_deliveries,
            "fallback_interval": config.loop_interval,
        }
    return {}


def sql_options(config: Config) -> dict[str, Any]:
    """The options of our SQL transport that the settings decide."""
    return {
        "durability": config.durability,
        "lease": config.lease,
        "max_deliveries": config.max_deliveries,
        "max_message_bytes": config.max_message_bytes,
        "fallback_interval": config.loop_interval,
        **config.transport_options,
    }


def recoverable_errors(connection: kombu.Connection) -> tuple[type[BaseException], ...]:
    """The errors after which a new connection may succeed."""
    return (
        *connection.recoverable_connection_errors,
        *connection.recoverable_channel_errors,
        *connection.connection_errors,
        *connection.channel_errors,
        OperationalError,
        OSError,
    )


def is_hopeless(exc: BaseException) -> bool:
    """Whether trying again cannot help: a database that is damaged, or may not be written."""
    return isinstance(exc, BrokerError) and not isinstance(exc, BrokerUnavailableError)


def wait_for_messages(
    connection: kombu.Connection,
    capabilities: Capabilities,
    timeout: float,
    wake: int | None,
    *,
    busy: bool = False,
    poll: float | None = None,
) -> None:
    """Block until a message may be there, ``wake`` is readable, or ``timeout`` is over.

    :param timeout: seconds.
    :param wake: a file descriptor that some other thread makes readable, if there is one; it
        is not read.
    :param busy: whether tasks are running; a transport that has to be polled is then
        polled more often.
    :param poll: how often such a transport is polled instead, in seconds.
    """
    if capabilities.wake:
        connection.transport.wait(connection, timeout, wake)
        return
    if connection.transport.driver_type == "amqp":
        # Acknowledgements wait for others, but not for tasks that take long.
        timeout = min(timeout, connection.connection.flush_if_due())
    sockets = _sockets(connection)
    if not sockets:
        timeout = min(timeout, poll or (_POLL_BUSY if busy else _POLL_IDLE))
    select.select(sockets if wake is None else [*sockets, wake], [], [], timeout)


def interrupt(connection: kombu.Connection) -> bool:
    """End what another thread waits for on a connection, by cutting it. Never raises.

    :return: whether there was anything to cut.
    """
    cuts = [cut(descriptor) for descriptor in _descriptors(connection)]
    return any(cuts)


def _descriptors(connection: kombu.Connection) -> list[int]:
    """The sockets of an open connection."""
    opened = connection._connection  # the property would connect
    found: list[Any] = []
    if hasattr(opened, "descriptors"):
        found += opened.descriptors()
    found.append(getattr(getattr(opened, "transport", None), "sock", None))
    for channel in list(getattr(opened, "channels", None) or ()):
        for name in ("client", "subclient"):
            client = vars(channel).get(name)
            found.append(getattr(getattr(client, "connection", None), "_sock", None))
    descriptors = []
    for item in found:
        with suppress(Exception):  # closed meanwhile, or none
            descriptors.append(item if isinstance(item, int) else item.fileno())
    return descriptors


def _sockets(connection: kombu.Connection) -> list[Any]:
    """What becomes readable when the broker sends something."""
    driver = connection.transport.driver_type
    if driver == "amqp":
        return [connection.connection.sock]
    if driver == "redis":  # several servers
        cycle = connection.transport.cycle
        cycle.on_poll_start()  # ask the server, unless the question is still open
        return list(cycle.fds)
    return []
