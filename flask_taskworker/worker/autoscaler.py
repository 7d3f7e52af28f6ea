"""Follows the load with the size of a pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import clock

if TYPE_CHECKING:
    from .pool import Pool

#: A slot that was not needed for so long is given up. Seconds.
KEEP = 30.0


class Autoscaler:
    """Keeps a pool between two sizes: as large as it has work, smaller when it had none for long.

    :param pool: made with the smallest size.
    :param most: how many tasks at once at most.
    :param fewest: how many slots stay in any case.
    """

    def __init__(self, pool: Pool, most: int, fewest: int) -> None:
        self.most, self.fewest = most, max(1, fewest)
        self._pool = pool
        self._needed_at = clock.monotonic()

    def update(self, most: int | None, fewest: int | None) -> tuple[int, int]:
        """Set other bounds, where they are given; return those that hold now."""
        self.most = max(1, self.most if most is None else most)
        self.fewest = min(self.most, max(1, self.fewest if fewest is None else fewest))
        return self.most, self.fewest

    def info(self) -> dict[str, Any]:
        """What remote control shows of it, in Celery's words."""
        return {
            "max": self.most,
            "min": self.fewest,
            "current": self._pool.size,
            "qty": self._pool.load(),
        }

    def scale(self, more_to_come: bool) -> None:
        """Look at the load, and grow or shrink.

        :param more_to_come: whether the queues seem to hold more than the pool could take.
        """
        size, load, now = self._pool.size, self._pool.load(), clock.monotonic()
        wanted = min(max(load + (1 if more_to_come else 0), self.fewest), self.most)
        if wanted >= size:
            self._needed_at = now
        if wanted > size:
            self._pool.grow(wanted - size)
        elif size > self.most:
            self._pool.shrink(size - self.most)
        elif wanted < size and now - self._needed_at >= KEEP:
            self._pool.shrink(size - wanted)
            self._needed_at = now
