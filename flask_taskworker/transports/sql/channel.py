"""The kombu channel: publishing, consuming, closing.

Queues and bindings are in :mod:`.entities`, settling is in :mod:`.settling`, claiming in
:mod:`.consuming`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import overview, routing
from .batch import PublishBatch
from .codec import checked_name, encode
from .connection import HeldConnection
from .dialects.base import Encoded
from .doorbell import BROADCASTS, MESSAGES
from .entities import Entities
from .errors import DatabaseUnavailableError, DatabaseUnusableError
from .settling import Settling

if TYPE_CHECKING:
    import sqlalchemy

log = logging.getLogger(__name__)


class Channel(Entities, Settling):
    """A channel of the SQL transport."""

    # -- publishing -----------------------------------------------------------------------

    def basic_publish(
        self, message: dict[str, Any], exchange: str, routing_key: str, **kwargs: Any
    ) -> None:
        """Store a message. When this returns, it is committed.

        :raises MessageTooLargeError: above ``max_message_bytes``; nothing was stored.
        :raises DatabaseUnavailableError: nothing was stored, as far as can be known.
        """
        transient = message["properties"].get("delivery_mode") == 1
        held = self.held() if transient else self.publishing()
        database = held.database
        row = encode(message, exchange, routing_key, database.now(), self.options.max_message_bytes)
        database.dialect.check_size(row)
        if exchange:
            if self.route(held, exchange, routing_key, row, wanted=not transient):
                database.doorbell.ring(BROADCASTS)
                database.dialect.notify_broadcast(held)
        else:
            routing.put(held, routing_key, row)
        database.doorbell.ring(MESSAGES)

    def publish_in(
        self, connection: sqlalchemy.Connection, message: dict[str, Any], routing_key: str
    ) -> None:
        """Store a message for a queue through a connection of the caller's own.

        The message appears exactly when the caller's transaction commits. Sleeping consumers
        are woken by :meth:`wake_consumers`, to be called after the commit.

        :param connection: of SQLAlchemy, to the same database, with the same kind of driver.
        :param message: as made by :meth:`prepare_message`.
        :raises MessageTooLargeError: above ``max_message_bytes``.
        """
        database = self.database
        if connection.dialect.name not in (database.dialect.name, "mariadb"):
            raise DatabaseUnusableError(
                f"a {connection.dialect.name} transaction cannot publish to {database.label}"
            )
        row = encode(message, "", routing_key, database.now(), self.options.max_message_bytes)
        database.dialect.check_size(row)
        for _ in range(2):
            known = database.queue_ids.get(routing_key)
            if known is None:
                known = self._id_within(connection, routing_key)
            found = connection.exec_driver_sql(
                database.dialect.insert_message_within, (*row, known)
            )
            if found.rowcount == 1:
                return
            database.queue_ids.pop(routing_key, None)
        raise DatabaseUnavailableError(f"{database.label}: queue {routing_key!r} keeps vanishing")

    def publish_through(
        self, held: HeldConnection, message: dict[str, Any], routing_key: str
    ) -> None:
        """As :meth:`publish_in`, through a connection of :mod:`.connection` to this database."""
        routing.put(held, routing_key, self.encoded(message, routing_key))

    def _id_within(self, connection: sqlalchemy.Connection, queue: str) -> int:
        """The id of a queue, which the caller's transaction has to create if need be.

        A second connection could not: on SQLite the caller may hold the only write lock.
        """
        dialect = self.database.dialect
        checked_name(queue, "queue")
        connection.exec_driver_sql(dialect.insert_queue_sql, (queue, self.database.now()))
        # Not cached: a rollback would take the queue with it.
        return int(connection.exec_driver_sql(dialect.select_queue, (queue,)).scalar_one())

    def wake_consumers(self) -> None:
        """Wake the consumers that sleep on this host, after a commit.

        Where PostgreSQL notifies, that is faster by the time until it does.
        """
        self.database.doorbell.ring(MESSAGES)

    def create_publish_batch(self, max_size: int) -> PublishBatch:
        """kombu's hook behind ``Producer.batch()``: many messages in one transaction."""
        return PublishBatch(self, max_size)

    def publishing(self) -> HeldConnection:
        """The connection, in the mode for publishing."""
        held = self._held
        if held is None or not held.usable:
            held = self.held()
        if held.durable is not self.options.durable:
            held.set_durable(self.options.durable)
        return held

    def route(
        self,
        held: HeldConnection,
        exchange: str,
        routing_key: str,
        row: Encoded,
        wanted: bool = True,
    ) -> int:
        """Store a message in the queues bound to an exchange.

        :param wanted: whether it is worth a word, or a dead letter, if there is none.
        :returns: how many queues got it.
        """
        kind = self._exchange_type(held, checked_name(exchange, "exchange"))
        checked_name(routing_key, "routing key")
        count = routing.route(held, kind, exchange, routing_key, row)
        if count or not wanted:
            return count
        if self.deadletter_queue:
            routing.put(held, self.deadletter_queue, row)
        else:
            log.debug("no queue is bound to %r for %r: message dropped", exchange, routing_key)
        return 0

    # -- consuming ------------------------------------------------------------------------

    def basic_consume(
        self,
        queue: str,
        no_ack: bool,
        callback: Callable[[Any], object],
        consumer_tag: str,
        **kwargs: Any,
    ) -> None:
        """Have messages of a queue delivered to a callback.

        :param no_ack: messages are gone once delivered; nothing brings them back.
        """
        self._tag_to_queue[consumer_tag] = checked_name(queue, "queue")
        if queue not in self._active_queues:
            self._active_queues.append(queue)
        self._consumers.add(consumer_tag)

        def deliver(raw: dict[str, Any]) -> object:
            return callback(self.Message(raw, channel=self))

        self.connection._callbacks[queue] = deliver
        self._consumption.start(queue, no_ack, deliver)

    def basic_cancel(self, consumer_tag: str) -> None:
        """Stop delivering. Messages already delivered may still be settled."""
        queue = self._tag_to_queue.pop(consumer_tag, None)
        self._consumers.discard(consumer_tag)
        if queue is None or queue in self._tag_to_queue.values():
            return
        self._active_queues.remove(queue)
        if self.connection is not None:
            self.connection._callbacks.pop(queue, None)
        self._consumption.stop(queue)
        if queue in self._auto_delete:
            # Others may consume from a shared one; then what it holds is theirs.
            self.queue_delete(queue, if_empty=not self._auto_delete.pop(queue))

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """One message, or None."""
        raw = self._consumption.get_one(checked_name(queue, "queue"), no_ack)
        return None if raw is None else self.Message(raw, channel=self)

    def _get_many(self, queues: Sequence[str], timeout: float | None = None) -> None:
        """Claim what the prefetch count allows and deliver it.

        :raises queue.Empty: if there is nothing.
        """
        self._consumption.claim_and_deliver()

    def can_claim(self) -> bool:
        """Whether a consumer waits for messages and may have more."""
        return bool(self._consumers) and bool(self.qos.can_consume())

    def has_work(self, delayed: bool = True) -> bool:
        """Whether :meth:`_get_many` would find something now."""
        return self._consumption.has_work(delayed)

    def next_due(self) -> float | None:
        """When the next delayed message is due, in epoch seconds."""
        return self._consumption.next_due

    # -- looking on -----------------------------------------------------------------------

    def queue_states(self) -> list[overview.QueueState]:
        """All queues that were not made for a process alone, and what is in them."""
        return overview.queue_states(self.held())

    def dead_letters(self) -> overview.DeadLetters:
        """The messages that were set aside."""
        return overview.DeadLetters(self.database)

    # -- the end --------------------------------------------------------------------------

    def close(self) -> None:
        """Settle what is settled, give the rest back, sign off."""
        if self.closed:
            return
        self.closed = True
        inherited = self._database is not None and self._database.inherited
        try:
            if self._database is not None and not inherited:
                self._sign_off()
        finally:
            self._tag_to_queue.clear()
            self._consumers.clear()
            if self._held is not None:
                self._held.close()
                self._held = None
            if self.connection is not None:
                self.connection.close_channel(self)
            self.exchange_types = None

    def _sign_off(self) -> None:
        try:
            for tag in list(self._consumers):
                self.basic_cancel(tag)
            self.give_back()
        except (DatabaseUnavailableError, DatabaseUnusableError) as exc:
            log.warning("unsettled messages come back by themselves (%s)", exc)
        with contextlib.suppress(DatabaseUnavailableError, DatabaseUnusableError):
            self._consumption.sign_off()
