"""The loop: settle what has ended, reserve what can run, wait for either.

One thread owns the connection to the broker. It alone receives and settles. Runs happen
in the pool, which wakes this thread when one has ended.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import select
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import kombu

from .. import clock
from ..broker import (
    broker_connection,
    capabilities_of,
    is_hopeless,
    recoverable_errors,
    wait_for_messages,
)
from ..message import TaskMessage, Unreadable, parse
from ..publisher import task_queue
from .delivery import Delivery, Outcome
from .observer import Nobody, Observer
from .prefetch import Prefetch
from .settling import Settler
from .waker import Waker

if TYPE_CHECKING:
    from ..app import TaskApp
    from .pool import Pool

log = logging.getLogger("flask_taskworker.worker")

#: Pauses between attempts to reach the broker again, in seconds; the last one repeats.
RECONNECT_PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)
#: Deliveries that wait in the pool while nothing ends for this long go back. Seconds.
STALLED_AFTER = 0.25
#: How long a queue gives nothing before a burst takes it for empty, where asking for
#: messages does not say at once that there are none. Seconds.
BURST_PATIENCE = 0.5


class Consumer:
    """Moves messages between a broker and a pool until it is stopped.

    :param app: whose messages.
    :param pool: runs them; made by the supervisor, wakes ``waker`` when a run has ended.
    :param queues: the queues to read, by name.
    :param burst: stop when the queues are empty.
    :param observer: follows what happens to the deliveries.
    """

    def __init__(
        self,
        app: TaskApp,
        pool: Pool,
        queues: Sequence[str],
        waker: Waker,
        *,
        burst: bool = False,
        on_ready: Callable[[], None] = lambda: None,
        maintain: Callable[[], float] = lambda: 60.0,
        observer: Observer | None = None,
    ) -> None:
        self.app = app
        self.pool = pool
        self.queues = list(queues)
        self.burst = burst
        self._waker = waker
        self._on_ready = on_ready
        self._maintain = maintain
        self._observer: Observer = observer or Nobody()
        self._prefetch = Prefetch(pool.size)
        # Plain values, no locks: stop() is called in signal handlers.
        self._stopping = False
        self._stop_at: float | None = None
        self._epoch = 0
        self._proven = False  # whether this connection has carried a whole turn
        self._held: list[tuple[float, int, Delivery]] = []
        self._order = itertools.count()
        self._ended: deque[tuple[Delivery, Outcome]] = deque()
        self._unsettled = 0  # received on this connection, and not settled yet
        self._next_maintenance = clock.monotonic() + 1.0
        self._next_complaint = clock.monotonic()
        self._last_move = self._last_work = clock.monotonic()
        self._finished_burst = False

    def stop(self, drain_timeout: float) -> None:
        """Reserve no more, let running tasks end within ``drain_timeout`` seconds, return.

        Safe to call from any thread and from a signal handler. Another call with a
        shorter time shortens the wait.
        """
        deadline = clock.monotonic() + drain_timeout
        self._stop_at = deadline if self._stop_at is None else min(self._stop_at, deadline)
        self._stopping = True
        self._waker.wake()

    def run(self) -> None:
        """Consume until stopped; reconnect whenever the broker went away.

        :raises BrokerError: if the broker can be used neither now nor later, as with a
            damaged database file.
        """
        failures, worked = 0, False
        while not self._stopping and not self._finished_burst:
            self._proven = False
            connection = broker_connection(self.app.config, role="consume")
            errors = recoverable_errors(connection)
            try:
                self._consume(connection)
            except errors as exc:
                worked = worked or self._proven
                if is_hopeless(exc) and not worked:
                    raise  # better to end than to try for ever
                failures = 0 if self._proven else failures
                pause = RECONNECT_PAUSES[min(failures, len(RECONNECT_PAUSES) - 1)]
                failures += 1
                cause = str(exc).rstrip(".") or type(exc).__name__
                log.error("no connection to the broker: %s. Trying again in %.1f s", cause, pause)
                self._pause(pause)
            except Exception:  # a fault in a transport must not end the worker
                log.exception("the broker connection failed in an unexpected way; starting it anew")
                self._pause(RECONNECT_PAUSES[-1])
            finally:
                _close_quietly(connection)
        self._wait_for_runs()

    # -- one connection -------------------------------------------------------------------

    def _consume(self, connection: kombu.Connection) -> None:
        channel = connection.default_channel
        self._connection, self._channel = connection, channel
        self._capabilities = capabilities_of(connection)
        self._epoch += 1
        self._heartbeats = bool(connection.supports_heartbeats)
        self._next_heartbeat = clock.monotonic() + 1.0
        self._settler = Settler(self.app, channel, self._capabilities)
        self._held.clear()  # the broker hands them out again
        self._unsettled = 0
        self._prefetch.reset()
        consumer = self._consumer = kombu.Consumer(
            channel,
            queues=[task_queue(name) for name in self.queues],
            on_message=self._received,
            # kombu could not decompress it; parse() says so
            on_decode_error=lambda raw, exc: self._received(raw),
            prefetch_count=self._prefetch.limit,
            tag_prefix="taskworker-",
        )
        consumer.consume()
        self._on_ready()
        self._turn_until_done(recoverable_errors(connection))
        self._settler.flush()
        consumer.cancel()

    def _turn_until_done(self, errors: tuple[type[BaseException], ...]) -> None:
        while True:
            try:
                if self._turn():
                    return
                self._proven = True
            except errors as exc:
                if not self._capabilities.atomic_settle or self._stopping or not self._proven:
                    raise
                # What this worker has claimed stays its own while the database is away.
                if clock.monotonic() >= self._next_complaint:
                    log.warning("the database cannot be used now: %s", exc)
                    self._next_complaint = clock.monotonic() + RECONNECT_PAUSES[-1]
                self._pause(RECONNECT_PAUSES[1])

    def _turn(self) -> bool:
        """Settle, reserve, wait: once. True when there is nothing left to do here."""
        self._waker.clear()
        self._settle()
        if self._stopping:
            self._consumer.cancel()  # or the broker goes on sending while the last tasks run
            if self._drained():
                return True
            self._settler.flush()
            self._waker_wait()
            return False
        received = self._reserve()
        self._release_stalled()
        if received or self._unsettled:
            self._last_work = clock.monotonic()
        elif self.burst and clock.monotonic() - self._last_work >= self._patience():
            self._finished_burst = True
            return True
        if received == 0:
            self._wait()
        return False

    def _patience(self) -> float:
        """How long a queue must give nothing to count as empty: some brokers answer later."""
        return 0.0 if self._capabilities.wake else BURST_PATIENCE

    def _settle(self) -> None:
        for delivery in self.pool.starts():
            self._tell(self._observer.started, delivery)
        ended = self.pool.finished()
        if ended:
            self._last_move = clock.monotonic()
            self._ended.extend(ended)
        while self._ended:
            delivery, outcome = self._ended[0]  # it stays first in line until it is settled
            self._settle_one(delivery, outcome)
            self._prefetch.observe(outcome.runtime)
            self._ended.popleft()
            self._tell(self._observer.ended, delivery, outcome)

    def _tell(self, what: Callable[..., None], *about: object) -> None:
        try:
            what(*about)
        except Exception:
            log.exception("an observer of the worker failed")

    def _settle_one(self, delivery: Delivery, outcome: Outcome) -> None:
        if delivery.epoch != self._epoch:
            log.warning(
                "task %s[%s] ended after its connection was lost; it may run again",
                delivery.message.task,
                delivery.message.id,
            )
            return
        self._settler.settle(delivery, outcome)
        self._unsettled -= 1

    def _reserve(self) -> int:
        """Receive as much as the pool can take now; return how much that was."""
        self._submit_due()
        self._prefetch.slots = self.pool.size
        before = self._prefetch.received
        room = self._prefetch.room(self.pool.load())
        self._prefetch.apply(self._channel, self._capabilities, room, self._unsettled)
        if room <= 0:
            self._settler.flush()
            return 0
        while self._prefetch.received - before < room:
            try:
                self._connection.drain_events(timeout=0)
            except (TimeoutError, BlockingIOError):
                break
        return self._prefetch.received - before

    def _received(self, raw: Any) -> None:
        self._prefetch.received += 1
        self._unsettled += 1
        info = raw.delivery_info or {}
        queue = str(info.get("routing_key") or self.queues[0])
        message = parse(raw, self.app.config.accept_content)
        if isinstance(message, Unreadable):
            self._settler.park(raw, queue, message)
            self._unsettled -= 1
            return
        delivery = Delivery(raw, message, queue, self._epoch)
        if self._stopping or self._finished_burst:  # sent before the broker heard of the end
            self._give_back([delivery])
            return
        self._tell(self._observer.received, delivery)
        wait = 0.0 if message.eta is None else message.seconds_until_due()
        if wait > 0 and not message.has_expired():
            due = clock.monotonic() + wait
            heapq.heappush(self._held, (due, next(self._order), delivery))
        else:
            self._submit(delivery)

    def _submit(self, delivery: Delivery) -> None:
        if not self._acks_late(delivery.message):
            self._settler.acknowledge_before_run(delivery)
        self._last_move = clock.monotonic()  # its thread needs a moment to take it
        self.pool.submit(delivery)

    def _acks_late(self, message: TaskMessage) -> bool:
        task = self.app.registry.get(message.task)
        default = self.app.config.acks_late
        return bool(task.options_.get("acks_late", default)) if task else True

    def _submit_due(self) -> None:
        now = clock.monotonic()
        while self._held and self._held[0][0] <= now:
            self._submit(heapq.heappop(self._held)[2])

    def _release_stalled(self) -> None:
        """Give waiting deliveries back when long runs hold every slot: others may be free."""
        if self.pool.waiting() and clock.monotonic() - self._last_move > STALLED_AFTER:
            self._withdraw()
            self._prefetch.reset()

    def _give_back(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            if delivery.epoch == self._epoch:
                self._unsettled -= 1
                self._settler.give_back(delivery)

    # -- waiting and stopping -------------------------------------------------------------

    def _wait(self) -> None:
        now = clock.monotonic()
        if now >= self._next_maintenance:
            self._next_maintenance = now + self._maintain()
        if self._heartbeats and now >= self._next_heartbeat:
            self._connection.heartbeat_check()
            self._next_heartbeat = now + 1.0
        until = min(now + self.app.config.loop_interval, self._next_maintenance)
        if self._held:
            until = min(until, self._held[0][0])
        if self.pool.waiting():
            until = min(until, now + STALLED_AFTER)
        if self._heartbeats:
            until = min(until, now + 5.0)
        if self.burst and not self.pool.load():
            until = min(until, now + BURST_PATIENCE)
        wait_for_messages(
            self._connection,
            self._capabilities,
            max(0.0, until - now),
            self._waker.fileno(),
            busy=self.pool.load() > 0,
        )

    def _withdraw(self) -> None:
        """Give back what has not started, save what is acknowledged: that has to run here."""
        for delivery in self.pool.withdraw():
            if delivery.acknowledged:
                self.pool.submit(delivery)
            else:
                self._give_back([delivery])

    def _drained(self) -> bool:
        self._withdraw()
        self._give_back([delivery for _, _, delivery in self._held])
        self._held.clear()
        if self._unsettled <= 0:  # what has ended since is to be settled before we go
            return True
        running = self.pool.running()
        if self._stop_at is not None and clock.monotonic() < self._stop_at:
            return False
        for delivery in running:
            log.warning(
                "task %s[%s] is still running; %s",
                delivery.message.task,
                delivery.message.id,
                "it ends with this process"
                if delivery.acknowledged
                else "its message goes back to the queue",
            )
        self._give_back([delivery for delivery in running if not delivery.acknowledged])
        return True

    def _waker_wait(self) -> None:
        left = max(0.0, (self._stop_at or 0.0) - clock.monotonic())
        self._pause(min(left, 1.0))

    def _pause(self, seconds: float) -> None:
        """Sleep, unless a run ends or the worker is stopped."""
        select.select([self._waker.fileno()], [], [], seconds)

    def _wait_for_runs(self) -> None:
        """After the connection is gone for good: runs still get their time to end."""
        while self.pool.running() and clock.monotonic() < (self._stop_at or 0.0):
            self._waker.clear()
            self.pool.finished()
            if self.pool.running():
                self._waker_wait()


def _close_quietly(connection: kombu.Connection) -> None:
    try:
        connection.release()
    except Exception as exc:
        log.debug("closing the broker connection: %r", exc)
