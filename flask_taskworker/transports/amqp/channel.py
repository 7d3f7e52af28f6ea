"""The channel: publishing with a delay, acknowledging in bulk."""

from __future__ import annotations

import re
import struct
from typing import Any

from kombu.transport import pyamqp

from ... import clock

#: Powers of two of seconds that a message can wait in the broker: up to 24 days.
LEVELS = 21
LONGEST_DELAY = 2**LEVELS - 1
_PREFIX = "taskworker_delayed"
#: What waited for a queue that is gone by then.
_LOST = f"{_PREFIX}_lost"
#: A routing key has at most 255 bytes. A word of it that is a wildcard would match more.
_MAY_WAIT = re.compile(r"[^*#]{1,200}")
#: What RabbitMQ notes on a message that waited.
_HISTORY = re.compile(r"x-(?:death|first-death-.*|last-death-.*)$")
#: The frame of ``basic.ack``: frame type, channel, length, class, method, tag, multiple, end.
_ACK = struct.Struct(">BHIHHQBB")


class Channel(pyamqp.Channel):  # type: ignore[misc]
    """A channel that can delay what it publishes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._waits_for: set[str] = set()
        super().__init__(*args, **kwargs)
        # Bodies stay bytes: whoever knows the type of the content makes the most of them.
        self.auto_decode = False

    # -- queues ---------------------------------------------------------------------------

    def _queue_arguments(self) -> dict[str, Any]:
        client = getattr(self.connection, "client", None)
        options = (client.transport_options if client is not None else None) or {}
        return dict(options.get("queue_arguments") or {})

    def queue_declare(
        self,
        queue: str = "",
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = True,
        nowait: bool = False,
        arguments: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Declare a queue; a lasting one without arguments gets the configured ones."""
        if durable and not exclusive and not auto_delete and not arguments and not passive:
            arguments = self._queue_arguments() or None
        return super().queue_declare(
            queue, passive, durable, exclusive, auto_delete, nowait, arguments, **kwargs
        )

    def basic_qos(
        self, prefetch_size: int, prefetch_count: int, a_global: bool, **kwargs: Any
    ) -> None:
        """Limit what is delivered and not settled.

        The limit is the channel's, so that it can change: a consumer keeps the one that it was
        begun with. Quorum queues know consumers' alone, so there it is set once.
        """
        # A quarter of what may be underway: the server never waits for acknowledgements.
        self.connection.bundle = max(1, prefetch_count // 4)
        quorum = self._queue_arguments().get("x-queue-type") == "quorum"
        if not (quorum and self.callbacks):
            super().basic_qos(prefetch_size, prefetch_count, not quorum, **kwargs)

    def basic_ack(self, delivery_tag: int, multiple: bool = False, **kwargs: Any) -> None:
        """Acknowledge; sent with whatever is written next, or by :meth:`flush`."""
        frame = _ACK.pack(1, self.channel_id, 13, 60, 80, delivery_tag, int(multiple), 0xCE)
        self.connection.collect_frame(frame)

    def flush(self) -> None:
        """Send what is acknowledged."""
        self.connection.flush()

    # -- publishing -----------------------------------------------------------------------

    def basic_publish_confirm(
        self, msg: Any, exchange: str = "", routing_key: str = "", **kwargs: Any
    ) -> Any:
        """Publish; return once the server has it. A property ``eta_at`` lets it wait there.

        :raises ChannelError: with ``mandatory=True``, if there is no such queue.
        """
        eta = msg.properties.pop("eta_at", None)
        if eta is not None and not exchange and _MAY_WAIT.fullmatch(routing_key):
            seconds = min(int(eta - clock.wall()), LONGEST_DELAY)
            if seconds >= 1:
                exchange, routing_key = self._way(routing_key, seconds)
        return super().basic_publish_confirm(msg, exchange, routing_key, **kwargs)

    def message_to_python(self, raw_message: Any) -> Any:
        """The message without the history of its waiting.

        RabbitMQ takes a message that comes by a second time with that history for one that goes
        round in circles, and drops it.
        """
        headers = raw_message.properties.get("application_headers")
        if headers and "x-death" in headers:
            for name in [name for name in headers if _HISTORY.match(name)]:
                del headers[name]
        return super().message_to_python(raw_message)

    # -- waiting --------------------------------------------------------------------------

    def _way(self, queue: str, seconds: int) -> tuple[str, str]:
        """Exchange and routing key of a message that is to wait."""
        name = f"{_PREFIX}_quorum" if self._has_safe_queues() else _PREFIX
        if not self._waits_for:
            self._build_way(name)
        if queue not in self._waits_for:
            # Exactly the name: "#." would match each queue whose name ends like this one.
            self.queue_bind(queue, f"{name}_end", "*." * LEVELS + queue)
            self._waits_for.add(queue)
        bits = ".".join(format(seconds, f"0{LEVELS}b"))
        return f"{name}_{seconds.bit_length() - 1}", f"{bits}.{queue}"

    def _has_safe_queues(self) -> bool:
        properties = self.connection.server_properties
        found = re.match(r"(\d+)\.(\d+)", str(properties.get("version", "")))
        return found is not None and (int(found[1]), int(found[2])) >= (3, 10)

    def _build_way(self, name: str) -> None:
        """Declare the row of exchanges and queues; what is there stays. One round trip."""
        self.exchange_declare(_LOST, "fanout", durable=True, auto_delete=False, nowait=True)
        super().queue_declare(_LOST, durable=True, auto_delete=False, nowait=True)
        self.queue_bind(_LOST, _LOST, "", nowait=True)
        self.exchange_declare(
            f"{name}_end", "topic", durable=True, auto_delete=False, nowait=True,
            arguments={"alternate-exchange": _LOST},
        )  # fmt: skip
        following = f"{name}_end"
        for level in range(LEVELS):
            here = f"{name}_{level}"
            arguments: dict[str, Any] = {
                "x-message-ttl": 1000 * 2**level,
                "x-dead-letter-exchange": following,
            }
            if name != _PREFIX:
                arguments |= {
                    "x-queue-type": "quorum",
                    "x-dead-letter-strategy": "at-least-once",
                    "x-overflow": "reject-publish",
                }
            self.exchange_declare(here, "topic", durable=True, auto_delete=False, nowait=True)
            super().queue_declare(
                here, durable=True, auto_delete=False, nowait=True, arguments=arguments
            )
            before = "*." * (LEVELS - 1 - level)
            self.queue_bind(here, here, f"{before}1.#", nowait=True)
            self.exchange_bind(following, here, f"{before}0.#", nowait=True)
            following = here

    # -- the end --------------------------------------------------------------------------

    def close(self, *args: Any, **kwargs: Any) -> None:
        """Close the channel; a connection that does not answer is dropped."""
        connection = self.connection
        if connection is None:
            return
        try:
            with connection.hurried():
                super().close(*args, **kwargs)
        except connection.connection_errors:
            connection.collect()
