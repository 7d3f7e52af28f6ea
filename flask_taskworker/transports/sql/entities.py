"""Declaring queues and bindings, which all processes share."""

from __future__ import annotations

from typing import Any

from amqp.protocol import queue_declare_ok_t
from kombu.exceptions import ChannelError
from kombu.utils.uuid import uuid

from . import routing
from .channel_base import ChannelBase
from .codec import checked_name
from .connection import HeldConnection
from .janitor import delete_queue

#: A queue's size is counted up to here: counting a million rows takes a second.
_COUNT_LIMIT = 10_000
#: An exclusive queue outlives its process by this many seconds.
_EXCLUSIVE_EXPIRES = 60.0


class Entities(ChannelBase):
    """Queues, exchanges and bindings."""

    def queue_declare(
        self, queue: str | None = None, passive: bool = False, **kwargs: Any
    ) -> queue_declare_ok_t:
        """Create a queue unless it exists.

        :returns: its name and how many messages are ready, counted up to 10,000.
        :raises ChannelError: 404 if it does not exist and ``passive`` is set.
        """
        queue = queue or f"amq.gen-{uuid()}"
        held = self.held()
        id = routing.queue_id(held, queue, create=not passive)
        while id is not None and not passive and not self._note_expiry(held, id, queue, kwargs):
            id = routing.queue_id(held, queue)  # it expired a moment ago
        if id is None:
            raise ChannelError(
                f"NOT_FOUND - no queue {queue!r} in {self.database.label}",
                (50, 10),
                "Channel.queue_declare",
                "404",
            )
        ready = held.execute(self.database.dialect.count_ready, (id, _COUNT_LIMIT)).fetchone()[0]
        return queue_declare_ok_t(queue, ready, 0)

    def _note_expiry(
        self, held: HeldConnection, id: int, queue: str, kwargs: dict[str, Any]
    ) -> bool:
        """Note what a declaration says of the queue's end; False if that has come already."""
        expires = (kwargs.get("arguments") or {}).get("x-expires")
        seconds = None if expires is None else float(expires) / 1000
        if seconds is None and kwargs.get("exclusive"):
            seconds = _EXCLUSIVE_EXPIRES
        if kwargs.get("auto_delete"):
            self._auto_delete[queue] = bool(kwargs.get("exclusive"))
        if seconds is None:
            return True
        self._consumption.expiring[queue] = seconds
        used = (self.database.now(), seconds, id)
        return bool(held.execute(self.database.dialect.update_queue, used).rowcount)

    def prepare_queue_arguments(self, arguments: Any, **kwargs: Any) -> Any:
        """``Queue(expires=...)`` in seconds becomes ``x-expires``, as for RabbitMQ."""
        if kwargs.get("expires") is None:
            return arguments
        return {**(arguments or {}), "x-expires": int(kwargs["expires"] * 1000)}

    def queue_bind(
        self,
        queue: str,
        exchange: str | None = None,
        routing_key: str = "",
        arguments: Any = None,
        **kwargs: Any,
    ) -> None:
        """Bind a queue to an exchange, for every process."""
        exchange = checked_name(exchange or "amq.direct", "exchange")
        held = self.held()
        id = routing.queue_id(held, queue)
        assert id is not None
        kind = self._exchange_type(held, exchange)
        self.database.dialect.insert_binding(
            held, exchange, checked_name(routing_key or "", "routing key"), id, kind
        )

    def queue_unbind(
        self,
        queue: str,
        exchange: str | None = None,
        routing_key: str = "",
        arguments: Any = None,
        **kwargs: Any,
    ) -> None:
        """Undo :meth:`queue_bind`."""
        held = self.held()
        id = routing.queue_id(held, queue, create=False)
        held.execute(
            self.database.dialect.sql(
                "DELETE FROM {binding} WHERE exchange = ? AND rkey = ? AND queue = ?"
            ),
            (exchange or "amq.direct", routing_key or "", id),
        )

    def list_bindings(self) -> list[tuple[str, str, str]]:
        """All bindings as (queue, exchange, routing key)."""
        cursor = self.held().execute(
            self.database.dialect.sql(
                "SELECT q.name, b.exchange, b.rkey FROM {binding} b "
                "JOIN {queue} q ON q.id = b.queue"
            )
        )
        return [tuple(row) for row in cursor.fetchall()]

    def queue_delete(
        self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: Any
    ) -> None:
        """Delete a queue with its bindings and messages, also those in somebody's hands."""
        held = self.held()
        id = routing.queue_id(held, queue, create=False)
        if id is None or (if_empty and self._size(queue)):
            return
        self.database.queue_ids.pop(queue, None)
        delete_queue(self.database, held, id)

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        """Delete an exchange with its bindings; queues stay."""
        self.held().execute(
            self.database.dialect.sql("DELETE FROM {binding} WHERE exchange = ?"), (exchange,)
        )
        self.state.exchanges.pop(exchange, None)

    def pause_queue(self, queue: str, paused: bool = True) -> None:
        """Stop, or resume, handing out the messages of a queue, in every process."""
        held = self.held()
        held.execute(
            self.database.dialect.sql("UPDATE {queue} SET paused = ? WHERE id = ?"),
            (int(paused), routing.queue_id(held, queue)),
        )
        if not paused:
            self.database.wake(held)

    def paused_queues(self) -> set[str]:
        """The queues that :meth:`pause_queue` has stopped."""
        sql = self.database.dialect.sql("SELECT name FROM {queue} WHERE paused <> 0")
        return {row[0] for row in self.held().execute(sql).fetchall()}

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:
        return routing.queue_id(self.held(), queue, create=False) is not None

    def _size(self, queue: str) -> int:
        held = self.held()
        id = routing.queue_id(held, queue, create=False)
        cursor = held.execute(self.database.dialect.count_ready, (id, _COUNT_LIMIT))
        return int(cursor.fetchone()[0])

    def _purge(self, queue: str) -> int:
        held = self.held()
        id = routing.queue_id(held, queue, create=False)
        count = 0
        for state in ("owner = 0", "owner = -1"):
            sql = self.database.dialect.sql(f"DELETE FROM {{message}} WHERE {state} AND queue = ?")
            count += held.execute(sql, (id,)).rowcount
        return count
