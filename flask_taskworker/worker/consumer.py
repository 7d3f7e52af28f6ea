"""The loop: settle what has ended, reserve what can run, wait for either.

One thread owns the connection to the broker. It alone receives and settles. Runs happen
in the pool, which wakes this thread when one has ended.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import select
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import kombu

from .. import clock, signals
from ..broker import (
    broker_connection,
    capabilities_of,
    drop,
    is_hopeless,
    recoverable_errors,
    wait_for_messages,
)
from ..exceptions import InvalidMessageError
from ..message import TaskMessage, Unreadable, parse
from ..publisher import task_queue
from .delivery import Delivery, Outcome
from .limits import TimeLimits
from .observer import Nobody, Observer
from .prefetch import Prefetch
from .rates import AHEAD, RateLimits
from .settling import Settler, store_alone
from .strays import Strays
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


#: A message that may not start for longer than this goes back to the store, if that can
#: delay it. Seconds.
HELD_HERE = 2.0
#: Where no store can, so many messages wait here at most; then no more are taken.
MOST_HELD = 10_000


class Consumer:
    """Moves messages between a broker and a pool until it is stopped.

    :param app: whose messages.
    :param pool: runs them; made by the supervisor, wakes ``waker`` when a run has ended.
    :param queues: the queues to read, by name.
    :param burst: stop when the queues are empty.
    :param on_connected: called with the channel of each connection, before it reads anything.
    :param on_ready: called when it reads the queues.
    :param on_stopping: called once when it has been asked to stop, with the seconds that are
        left for running tasks.
    :param maintain: upkeep; gives the seconds until it wants to be called again.
    :param observer: follows what happens to the deliveries.
    :param scale: may change the pool's size; told whether there seems to be more to do.
    :param rates: how many runs of a task may start in a time.
    :param refuse: asked before each run; gives the outcome of a delivery that must not run.
    :param limits: how long runs may take.
    """

    def __init__(
        self,
        app: TaskApp,
        pool: Pool,
        queues: Sequence[str],
        waker: Waker,
        *,
        burst: bool = False,
        on_connected: Callable[[Any], None] = lambda channel: None,
        on_ready: Callable[[], None] = lambda: None,
        on_stopping: Callable[[float], None] = lambda seconds: None,
        maintain: Callable[[], float] = lambda: 60.0,
        observer: Observer | None = None,
        scale: Callable[[bool], None] = lambda more_to_come: None,
        rates: RateLimits | None = None,
        refuse: Callable[[Delivery], Outcome | None] = lambda delivery: None,
        limits: TimeLimits | None = None,
    ) -> None:
        self.app = app
        self.pool = pool
        self.queues = list(queues)
        self.burst = burst
        self.limits = limits or TimeLimits(app)
        self._waker = waker
        self._on_connected = on_connected
        self._on_ready = on_ready
        self._on_stopping = on_stopping
        self._told_of_stop = False
        self._maintain = maintain
        self._scale = scale
        self._observer: Observer = observer or Nobody()
        self.rates = rates or RateLimits(app)
        self._refuse = refuse
        self._prefetch = Prefetch(pool.size)
        # Plain values, no locks: stop() is called in signal handlers.
        self.connection: kombu.Connection | None = None
        self._stopping = False
        self._stop_at: float | None = None
        self._epoch = 0
        self._proven = False  # whether this connection has carried a whole turn
        # What waits for its time: an ETA, or a token of its rate limit.
        self._held: list[tuple[float, int, Delivery]] = []
        self._order = itertools.count()
        self._rates_version = self.rates.version
        self._strays = Strays(pool)
        self._ended: deque[tuple[Delivery, Outcome]] = deque()
        self._ended_before: deque[tuple[Delivery, Outcome]] = deque()  # on an earlier connection
        # Received on this connection, and not settled yet; by identity.
        self._unsettled: dict[int, Delivery] = {}
        self._requests: deque[Callable[[], object]] = deque()
        #: What is read from, by the queue's name, where it is not what the name says.
        self._entities: dict[str, kombu.Queue] = {}
        #: Queues that rest, because the broker itself would hand out their messages.
        self.resting: set[str] = set()
        self._next_maintenance = clock.monotonic() + 1.0
        self._next_complaint = clock.monotonic()
        self._last_move = self._last_work = clock.monotonic()
        self._finished_burst = False
        self._came_full = False  # whether the last request brought all that it asked for
        #: When the loop turned last, on the monotonic clock: whether it stands still.
        self.turned_at = clock.monotonic()
        #: Whether it stands still because a task runs in its own thread.
        self.in_task = False

    def stop(self, drain_timeout: float) -> None:
        """Reserve no more, let running tasks end within ``drain_timeout`` seconds, return.

        Safe to call from any thread and from a signal handler. Another call with a
        shorter time shortens the wait.
        """
        deadline = clock.monotonic() + drain_timeout
        self._stop_at = deadline if self._stop_at is None else min(self._stop_at, deadline)
        self._stopping = True
        self._waker.wake()

    # -- for other threads ----------------------------------------------------------------

    def request(self, action: Callable[[], object]) -> None:
        """Have the consumer's thread do something at its next turn."""
        self._requests.append(action)
        self._waker.wake()

    def unsettled(self) -> list[Delivery]:
        """The deliveries in this worker's hands: held for later, waiting, running."""
        while True:
            try:
                return list(self._unsettled.values())
            except RuntimeError:  # it changed meanwhile
                continue

    def held(self) -> list[Delivery]:
        """Those of them that wait here for their time."""
        while True:
            try:
                return [delivery for _, _, delivery in sorted(self._held)]
            except RuntimeError:
                continue

    @property
    def prefetch_limit(self) -> int:
        """How many messages may be in this worker's hands."""
        return self._prefetch.limit

    def entity(self, queue: str) -> kombu.Queue:
        """The queue that is read under a name."""
        return self._entities.get(queue) or task_queue(queue)

    # -- requests: in the consumer's thread, while it is connected ------------------------

    def add_queue(self, queue: kombu.Queue) -> None:
        """Read another queue."""
        name = queue.name
        before = self._entities.get(name)
        self._entities[name] = queue
        try:
            if name not in self.resting:
                self._read(name)
        except BaseException:  # the broker refuses it: it must not be tried for ever
            self._entities.pop(name)
            if before is not None:
                self._entities[name] = before
            raise
        if name not in self.queues:
            self.queues.append(name)

    def cancel_queue(self, name: str) -> None:
        """Read a queue no more."""
        if name in self.queues:
            self.queues.remove(name)
        self._consumer.cancel_by_queue(name)

    def rest_queue(self, name: str) -> None:
        """Stop reading a queue until :meth:`resume_queue`."""
        self.resting.add(name)
        if name in self.queues:
            self._consumer.cancel_by_queue(name)

    def resume_queue(self, name: str) -> None:
        """Undo :meth:`rest_queue`."""
        self.resting.discard(name)
        if name in self.queues:
            self._read(name)

    def refuse_again(self) -> None:
        """Ask of everything that has not started whether it may still run."""
        kept = []
        for entry in self._held:
            if not self._refused(entry[2]):
                kept.append(entry)
        self._held = kept
        heapq.heapify(self._held)
        for delivery in self.pool.withdraw():
            if not self._refused(delivery):
                self.pool.submit(delivery)

    def _read(self, name: str) -> None:
        if not self._consumer.consuming_from(name):
            self._consumer.add_queue(self.entity(name))
            self._consumer.consume()

    def _do_requests(self) -> None:
        while self._requests:
            action = self._requests.popleft()
            try:
                action()
            except recoverable_errors(self._connection):
                raise
            except Exception:
                log.exception("a command to this worker failed")

    # -- the loop -------------------------------------------------------------------------

    def run(self) -> None:
        """Consume until stopped; reconnect whenever the broker went away.

        :raises BrokerError: if the broker can be used neither now nor later, as with a
            damaged database file.
        """
        failures, worked = 0, False
        while not self._stopping and not self._finished_burst:
            self._proven = False
            connection = self.connection = broker_connection(self.app.config, role="consume")
            errors = recoverable_errors(connection)
            try:
                self._consume(connection)
                _close_quietly(connection)
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
                drop(connection)
        self._tell_of_stop()
        self._wait_for_runs()

    def _tell_of_stop(self) -> None:
        if self._stopping and not self._told_of_stop:
            self._told_of_stop = True
            self._on_stopping(max(0.0, (self._stop_at or 0.0) - clock.monotonic()))

    # -- one connection -------------------------------------------------------------------

    def _consume(self, connection: kombu.Connection) -> None:
        channel = connection.default_channel
        self._connection, self._channel = connection, channel
        self._capabilities = capabilities_of(connection)
        # A burst ends when the queues are empty, which they would seem to be.
        self._may_send_away = self._capabilities.delayed_requeue and not self.burst
        self._epoch += 1
        self._heartbeats = bool(connection.supports_heartbeats)
        self._next_heartbeat = clock.monotonic() + 1.0
        self._settler = Settler(self.app, channel, self._capabilities)
        self._held.clear()  # the broker hands them out again
        self._strays.gather()
        self._unsettled.clear()
        self._prefetch.reset()
        self._on_connected(channel)
        consumer = self._consumer = kombu.Consumer(
            channel,
            queues=[self.entity(name) for name in self.queues if name not in self.resting],
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
                if not self._capabilities.leased or self._stopping or not self._proven:
                    raise
                # What this worker has claimed stays its own while the broker is away.
                if clock.monotonic() >= self._next_complaint:
                    log.warning("the broker cannot be used now: %s", exc)
                    self._next_complaint = clock.monotonic() + RECONNECT_PAUSES[-1]
                self._pause(RECONNECT_PAUSES[1])

    def _turn(self) -> bool:
        """Settle, reserve, wait: once. True when there is nothing left to do here."""
        self.turned_at = clock.monotonic()
        self._waker.clear()
        if self._requests:
            self._do_requests()
        self._settle()
        if self._stopping:
            self._tell_of_stop()
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
        while self._ended_before:
            self._settle_one(*self._ended_before[0])
            self._ended_before.popleft()
        self._settler.flush_messages()

    def _tell(self, what: Callable[..., None], *about: object) -> None:
        try:
            what(*about)
        except Exception:
            log.exception("an observer of the worker failed")

    def _settle_one(self, delivery: Delivery, outcome: Outcome) -> None:
        if delivery.acknowledged or delivery.epoch == self._epoch:
            self._settler.settle(delivery, outcome)
            self._unsettled.pop(id(delivery), None)
        else:
            self._strays.ended(delivery, outcome)

    def _reserve(self) -> int:
        """Receive as much as the pool can take now; return how much that was."""
        self._submit_due()
        self._scale(self._came_full)
        self._prefetch.slots = self.pool.size
        before = self._prefetch.received
        room = self._prefetch.room(self.pool.load())
        if len(self._held) >= MOST_HELD:
            room = 0
        self._prefetch.apply(self._channel, self._capabilities, room, len(self._unsettled))
        if room <= 0:
            return 0
        while self._prefetch.received - before < room:
            try:
                self._connection.drain_events(timeout=0)
            except (TimeoutError, BlockingIOError):
                break
        received = self._prefetch.received - before
        self._came_full = received >= room
        return received

    def _received(self, raw: Any) -> None:
        self._prefetch.received += 1
        info = raw.delivery_info or {}
        queue = str(info.get("routing_key") or self.queues[0])
        accept = self.app.config.accept_content
        message = parse(raw, accept, body=not self.pool.reads_bodies)
        if isinstance(message, Unreadable):
            if signals.task_rejected.receivers:
                error = InvalidMessageError(message.reason)
                signals.task_rejected.notify(self, message=raw, exc=error)
            self._settler.park(raw, queue, message)
            return
        delivery = Delivery(raw, message, queue, self._epoch, limits=self.limits.of(message))
        self._unsettled[id(delivery)] = delivery
        if self._stopping or self._finished_burst:  # sent before the broker heard of the end
            self._give_back([delivery])
            return
        outcome = self._strays.take_up(delivery)
        if outcome is not None:
            if isinstance(outcome, Outcome):  # it has ended; else its run goes on
                self._ended_before.append((delivery, outcome))
            else:
                del self._unsettled[id(delivery)]
                self._unsettled.update((id(d), d) for d in self.pool.running() if d.raw is raw)
            return
        if not self._settler.keeps(delivery):
            del self._unsettled[id(delivery)]
            return
        self._tell(self._observer.received, delivery)
        signals.task_received.notify(self, request=message)
        if self._refused(delivery):
            return
        wait = 0.0 if message.eta is None else message.seconds_until_due()
        if wait > 0 and not message.has_expired():
            self._hold(delivery, wait)
        else:
            self._start(delivery)

    def _hold(self, delivery: Delivery, seconds: float) -> None:
        """Let a delivery wait: in the store if that can do it, else here."""
        if self._may_send_away and seconds > HELD_HERE:
            self._settler.send_away(delivery, seconds)
            self._unsettled.pop(id(delivery), None)
            return
        due = clock.monotonic() + seconds
        heapq.heappush(self._held, (due, next(self._order), delivery))

    def _start(self, delivery: Delivery) -> None:
        """Run a delivery whose time has come, as soon as the rate of its task allows."""
        name = delivery.message.task
        wait: float | None = 0.0
        if not delivery.has_token:
            wait = self.rates.reserve(name, AHEAD if self._may_send_away else math.inf)
        if wait is None:
            self._settler.send_away(delivery, self.rates.send_away(name))
            self._unsettled.pop(id(delivery), None)
        elif wait > 0:
            delivery.has_token = True
            due = clock.monotonic() + wait
            heapq.heappush(self._held, (due, next(self._order), delivery))
        else:
            self._submit(delivery)

    def _refused(self, delivery: Delivery) -> bool:
        outcome = self._refuse(delivery)
        if outcome is None:
            return False
        self._ended.append((delivery, outcome))
        self._waker.wake()
        return True

    def _submit(self, delivery: Delivery) -> None:
        if self._refused(delivery):
            return
        if not self._acks_late(delivery.message):
            self._settler.acknowledge_before_run(delivery)
        self._last_move = clock.monotonic()  # its thread needs a moment to take it
        self.in_task = True
        self.pool.submit(delivery)
        self.in_task = False

    def _acks_late(self, message: TaskMessage) -> bool:
        task = self.app.registry.get(message.task)
        default = self.app.config.acks_late
        return bool(task.options_.get("acks_late", default)) if task else True

    def _submit_due(self) -> None:
        if self._rates_version != self.rates.version:
            self._ask_for_tokens_again()
        now = clock.monotonic()
        while self._held and self._held[0][0] <= now and self.pool.load() < self.pool.size:
            self._start(heapq.heappop(self._held)[2])

    def _ask_for_tokens_again(self) -> None:
        """A limit has changed: what waits for a token may wait too long now."""
        self._rates_version = self.rates.version
        waiting = sorted(entry for entry in self._held if entry[2].has_token)
        self._held = [entry for entry in self._held if not entry[2].has_token]
        heapq.heapify(self._held)
        for _, _, delivery in waiting:
            delivery.has_token = False
            self._start(delivery)

    def _release_stalled(self) -> None:
        """Give waiting deliveries back when long runs hold every slot: others may be free."""
        now = clock.monotonic()
        if now - self._last_move <= STALLED_AFTER:
            return
        full = self.pool.load() >= self.pool.size
        due = [entry for entry in self._held if entry[0] <= now] if full else []
        if due:
            self._held = [entry for entry in self._held if entry[0] > now]
            heapq.heapify(self._held)
            self._give_back([delivery for _, _, delivery in due])
        if due or self.pool.waiting():
            self._withdraw()
            self._prefetch.reset()

    def _give_back(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            if delivery.epoch == self._epoch:
                self._unsettled.pop(id(delivery), None)
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
        if self._held and self._held[0][0] > now:
            until = min(until, self._held[0][0])
        if self.pool.waiting() or (self._held and self._held[0][0] <= now):
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
        for delivery in [*self.pool.withdraw(), *(entry[2] for entry in self._held)]:
            if delivery.acknowledged:
                self.pool.submit(delivery)
                continue
            name, task_id = delivery.message.task, delivery.message.id
            log.info("task %s[%s] has not started; its message goes back", name, task_id)
            self._give_back([delivery])
        self._held.clear()
        if not self._unsettled:  # what has ended since is to be settled before we go
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
        self.turned_at = clock.monotonic()
        select.select([self._waker.fileno()], [], [], seconds)

    def _wait_for_runs(self) -> None:
        """After the connection is gone for good: runs still get their time to end."""
        while True:
            self._waker.clear()
            self._ended.extend(self.pool.finished())
            while self._ended:
                self._keep_result(*self._ended.popleft())
            if not self.pool.running() or clock.monotonic() >= (self._stop_at or 0.0):
                return
            self._waker_wait()

    def _keep_result(self, delivery: Delivery, outcome: Outcome) -> None:
        """Of what is not acknowledged, another run will say how it ended."""
        if delivery.acknowledged:
            try:
                store_alone(self.app, outcome)
            except Exception as exc:
                name, task_id = delivery.message.task, delivery.message.id
                log.error("the result of task %s[%s] is lost: %s", name, task_id, exc)


def _close_quietly(connection: kombu.Connection) -> None:
    try:
        connection.release()
    except Exception as exc:
        log.debug("closing the broker connection: %r", exc)
