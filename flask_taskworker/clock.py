"""The clocks of the package, in one place so that tests can move them.

Modules read ``clock.wall()`` and ``clock.monotonic()`` through this module's
attributes; a test replaces the attribute (see ``tests/support``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timezone

#: Seconds since the epoch, UTC. Used for what leaves the process.
wall: Callable[[], float] = time.time
#: Seconds that never go backwards. Used for time limits and waits inside a process.
monotonic: Callable[[], float] = time.monotonic


def utcnow() -> datetime:
    """The current time as an aware UTC datetime."""
    return datetime.fromtimestamp(wall(), timezone.utc)
