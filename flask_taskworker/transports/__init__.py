"""Message transports for kombu, and what a transport can do.

Importing this module makes kombu know ``taskworker+<sqlalchemy url>``. It is cheap:
neither SQLAlchemy nor a driver is loaded before a connection is used.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kombu.transport import TRANSPORT_ALIASES, get_transport_cls

if TYPE_CHECKING:
    import kombu

__all__ = ["Capabilities", "capabilities_of", "cut"]


@dataclass(frozen=True)
class Capabilities:
    """What a transport can do. Code asks for these, never for the driver's name."""

    #: Messages with a property ``eta_at`` wait in the broker until they are due.
    delayed: bool = False
    #: ``channel.requeue(tag, delay=seconds, count_delivery=False)`` sends one back for a time.
    delayed_requeue: bool = False
    #: ``channel.dead_letter(tag, reason)`` keeps a message aside in one step.
    dead_letter: bool = False
    #: ``channel.dead_letters()`` finds what was kept aside; see
    #: :mod:`flask_taskworker.dead_letters`.
    lists_dead_letters: bool = False
    #: ``channel.settle_with(tag, statements, ring)`` stores a result together with the
    #: acknowledgement, in one transaction.
    atomic_settle: bool = False
    #: Settlements are collected until ``channel.flush()``.
    buffers: bool = False
    #: What is delivered stays this worker's over a lost connection, as long as it shows that it
    #: lives. ``channel.requeue(tag, count_delivery)`` gives back.
    leased: bool = False
    #: ``channel.basic_qos`` costs no round trip and may be called before each reserve.
    cheap_prefetch: bool = False
    #: ``transport.wait(connection, timeout, wake)`` sleeps until there is something to do.
    wake: bool = False
    #: Publishing with ``mandatory=True`` raises if no queue takes the message.
    returns: bool = False
    #: Fanout exchanges reach other processes.
    fanout: bool = False
    #: ``channel.pause_queue(queue, paused)`` stops handing out a queue's messages to anybody.
    pause: bool = False
    #: ``channel.queue_states()`` knows all queues and what is in them.
    queue_states: bool = False
    #: Declaring a queue says how many consume from it.
    counts_consumers: bool = False


#: kombu's own transports that count prefetched messages in this process only.
_VIRTUAL = frozenset(
    {
        "memory", "redis", "rediss", "sentinel", "filesystem", "sqla", "sqlalchemy", "SQS", "sqs",
        "mongodb", "zookeeper", "SLMQ", "slmq", "consul", "etcd", "azurestoragequeues",
        "azureservicebus", "pyro", "gcpubsub", "pgmq",
    }
)  # fmt: skip
_AMQP = frozenset({"amqp", "amqps", "pyamqp", "librabbitmq"})
_REAL = _AMQP | {"qpid", "confluentkafka", "kafka"}
#: Those of kombu whose fanout exchanges reach all who may listen. Memory reaches one process,
#: but nobody else can use that broker.
_FANOUT = _AMQP | {"memory", "redis", "rediss", "sentinel"}


def capabilities_of(connection: kombu.Connection) -> Capabilities:
    """What the transport of a connection can do; nothing is connected for it.

    :param connection: an open or unopened connection.
    :returns: the ``capabilities`` of the transport's class; for a transport that does
        not declare them, only what is safe to assume.
    """
    name = connection.transport_cls
    if name in _VIRTUAL:
        return Capabilities(cheap_prefetch=True, fanout=name in _FANOUT)
    if name in _REAL:
        return Capabilities(fanout=name in _FANOUT, counts_consumers=name in _AMQP)
    declared = getattr(get_transport_cls(name), "capabilities", None)
    return declared if isinstance(declared, Capabilities) else Capabilities()


def cut(descriptor: int) -> bool:
    """End whatever another thread waits for on a socket. Never raises.

    :return: whether there was anything to cut.
    """
    # shutdown() is for every copy of the descriptor; close() would be for this one.
    with suppress(OSError, ValueError), socket.socket(fileno=os.dup(descriptor)) as copy:
        copy.shutdown(socket.SHUT_RDWR)
        return True
    return False


TRANSPORT_ALIASES.setdefault("taskworker", "flask_taskworker.transports.sql:Transport")
