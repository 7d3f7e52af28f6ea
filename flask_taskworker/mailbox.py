"""The addresses of remote control, which are Celery's, for those who ask and those who answer."""

from __future__ import annotations

import os
import uuid
from typing import Any

import kombu
from kombu import pidbox
from kombu.clocks import LamportClock

from .config import Config

#: How long an answer, or a broadcast, may lie unread, and how long the queue of a process that
#: is gone stays. Seconds.
_TTL, _EXPIRES = 300.0, 10.0


class Mailbox(pidbox.Mailbox):  # type: ignore[misc]
    """Celery's mailbox, with a queue of its own for each process.

    Two workers with one node name then both get what is broadcast, and a worker that is
    started again finds no orders to the one before.
    """

    def __init__(self, config: Config, clock: LamportClock, connection: kombu.Connection) -> None:
        super().__init__(
            "celery",
            type="fanout",
            connection=connection,
            clock=clock,
            accept=sorted({"json", *config.accept_content}),
            serializer="json",
        )
        self._process = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"

    def get_queue(self, hostname: str) -> kombu.Queue:
        name = f"{hostname}.{self._process}.{self.namespace}.pidbox"
        return self._queue(name, self.exchange, "")

    def get_reply_queue(self) -> kombu.Queue:
        return self._queue(f"{self.oid}.{self.reply_exchange.name}", self.reply_exchange, self.oid)

    def _queue(self, name: str, exchange: kombu.Exchange, key: str) -> kombu.Queue:
        options: dict[str, Any] = {"durable": False, "exclusive": True, "auto_delete": True}
        return kombu.Queue(
            name, exchange, routing_key=key, message_ttl=_TTL, expires=_EXPIRES, **options
        )
