"""The channel: kombu's, but for how it consumes, settles and publishes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kombu.transport import redis as kombu_redis
from redis.exceptions import RedisError, ResponseError

from ... import failpoints
from .claims import Claims, Keys
from .lease import LeaseKeeper, too_often
from .options import Options
from .records import dead_letter, delivery_count, dumps, loads, redelivered
from .wire import Wire, connection_parameters

if TYPE_CHECKING:
    from .transport import Transport

log = logging.getLogger(__name__)

#: What is appended to a queue's name for its dead letters.
DEAD_SUFFIX = ".dead"
#: Messages that need no acknowledgement are taken so many at a time: they die with their taker.
_UNKEPT = 1


class QoS(kombu_redis.QoS):  # type: ignore[misc]
    """Settles through the channel's claims; counts what is claimed against the prefetch."""

    channel: Channel

    def append(self, message: Any, delivery_tag: Any) -> None:
        """A message of a fanout queue: nobody keeps it, so there is nothing to note."""

    def can_consume(self) -> bool:
        return self.room() > 0

    def room(self) -> int:
        """How many more messages the channel may have."""
        claims = self.channel.known_claims
        return (self.prefetch_count or 1000) - (0 if claims is None else len(claims.claimed))

    def can_consume_max_estimate(self) -> int:
        return max(self.room(), 0)

    def get(self, delivery_tag: Any) -> Any:
        raise KeyError(delivery_tag)

    def ack(self, delivery_tag: Any) -> None:
        claims = self.channel.known_claims
        if claims is not None:
            claims.acknowledge(delivery_tag)

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        if requeue:
            self.channel.requeue(delivery_tag)
        else:
            self.ack(delivery_tag)

    def restore_unacked(self, client: Any = None) -> None:
        self.channel.recover()

    def restore_unacked_once(self, stderr: Any = None) -> None:
        self._on_collect.cancel()


class Channel(kombu_redis.Channel):  # type: ignore[misc]
    """A channel of our Redis transport."""

    QoS = QoS
    connection: Transport

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: By queue: whether its messages are settled, and what takes them.
        self._takers: dict[str, tuple[bool, Callable[[Any], object]]] = {}
        self.known_claims: Claims | None = None
        self._payloads: dict[int, dict[str, Any]] = {}
        self._keeper: LeaseKeeper | None = None
        self._publisher: Wire | None = None
        super().__init__(*args, **kwargs)
        self.options = Options.read(self.connection.client.transport_options or {})

    # -- names and connections ------------------------------------------------------------

    def _make(self) -> Any:
        kind, parameters = connection_parameters(self._connparams())
        return kind(**parameters)

    def _key(self, name: str) -> str:
        return f"{self.global_keyprefix}{name}"

    def _list_for(self, queue: str, payload: dict[str, Any] | None) -> str:
        priority = self._get_message_priority(payload or {"properties": {}}, reverse=False)
        return self._key(self._q_for_pri(queue, priority))

    def _home(self, queue: str, text: bytes) -> str:
        try:
            payload = loads(text)
        except ValueError:
            payload = None
        return self._list_for(queue, payload)

    @property
    def claims(self) -> Claims:
        """The claims of this channel; with the first use its lease begins."""
        if self.known_claims is None:
            keys = Keys(
                self._key(self.unacked_key),
                self._key(self.unacked_index_key),
                self._key(f"{self.unacked_key}_leases"),
            )
            self.known_claims = Claims(self._make, keys, self.options, self._home)
            self._keeper = LeaseKeeper(
                self.known_claims, self._make, self._list_for, self._restore_foreign
            )
            self._keeper.start()
        return self.known_claims

    def _restore_foreign(self) -> None:
        """Put back what kombu's consumers left unacknowledged, by kombu's own rule."""
        self.qos.restore_visible(num=self.unacked_restore_limit, interval=1)

    def _queue_bind(self, exchange: str, *args: Any) -> None:
        try:
            super()._queue_bind(exchange, *args)
        except ResponseError as exc:
            if "maxmemory" not in str(exc):
                raise
            # Only who publishes to the exchange needs it; a full server is to be drained.
            log.warning("the binding to exchange %s is not stored: %s", exchange, exc)

    def _size(self, queue: str) -> int:
        # Not in one transaction, as kombu asks: a full server refuses those.
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            for step in self.priority_steps:
                pipe.llen(self._q_for_pri(queue, step))
            return sum(pipe.execute())

    # -- publishing -----------------------------------------------------------------------

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        if kwargs.get("_publish_batch") is not None or queue in getattr(self, "_expires", ()):
            super()._put(queue, message, **kwargs)
            return
        if self._publisher is None:
            self._publisher = Wire(self._make)
        self._publisher.push(self._list_for(queue, message), dumps(message))

    def _next_delivery_tag(self) -> str:
        return os.urandom(16).hex()

    # -- consuming ------------------------------------------------------------------------

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[[Any], object], *args: Any, **kwargs: Any
    ) -> Any:
        answer = super().basic_consume(queue, no_ack, callback, *args, **kwargs)
        if queue not in self.active_fanout_queues:
            self._takers[queue] = (not no_ack, callback)
            self.claims.forget_quiet()
        return answer

    def _basic_cancel(self, consumer_tag: str) -> Any:
        queue = self._tag_to_queue.get(consumer_tag)
        answer = super()._basic_cancel(consumer_tag)
        if queue not in self._tag_to_queue.values():
            self._takers.pop(queue or "", None)
        return answer

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """One message, or None."""
        got: list[Any] = []
        if self._claim(
            [queue], 1, keep=not no_ack, deliver=lambda queue, message: got.append(message)
        ):
            return got[0] if got else None
        return None

    def hungry(self) -> bool:
        """Whether it consumes from lists and may have more."""
        return bool(self._takers) and self.qos.room() > 0

    def quiet(self) -> bool:
        """Whether there is nothing to claim, as far as is known."""
        return self.known_claims is not None and self.known_claims.quiet()

    def drain(self) -> bool:
        """Deliver what is there without waiting; False if there is nothing."""
        delivered = self._drain_fanout()
        if not self.hungry() or self.quiet():
            if self.known_claims is not None:
                self.known_claims.flush_if_due()
            return delivered
        order = self._queue_cycle.consume(len(self.active_queues))
        for keep in (True, False):
            queues = [queue for queue in order if self._takers.get(queue, (None,))[0] is keep]
            if queues:
                most = self.qos.room() if keep else _UNKEPT
                delivered = self._claim(queues, most, keep, self._deliver) or delivered
        return delivered

    def _claim(
        self,
        queues: list[str],
        most: int,
        keep: bool,
        deliver: Callable[[str, Any], object],
    ) -> bool:
        lists = [
            self._key(self._q_for_pri(queue, step))
            for step in self.priority_steps
            for queue in queues
        ]
        share = self.queue_order_strategy == "round_robin"
        failpoints.hit("before_claim")
        taken = self.claims.claim(queues, lists, most, share=share, keep=keep)
        failpoints.hit("after_claim")
        some, first = False, True
        for number, queue, text in taken:
            if first:
                self._queue_cycle.rotate(queue)
                first = False
            message = self._read(number, queue, text, keep)
            if message is not None:
                deliver(queue, message)
                some = True
        self._warn_of_refused()
        return some

    def _deliver(self, queue: str, message: Any) -> None:
        taker = self._takers.get(queue)
        if taker is None:  # cancelled while its messages were on their way
            self.requeue(message.delivery_tag, count_delivery=False)
        else:
            taker[1](message)

    def _read(self, number: int, queue: str, text: bytes, keep: bool) -> Any:
        """The message of a text; None if it is set aside."""
        payload: dict[str, Any] | bytes = text
        try:
            payload = loads(text)
            count = delivery_count(payload)
            if keep and count >= self.options.max_deliveries:
                self._set_aside(number, queue, payload, too_often(count))
                return None
            payload["properties"]["delivery_count"] = count + 1
            payload["properties"].setdefault("delivery_tag", "")
            message = self.Message(payload, channel=self)
        except Exception as exc:
            if keep:
                reason = f"the message cannot be read: {type(exc).__name__}: {exc}"
                self._set_aside(number, queue, payload, reason)
            return None
        message.delivery_tag = number
        if keep:
            self._payloads[number] = payload
        return message

    def _set_aside(
        self, number: int, queue: str, text: bytes | dict[str, Any], reason: str
    ) -> None:
        log.error("a message in queue %s is parked: %s", queue, reason)
        self.claims.move_payload(
            number, self._list_for(queue + DEAD_SUFFIX, None), dead_letter(text, reason)
        )

    def _warn_of_refused(self) -> None:
        claims = self.claims
        if claims.refused > 0:
            log.warning(
                "%d messages were settled too late: they are delivered again", claims.refused
            )
        claims.refused = 0

    # -- fanout ---------------------------------------------------------------------------

    def listening(self) -> Any:
        """The socket for fanout exchanges; None if there are no such consumers."""
        if not self.active_fanout_queues:
            return None
        client = self.subclient
        if client.connection is None:  # old releases of kombu ask in a way that is deprecated
            client.connection = client.connection_pool.get_connection()
        self.connection.cycle._register_LISTEN(self)
        return client.connection._sock

    def _drain_fanout(self) -> bool:
        return self.listening() is not None and bool(self._receive_waiting())

    def _receive_waiting(self) -> bool:
        connection = self.subclient.connection
        return bool(connection.can_read(timeout=0)) and bool(self._receive())

    # -- settling -------------------------------------------------------------------------

    def requeue(
        self, delivery_tag: Any, count_delivery: bool = True, *, head: bool = False
    ) -> None:
        """Put a message back.

        :param count_delivery: whether that was a delivery. Then the message comes to the end of
            the line; else it takes its old place at the head.
        :param head: whether it takes its old place in any case.
        """
        claims = self.claims
        payload = self._payloads.pop(delivery_tag, None)
        claimed = claims.claimed.get(delivery_tag)
        if claimed is None:
            return
        if count_delivery and payload is not None:
            changed = redelivered(payload, delivery_count(payload))
            to = self._list_for(claimed.queue, payload)
            claims.move_payload(delivery_tag, to, changed, head=head)
        else:
            claims.give_back(delivery_tag)

    def dead_letter(self, delivery_tag: Any, reason: str) -> None:
        """Set a message aside with the reason: into the queue ``<queue>.dead``."""
        claims = self.claims
        payload = self._payloads.pop(delivery_tag, None)
        claimed = claims.claimed.get(delivery_tag)
        if claimed is not None and payload is not None:
            to = self._list_for(claimed.queue + DEAD_SUFFIX, None)
            claims.move_payload(delivery_tag, to, dead_letter(payload, reason))

    def basic_ack(self, delivery_tag: Any, multiple: bool = False) -> None:
        tags = [delivery_tag]
        if multiple and self.known_claims is not None:
            tags = [tag for tag in list(self.known_claims.claimed) if tag <= delivery_tag]
        for tag in tags:
            self._payloads.pop(tag, None)
            self.qos.ack(tag)

    def flush(self, wait: bool = True) -> None:
        """Write what is settled.

        :param wait: until it is known to be done.
        """
        if self.known_claims is not None:
            self.known_claims.flush(wait=wait)

    def recover(self) -> None:
        """Put back whatever is not settled; that was a delivery."""
        if self.known_claims is not None:
            for number in list(self.known_claims.claimed):
                self.requeue(number, head=True)
            self.flush()

    # -- the end --------------------------------------------------------------------------

    def close(self) -> None:
        """Give back what is not settled, and close. Never waits long."""
        if self.closed:
            return
        if self._keeper is not None:
            self._keeper.stop()
        try:
            if self.known_claims is not None:
                self.known_claims.close()
        except (RedisError, OSError) as exc:
            log.warning("unsettled messages come back when the lease ends (%s)", exc)
            self._fanout_queues: dict[str, Any] = {}  # their bindings cannot be removed now
        finally:
            self._takers.clear()
            if self._publisher is not None:
                self._publisher.close()
            super().close()
