"""The loop: settle what has ended, reserve what can run, wait for either.

One thread owns the connection to the broker. It alone receives and settles. Runs happen
in the pool, which wakes this thread when one has ended.
"""

from __future__ import annotations

import logging
import select
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import kombu

from .. import clock, signals
from ..broker import capabilities_of, wait_for_messages
from ..exceptions import InvalidMessageError
from ..message import Unreadable, parse
from .delivery import Delivery, Outcome, Unsettled
from .ended import EndedRuns
from .limits import TimeLimits
from .observer import Observer
from .pool import Pool, withdraw
from .prefetch import Prefetch
from .rates import RateLimits
from .reconnecting import Reconnecting
from .scheduled import Scheduled
from .settling import Settler
from .stopping import StopRequest, log_running, log_unstarted
from .subscriptions import Subscriptions
from .upkeep import Upkeep
from .waker import Waker

if TYPE_CHECKING:
    from ..app import TaskApp

log = logging.getLogger("flask_taskworker.worker")

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
    :param rates: how many runs of a task may start in a time.
    :param limits: how long runs may take.
    :param observer: follows what happens to the deliveries.
    :param refuse: asked before each run; gives the outcome of a delivery that must not run.
    :param scale: may change the pool's size; told whether there seems to be more to do.
    :param maintain: upkeep; gives the seconds until it wants to be called again.
    :param on_connected: called with the channel of each connection, before it reads anything.
    :param on_ready: called when it reads the queues.
    :param on_stopping: called once when it has been asked to stop, with the seconds that are
        left for running tasks.
    """

    def __init__(
        self,
        app: TaskApp,
        pool: Pool,
        queues: Sequence[str],
        waker: Waker,
        *,
        burst: bool,
        rates: RateLimits,
        limits: TimeLimits,
        observer: Observer,
        refuse: Callable[[Delivery], Outcome | None],
        scale: Callable[[bool], None],
        maintain: Callable[[], float],
        on_connected: Callable[[Any], None],
        on_ready: Callable[[], None],
        on_stopping: Callable[[float], None],
    ) -> None:
        self.app = app
        self.pool = pool
        self.subscriptions = Subscriptions(queues)
        self.burst = burst
        self.limits = limits
        self.rates = rates
        #: When the loop turned last, on the monotonic clock: whether it stands still.
        self.turned_at = clock.monotonic()
        #: Whether it stands still because a task runs in its own thread.
        self.in_task = False
        self._waker = waker
        self._on_connected = on_connected
        self._on_ready = on_ready
        self._upkeep = Upkeep(maintain)
        self._scale = scale
        self._refuse = refuse
        self._observer = observer
        self._stop = StopRequest(on_stopping)
        self._requests: deque[Callable[[], object]] = deque()
        self._prefetch = Prefetch(pool.size)
        self._scheduled = Scheduled(self.rates, self._submit, burst=burst)
        self._unsettled = Unsettled()
        self._ended = EndedRuns(pool, self._unsettled)
        self._broker = Reconnecting(app.config, self._pause)
        self._epoch = 0
        self._burst_is_over = False
        self._last_move = self._last_work = clock.monotonic()

    def stop(self, drain_timeout: float) -> None:
        """Reserve no more, let running tasks end within ``drain_timeout`` seconds, return.

        Safe to call from any thread and from a signal handler. Another call with a
        shorter time shortens the wait.
        """
        self._stop.make(drain_timeout)
        self._waker.wake()

    # -- for other threads ----------------------------------------------------------------

    def request(self, action: Callable[[], object]) -> None:
        """Have the consumer's thread do something at its next turn."""
        self._requests.append(action)
        self._waker.wake()

    @property
    def connection(self) -> kombu.Connection | None:
        """The connection it consumes on, the last one while there is none."""
        return self._broker.connection

    def unsettled(self) -> list[Delivery]:
        """The deliveries in this worker's hands: held for later, waiting, running."""
        return self._unsettled.snapshot()

    def held(self) -> list[Delivery]:
        """Those of them that wait here for their time."""
        return self._scheduled.snapshot()

    @property
    def prefetch_limit(self) -> int:
        """How many messages may be in this worker's hands."""
        return self._prefetch.limit

    # -- requests: in the consumer's thread, while it is connected ------------------------

    def refuse_again(self) -> None:
        """Ask of everything that has not started whether it may still run."""
        self._scheduled.keep_if(lambda delivery: not self._refused(delivery))
        for delivery in self.pool.withdraw():
            if not self._refused(delivery):
                self.pool.submit(delivery)

    def _do_requests(self) -> None:
        while self._requests:
            action = self._requests.popleft()
            try:
                action()
            except self._broker.errors:
                raise
            except Exception:
                log.exception("a command to this worker failed")

    # -- the loop -------------------------------------------------------------------------

    def run(self) -> None:
        """Consume until stopped; reconnect whenever the broker went away.

        :raises BrokerError: if the broker can be used neither now nor later, as with a
            damaged database file.
        """
        self._broker.run(self._consume, lambda: self._stop.made or self._burst_is_over)
        self._stop.announce()
        self._wait_for_runs()

    # -- one connection -------------------------------------------------------------------

    def _consume(self, connection: kombu.Connection) -> None:
        channel = connection.default_channel
        self._connection, self._channel = connection, channel
        self._capabilities = capabilities_of(connection)
        self._epoch += 1
        self._upkeep.connect(connection)
        self._ended.connect()
        self._settler = Settler(self.app, channel, self._capabilities, self._unsettled)
        self._scheduled.connect(self._settler, self._capabilities)
        self._prefetch.reset()
        self._on_connected(channel)
        consumer = self.subscriptions.connect(channel, self._received, self._prefetch.limit)
        self._consumer = consumer
        self._on_ready()
        # What this worker has claimed stays its own while a broker with leases is away.
        self._broker.repeat(
            self._turn, may_stay=lambda: self._capabilities.leased and not self._stop.made
        )
        self._settler.flush()
        consumer.cancel()

    def _turn(self) -> bool:
        """Settle what has ended, reserve what fits, wait. True when there is no more to do."""
        self.turned_at = clock.monotonic()
        self._waker.clear()
        self._do_requests()
        self._settle()
        if self._stop.made:
            return self._drain()
        self._scheduled.start_due(self._has_free_slot)
        received = self._reserve()
        self._release_stalled()
        if self.burst and self._is_burst_over(received):
            return True
        if not received:
            self._wait()
        return False

    def _settle(self) -> None:
        for delivery in self.pool.starts():
            self._tell(self._observer.started, delivery)
        ended = self.pool.finished()
        if ended:
            self._last_move = clock.monotonic()
            self._ended.extend(ended)
        for delivery, outcome in self._ended.settle(self._settler, self._epoch):
            self._prefetch.observe(outcome.runtime)
            self._tell(self._observer.ended, delivery, outcome)
        self._settler.flush_messages()

    def _tell(self, what: Callable[..., None], *about: object) -> None:
        try:
            what(*about)
        except Exception:
            log.exception("an observer of the worker failed")

    def _reserve(self) -> int:
        """Receive as much as the pool can take now; return how much that was."""
        self._scale(self._prefetch.was_filled)
        self._prefetch.slots = self.pool.size
        room = 0 if self._scheduled.is_full() else self._prefetch.room(self.pool.load())
        self._prefetch.apply(self._channel, self._capabilities, room, len(self._unsettled))
        return self._prefetch.fill(self._connection, room)

    def _received(self, raw: Any) -> None:
        self._prefetch.received += 1
        info = raw.delivery_info or {}
        queue = str(info.get("routing_key") or self.subscriptions.queues[0])
        accept = self.app.config.accept_content
        message = parse(raw, accept, body=not self.pool.reads_bodies)
        if isinstance(message, Unreadable):
            if signals.task_rejected.receivers:
                error = InvalidMessageError(message.reason)
                signals.task_rejected.notify(self, message=raw, exc=error)
            self._settler.park(raw, queue, message)
            return
        delivery = Delivery(raw, message, queue, self._epoch, limits=self.limits.of(message))
        self._unsettled.add(delivery)
        if self._stop.made or self._burst_is_over:  # sent before the broker heard of the end
            self._settler.give_back(delivery)
        elif not self._ended.settles(delivery) and not self._settler.recount(delivery):
            self._tell(self._observer.received, delivery)
            signals.task_received.notify(self, request=message)
            if not self._refused(delivery):
                self._scheduled.add(delivery)

    def _refused(self, delivery: Delivery) -> bool:
        outcome = self._refuse(delivery)
        if outcome is None:
            return False
        self._ended.add(delivery, outcome)
        self._waker.wake()
        return True

    def _submit(self, delivery: Delivery) -> None:
        if self._refused(delivery):
            return
        name = delivery.message.task
        if name in self.app.registry and not self.app.option_of(name, "acks_late"):
            self._settler.acknowledge_before_run(delivery)
        self._last_move = clock.monotonic()  # its thread needs a moment to take it
        self.in_task = True
        self.pool.submit(delivery)
        self.in_task = False

    def _has_free_slot(self) -> bool:
        return self.pool.load() < self.pool.size

    def _release_stalled(self) -> None:
        """Give waiting deliveries back when long runs hold every slot: others may be free."""
        if clock.monotonic() - self._last_move <= STALLED_AFTER:
            return
        due = [] if self._has_free_slot() else self._scheduled.pop_due()
        if due or self.pool.waiting():
            self._give_back([*due, *withdraw(self.pool)])
            self._prefetch.reset()

    def _give_back(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            if delivery.epoch == self._epoch:
                self._settler.give_back(delivery)

    # -- waiting and stopping -------------------------------------------------------------

    def _wait(self) -> None:
        """Wait for a message, a run that ends, or the next thing that is due."""
        now = clock.monotonic()
        until = min(now + self.app.config.loop_interval, self._upkeep.do_due(now))
        due = self._scheduled.next_due()
        if due > now:
            until = min(until, due)
        if due <= now or self.pool.waiting():
            until = min(until, now + STALLED_AFTER)
        if self.burst and not self.pool.load():
            until = min(until, now + BURST_PATIENCE)
        wait_for_messages(
            self._connection,
            self._capabilities,
            max(0.0, until - now),
            self._waker.fileno(),
            busy=self.pool.load() > 0,
        )

    def _is_burst_over(self, received: int) -> bool:
        """Whether the queues have been empty for long enough: some brokers answer later."""
        now = clock.monotonic()
        if received or self._unsettled:
            self._last_work = now
            return False
        patience = 0.0 if self._capabilities.wake else BURST_PATIENCE
        self._burst_is_over = now - self._last_work >= patience
        return self._burst_is_over

    def _drain(self) -> bool:
        """Let running tasks end, and give back the rest. True when there is no more to do."""
        self._stop.announce()
        self._consumer.cancel()  # or the broker goes on sending while the last tasks run
        unstarted = [*withdraw(self.pool), *self._scheduled.pop_all()]
        log_unstarted(unstarted)
        self._give_back(unstarted)
        if not self._unsettled:  # what has ended since is to be settled before we go
            return True
        if self._stop.seconds_left() <= 0:
            running = self.pool.running()
            log_running(running)
            self._give_back([delivery for delivery in running if not delivery.acknowledged])
            return True
        self._settler.flush()
        self._wait_for_pool()
        return False

    def _wait_for_pool(self) -> None:
        self._pause(min(self._stop.seconds_left(), 1.0))

    def _pause(self, seconds: float) -> None:
        """Sleep, unless a run ends or the worker is stopped."""
        self.turned_at = clock.monotonic()
        select.select([self._waker.fileno()], [], [], seconds)

    def _wait_for_runs(self) -> None:
        """After the connection is gone for good: runs still get their time to end."""
        while True:
            self._waker.clear()
            self._ended.extend(self.pool.finished())
            self._ended.store_without_broker(self.app)
            if not self.pool.running() or self._stop.seconds_left() <= 0:
                return
            self._wait_for_pool()
