"""Staying the owner of claims, and taking over those of owners that are gone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from ... import clock
from .records import (
    dead_letter,
    delivery_count,
    dumps,
    loads,
    read_record,
    redelivered,
)
from .scripts import DEAD, FORGET, RENEW, RESCUE
from .wire import Wire

if TYPE_CHECKING:
    from .claims import Claims

log = logging.getLogger(__name__)

#: Dead owners are looked for at least this often. Seconds.
SWEEP = 5.0
#: Messages that Celery's workers left behind are looked for this often. Seconds.
FOREIGN_SWEEP = 10.0
#: A script renews no more claims than this.
_BATCH = 2000
#: Fields that one step of a scan looks at.
_SCAN = 1000


class LeaseKeeper:
    """Renews the lease of one owner and rescues the claims of dead ones, in its own thread.

    :param claims: of the owner.
    :param make: a connection of redis-py, not connected yet.
    :param list_for: the list for a queue and a message.
    :param restore_foreign: puts back what kombu's own consumers left behind.
    """

    def __init__(
        self,
        claims: Claims,
        make: Callable[[], Any],
        list_for: Callable[[str, dict[str, Any] | None], str],
        restore_foreign: Callable[[], None],
    ) -> None:
        self._claims = claims
        self._list_for = list_for
        self._restore_foreign = restore_foreign
        self._wire = Wire(make, Wire.load)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="taskworker-lease", daemon=True)
        self._failing = False
        self._registered = False
        self._foreign_at = clock.monotonic()

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; it is not waited for long."""
        self._ended.set()
        self._wire.hurry()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(2 * _JOIN)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self.beat()
                self._failing = False
            except (RedisError, OSError) as exc:
                level = logging.DEBUG if self._failing else logging.WARNING
                log.log(level, "the lease cannot be renewed: %s", exc)
                self._failing = True
            except Exception:
                log.exception("keeping the lease failed in an unexpected way")
            pause = min(self._claims.options.lease / 3, SWEEP)
            self._ended.wait(min(pause, 0.5) if self._failing else pause)
        self._wire.close()

    def beat(self) -> None:
        """Renew the lease, then look for owners that did not."""
        self._renew()
        self.rescue()
        now = clock.monotonic()
        if now >= self._foreign_at:
            self._foreign_at = now + FOREIGN_SWEEP
            self._restore_foreign()

    def _renew(self) -> None:
        claims = self._claims
        numbers = list(claims.claimed)
        for at in range(0, max(len(numbers), 1), _BATCH):
            batch = " ".join(map(str, numbers[at : at + _BATCH]))
            missing = self._wire.run(
                RENEW, claims.keys[1:], (claims.owner, claims.options.lease, batch)
            )
            if missing and self._registered and numbers:
                log.warning(
                    "the lease was over (no sign of life for %g s?): messages that run here are "
                    "delivered again",
                    claims.options.lease,
                )
            self._registered = True

    def rescue(self) -> int:
        """Put the claims of dead owners back; return how many."""
        keys = self._claims.keys
        dead = {owner.decode() for owner in self._wire.run(DEAD, (keys.leases,), ())}
        if not dead:
            return 0
        found = list(self._claims_of(dead))
        # The oldest claim has to come to the head last.
        found.sort(key=lambda claim: -claim[1])
        moved = sum(self._put_back(*claim) for claim in found)
        for owner in dead:
            self._wire.run(FORGET, (keys.leases,), (owner,))
        if moved:
            log.warning(
                "%d messages of %d dead consumers are back in their queues", moved, len(dead)
            )
        return moved

    def _claims_of(self, owners: set[str]) -> Iterator[tuple[str, int, bytes]]:
        """Owner, number and record of each of their claims, found in ``unacked``."""
        cursor: Any = 0
        while True:
            cursor, pairs = self._wire.command(
                "HSCAN", self._claims.keys.unacked, cursor, "MATCH", "tw:*", "COUNT", _SCAN
            )
            for field, record in zip(pairs[::2], pairs[1::2], strict=True):
                _, owner, number = field.decode().split(":")
                if owner in owners:
                    yield owner, int(number), record
            if int(cursor) == 0:
                return

    def _put_back(self, owner: str, number: int, record: bytes) -> int:
        text, queue = read_record(record)
        list, side, changed = self._after_crash(queue, text)
        keys = self._claims.keys
        moved = self._wire.run(
            RESCUE, (*keys, list), (owner, f"tw:{owner}:{number}", side, changed)
        )
        return int(moved)

    def _after_crash(self, queue: str, text: bytes) -> tuple[str, str, str]:
        """List, side and text of a message whose consumer died."""
        try:
            payload = loads(text)
        except ValueError as exc:
            letter = dead_letter(text, f"the message cannot be read: {exc}")
            return self._list_for(f"{queue}.dead", None), "LPUSH", dumps(letter)
        count = delivery_count(payload) + 1
        if count >= self._claims.options.max_deliveries:
            letter = dead_letter(payload, too_often(count))
            return self._list_for(f"{queue}.dead", None), "LPUSH", dumps(letter)
        return self._list_for(queue, payload), "RPUSH", dumps(redelivered(payload, count))


def too_often(count: int) -> str:
    """Why a message that was delivered so often is not delivered again."""
    return f"it was delivered {count} times and never settled; perhaps it ends its worker"


_JOIN = 1.0
