"""The kombu transport ``amqp://`` for workers and publishers of ours."""

from __future__ import annotations

from typing import ClassVar

from kombu.transport import pyamqp

from .. import Capabilities
from .connection import Connection as AMQPConnection


class Transport(pyamqp.Transport):  # type: ignore[misc]
    """RabbitMQ. At least once."""

    Connection = AMQPConnection
    capabilities: ClassVar[Capabilities] = Capabilities(
        delayed=True, returns=True, buffers=True, fanout=True, counts_consumers=True
    )
