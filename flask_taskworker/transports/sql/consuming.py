"""Claiming messages and handing them to callbacks."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from queue import Empty
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import clock, failpoints
from .codec import decode
from .dialects.base import Row
from .qos import Delivered
from .settlements import NoLongerOwnedError, Settlement, apply, with_points

if TYPE_CHECKING:
    from .channel import Channel
    from .connection import HeldConnection
    from .lease import Lease

log = logging.getLogger(__name__)

#: How long a busy consumer goes on without a look at delayed messages, in seconds.
_DUE_CHECK = 0.05
#: How long a busy consumer claims from the same queues without a look at all of them, which
#: is also how late it may notice that one was paused, in seconds.
_LOOK = 0.25
#: How often a consumer looks for messages in its name that are not in its books, and how much
#: later it looks again before it believes that, in seconds.
_STRAYS, _STRAYS_AGAIN = 30.0, 1.0


class _Queue(NamedTuple):
    no_ack: bool
    deliver: Callable[[dict[str, Any]], object]


class Consumption:
    """What one channel consumes, and its registration as a consumer."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._queues: dict[str, _Queue] = {}
        self._undelivered: deque[tuple[str, int | None, dict[str, Any]]] = deque()
        self._lease: Lease | None = None
        self._turn = 0
        self._due_check_at = 0.0
        self._last_ready: list[tuple[int, str]] = []
        self._look_at = 0.0
        self._strays: set[int] = set()
        self._strays_at = math.inf
        #: When the next delayed message is due, in epoch seconds, as last seen.
        self.next_due: float | None = None
        #: Expiry of queues this channel declared, in seconds.
        self.expiring: dict[str, float] = {}

    # -- consumers ------------------------------------------------------------------------

    def start(self, queue: str, no_ack: bool, deliver: Callable[[dict[str, Any]], object]) -> None:
        self._queues[queue] = _Queue(no_ack, deliver)
        if queue in self.expiring:
            self._keep_from_expiring(queue)

    def stop(self, queue: str) -> None:
        """Stop delivering; what was claimed but not delivered goes back."""
        self._queues.pop(queue, None)
        if self._lease is not None and queue in self.expiring:
            self._lease.queues.pop(self._channel.database.queue_ids.get(queue, 0), None)
        rest = [item for item in self._undelivered if item[0] != queue]
        for name, tag, _ in self._undelivered:
            if name == queue and tag is not None:
                self._channel.requeue(tag, count_delivery=False)
        self._undelivered = deque(rest)

    def drop_undelivered(self) -> None:
        """Forget deliveries that no callback has seen; their tags are still unsettled."""
        self._undelivered.clear()

    def sign_off(self) -> None:
        """End the registration; nothing may be unsettled any more."""
        lease, self._lease = self._lease, None
        if lease is not None:
            self._channel.database.keeper.release(lease)

    def forget(self) -> None:
        """In a forked child: nothing of this is ours."""
        self._undelivered.clear()
        self._lease = None

    def lease(self) -> Lease:
        """The registration, renewed if it was taken away."""
        if self._lease is None or self._lease.lost:
            lost = self._lease
            keeper = self._channel.database.keeper
            self._lease = keeper.register()
            self._strays_at = min(self._strays_at, clock.monotonic() + _STRAYS)
            if lost is not None:
                keeper.release(lost)
        return self._lease

    def _keep_from_expiring(self, queue: str) -> None:
        from .routing import queue_id

        id = queue_id(self._channel.held(), queue)
        assert id is not None
        self._channel.database.keeper.use_queue(self.lease(), id, self.expiring[queue])

    # -- looking --------------------------------------------------------------------------

    def has_work(self, delayed: bool = True) -> bool:
        """Whether a claim would find something now.

        :param delayed: also ask for messages that were delayed meanwhile; else only those
            known before are looked after.
        """
        if self._undelivered:
            return True
        held = self._channel.held()
        if clock.monotonic() >= self._strays_at:
            self._return_strays(held)
        if not self._channel.can_claim():
            return False
        if not delayed:
            delayed = self.next_due is not None and self.next_due <= held.database.now()
        if delayed and self._promote_due(held):
            return True
        return bool(self._ready(held))

    def reconnected(self) -> None:
        """The connection broke and there is another one."""
        self._strays_at = 0.0

    def _return_strays(self, held: HeldConnection) -> None:
        """Put back what is ours in the database and not in our books.

        The answer to a claim was lost with the connection, or a crash of the server undid an
        acknowledgement. Nobody would settle these messages as long as this consumer lives.
        """
        lease = self._lease
        if lease is None:
            self._strays_at = math.inf
            return
        channel, database = self._channel, held.database
        strays = set(database.dialect.owned_by(held, lease.id))
        strays -= channel.qos.message_ids()
        strays -= {item.id for item in channel.settlements.peek()}
        # A settlement of another thread is in neither book for a moment: look twice.
        certain = strays & self._strays
        self._strays = strays - certain
        self._strays_at = clock.monotonic() + (_STRAYS_AGAIN if self._strays else _STRAYS)
        if certain:
            log.warning(
                "%d message(s) that did not reach consumer %d are delivered again",
                len(certain), lease.id,
            )  # fmt: skip
            held.execute(
                f"UPDATE {database.dialect.names.message} SET owner = 0 "
                f"WHERE owner = {lease.id:d} AND id IN ({database.dialect.ids(certain)})"
            )
            database.wake(held)

    def _ready(self, held: HeldConnection) -> list[tuple[int, str]]:
        """Look which queues hold something."""
        self._look_at = clock.monotonic() + _LOOK
        self._last_ready = []  # one of them may be paused by now
        return held.database.dialect.ready_queues(held, list(self._queues))

    def _promote_due(self, held: HeldConnection) -> bool:
        """Look when the next delayed message is due; make it ready if that is now."""
        database = held.database
        due = held.execute(database.dialect.next_due).fetchone()[0]
        self._due_check_at = clock.monotonic() + _DUE_CHECK
        if not isinstance(due, (int, float)):
            due = None  # SQLite keeps whatever somebody wrote there by hand
        if due is None or due > database.now():
            self.next_due = due
            return False
        self.next_due = None
        return database.janitor.promote(held) > 0

    # -- claiming -------------------------------------------------------------------------

    def claim_and_deliver(self) -> None:
        """Deliver what is at hand, else claim and deliver.

        :raises Empty: if there is nothing.
        """
        if self._undelivered:
            self._deliver()
            return
        channel = self._channel
        channel.flush_if_due()
        limit = channel.qos.claim_size()
        if limit <= 0:
            raise Empty
        held = channel.held()
        held.database.janitor.run(held)
        if clock.monotonic() >= self._strays_at:
            self._return_strays(held)
        if clock.monotonic() >= self._due_check_at:
            self._promote_due(held)
        if not (
            self._claim_ready(held, self._busy(), limit)
            or self._claim_ready(held, self._ready(held), limit)
        ):
            raise Empty
        self._deliver()

    def _claim_ready(self, held: HeldConnection, ready: list[tuple[int, str]], limit: int) -> bool:
        """Claim from queues that should hold something; False if there was nothing."""
        if not ready:
            return False
        lease = self.lease()
        if held.durable:
            held.set_durable(False)
        rows = self._claim(held, lease, ready, limit)
        full = len(rows) >= limit and not held.database.dialect.looks_first
        self._last_ready = ready if full else []
        self._note(rows, lease, dict(ready))
        return bool(self._undelivered)

    def _busy(self) -> list[tuple[int, str]]:
        """The queues of the last claim, if they had more than was asked for just now."""
        if not self._last_ready or clock.monotonic() >= self._look_at:
            return []
        return [item for item in self._last_ready if item[1] in self._queues]

    def get_one(self, queue: str, no_ack: bool) -> dict[str, Any] | None:
        """One message of a queue, without a consumer."""
        channel = self._channel
        channel.flush_if_due()
        held = channel.held()
        if clock.monotonic() >= self._strays_at:
            self._return_strays(held)
        self._promote_due(held)
        ready = held.database.dialect.ready_queues(held, [queue])
        if not ready:
            return None
        lease = self.lease()
        previous = self._queues.get(queue)
        before = len(self._undelivered)
        self._queues[queue] = _Queue(no_ack, lambda raw: None)
        try:
            self._note(self._claim(held, lease, ready, 1), lease, dict(ready))
        finally:
            if previous is None:
                del self._queues[queue]
            else:
                self._queues[queue] = previous
        return self._undelivered.pop()[2] if len(self._undelivered) > before else None

    def _claim(
        self, held: HeldConnection, lease: Lease, ready: list[tuple[int, str]], limit: int
    ) -> list[Row]:
        """Claim up to ``limit`` messages, and write the buffered settlements with it."""
        channel, dialect = self._channel, held.database.dialect
        self._turn += 1
        turn = self._turn % len(ready)
        queues = [(id, self._queues[name].no_ack) for id, name in ready[turn:] + ready[:turn]]
        batch = channel.settlements.take()

        def work() -> list[Row]:
            if batch:
                apply(held, dialect, batch)
            return _share_out(held, lease.id, queues, limit)

        if batch:
            with_points(batch, "before")
        failpoints.hit("before_claim")
        lost: list[Settlement] = []
        try:
            merged = _claim_with_acks(held, lease.id, queues, limit, batch)
            if merged is not None:
                rows, lost = merged
            elif batch or dialect.claims_in_transaction or len(queues) > 1:
                rows = held.transaction(work)
            else:
                rows = work()
        except NoLongerOwnedError:
            channel.settlements.put_back(batch)
            channel.flush()
            return self._claim(held, lease, ready, limit)
        except BaseException:
            channel.settlements.put_back(batch)
            raise
        failpoints.hit("after_claim")
        if batch:
            with_points(batch, "after")
            channel.settled(batch, lost)
        return rows

    def _note(self, rows: list[Row], lease: Lease, names: dict[int, str]) -> None:
        """Enter claimed rows into the books; set aside what must not be delivered."""
        channel = self._channel
        most = channel.options.max_deliveries
        for row in rows:
            name = names[row.queue]
            no_ack = self._queues[name].no_ack
            tag = channel.qos.next_tag()
            refused = None
            raw: dict[str, Any] = {}
            try:
                raw = decode(row, tag)
            except (ValueError, TypeError, RecursionError) as exc:
                refused = f"the stored message cannot be read: {exc}"
            if most and row.attempts > most:
                refused = (
                    f"delivered {row.attempts - 1} times without being settled "
                    f"(max_deliveries={most})"
                )
            if refused is None:
                if not no_ack and not channel.qos.track(tag, Delivered(row.id, lease.id)):
                    channel.report_lost([row.id])
                self._undelivered.append((name, None if no_ack else tag, raw))
            elif not no_ack:
                log.error("message %d of queue %r becomes a dead letter: %s", row.id, name, refused)
                channel.settlements.add(Settlement("dead_letter", row.id, lease.id, reason=refused))
            else:
                log.error("message %d of queue %r is dropped: %s", row.id, name, refused)
        if any(item.kind == "dead_letter" for item in channel.settlements.peek()):
            channel.flush()

    def _deliver(self) -> None:
        """Hand everything at hand to the callbacks; what they raise keeps the rest."""
        while self._undelivered:
            name, tag, raw = self._undelivered.popleft()
            consumer = self._queues.get(name)
            if consumer is None:
                if tag is not None:
                    self._channel.requeue(tag, count_delivery=False)
                continue
            consumer.deliver(raw)


def _share_out(
    held: HeldConnection, owner: int, queues: list[tuple[int, bool]], limit: int
) -> list[Row]:
    """Claim from several queues in turn; what one does not need is left for the next."""
    dialect = held.database.dialect
    rows: list[Row] = []
    for position, (queue, no_ack) in enumerate(queues):
        share = -((len(rows) - limit) // (len(queues) - position))
        if share <= 0:
            continue
        if no_ack:
            # One at a time: what is taken but not delivered would be lost with us.
            rows += dialect.take(held, queue, 1)
        else:
            rows += dialect.claim(held, owner, queue, share)
    return rows


def _claim_with_acks(
    held: HeldConnection,
    owner: int,
    queues: list[tuple[int, bool]],
    limit: int,
    batch: list[Settlement],
) -> tuple[list[Row], list[Settlement]] | None:
    """The commonest case in fewer round trips, on databases that can.

    :returns: the rows and the refused settlements; None if this is another case.
    """
    if len(queues) > 1 or queues[0][1]:
        return None
    acked_owner = batch[0].owner if batch else owner
    if any(item.kind != "ack" or not item.is_plain or item.owner != acked_owner for item in batch):
        return None
    outcome = held.database.dialect.claim_with_acks(
        held, owner, queues[0][0], limit, acked_owner, [item.id for item in batch]
    )
    if outcome is None:
        return None
    rows, acked = outcome
    return rows, [item for item in batch if item.id not in acked]
