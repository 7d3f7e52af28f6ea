"""Results as messages: each goes straight to the process that sent the task.

Nothing is stored. A result can be read once it has arrived, by the process that sent the
task, as long as that lives.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import kombu

from .. import states
from ..broker import broker_connection, drop, recoverable_errors
from ..exceptions import BrokerUnavailableError
from ..message import WireMessage
from .base import ResultBackend, TaskRecord, timed_out
from .encoding import dumps, loads
from .meta import from_meta, to_meta

if TYPE_CHECKING:
    from ..config import Config

#: Sends a message to a queue that is named.
Reply = Callable[[str, WireMessage], None]

#: How many results that nobody has read yet are kept.
KEPT = 10_000


class RpcBackend(ResultBackend):
    """Sends records to the sender's queue, and reads this process's own.

    The queue is named by a random id of this process. One thread at a time listens on
    it and shares what arrives with the others.

    :param reply: sends a record to the queue of a sender.
    """

    def __init__(self, config: Config, reply: Reply) -> None:
        super().__init__(config)
        self._reply = reply
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._queue = kombu.Queue(
            str(uuid.uuid4()),
            durable=True,
            auto_delete=True,
            expires=86400,
            exchange=kombu.Exchange(""),
        )
        self._records: OrderedDict[str, TaskRecord] = OrderedDict()
        self._listening = threading.Lock()
        self._arrived = threading.Condition()
        self._connection: Any = None

    def _after_fork(self) -> None:
        if self._pid != os.getpid():  # a child has a queue of its own
            self._inherited = self._connection
            self._reset()

    def reply_queue(self) -> kombu.Queue | None:
        self._after_fork()
        return self._queue

    def store(self, record: TaskRecord) -> None:
        if not record.reply_to:
            return
        serializer = self.config.result_serializer
        body = dumps(to_meta(record.done_now()), serializer)
        content_type, encoding, _ = kombu.serialization.registry._encoders[serializer]
        properties = {"correlation_id": record.correlation_id or record.task_id, "delivery_mode": 1}
        try:
            self._reply(record.reply_to, WireMessage(body, content_type, encoding, {}, properties))
        except BrokerUnavailableError as exc:
            raise ConnectionError(str(exc)) from exc

    def fetch(self, task_id: str) -> TaskRecord | None:
        self._after_fork()
        self._listen(0.0)
        return self._records.get(task_id)

    def wait(self, task_id: str, timeout: float | None = None) -> TaskRecord:
        self._after_fork()
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            record = self._records.get(task_id)
            if record is not None and record.status in states.READY_STATES:
                return record
            left = 1.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise timed_out(task_id, timeout)
            self._listen(min(left, 1.0))

    def forget(self, task_id: str) -> None:
        self._records.pop(task_id, None)

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and self._pid == os.getpid():
            connection.close()

    def _listen(self, timeout: float) -> None:
        """Receive for a while, or wait for the thread that does."""
        if not self._listening.acquire(blocking=False):
            with self._arrived:
                self._arrived.wait(timeout)
            return
        try:
            self._receive(timeout)
        finally:
            self._listening.release()
            with self._arrived:
                self._arrived.notify_all()

    def _receive(self, timeout: float) -> None:
        try:
            connection = self._connected()
            connection.drain_events(timeout=timeout or 0.001)
            while True:  # what else has come
                connection.drain_events(timeout=0.001)
        except TimeoutError:
            pass
        except self._errors:
            if self._connection is not None:
                drop(self._connection)
            self._connection = None  # results that were under way are lost with the queue
            time.sleep(min(timeout, 0.1))

    def _connected(self) -> Any:
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def _connect(self) -> Any:
        connection = broker_connection(self.config, role="consume")
        self._errors = recoverable_errors(connection)
        try:
            consumer = kombu.Consumer(
                connection.default_channel, [self._queue], no_ack=True, on_message=self._received
            )
            consumer.consume()
        except BaseException:
            drop(connection)
            raise
        return connection

    _errors: tuple[type[BaseException], ...] = (OSError,)

    def _received(self, message: Any) -> None:
        try:
            record = from_meta(loads(message.body, self.config.result_serializer))
        except Exception:
            return  # not a result of ours
        known = self._records.get(record.task_id)
        if not states.may_follow(known.status if known else None, record.status):
            return
        self._records[record.task_id] = record
        self._records.move_to_end(record.task_id)
        while len(self._records) > KEPT:
            self._records.popitem(last=False)
