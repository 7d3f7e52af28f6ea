"""Named points at which a test can make the process fail.

Each step between ``delay()`` and the acknowledgement calls :func:`hit` with its
name. Normally that is one test of an empty mapping. A fault test arms a point,
either in its own process by :func:`arm` or in a child through the environment::

    TASKWORKER_FAILPOINTS="before_ack=kill"        # SIGKILL at the first hit
    TASKWORKER_FAILPOINTS="after_run=kill:3"       # at the third hit
    TASKWORKER_FAILPOINTS="before_result=raise"    # raise FailpointError once
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

#: Every point there is, in the order a message meets them.
NAMES = (
    "before_publish",
    "after_publish",
    "before_claim",
    "after_claim",
    "before_run",
    "after_run",
    "before_retry",
    "after_retry",
    "before_continuation",
    "after_continuation",
    "before_result",
    "after_result",
    "before_chord",
    "after_chord",
    "before_ack",
    "after_ack",
    "before_requeue",
    "after_requeue",
    "before_dead_letter",
    "after_dead_letter",
)


class FailpointError(RuntimeError):
    """Raised by a point armed with ``raise``."""


_armed: dict[str, tuple[Callable[[str], None], int]] = {}
_lock = threading.Lock()


def hit(name: str) -> None:
    """Do what was armed for ``name``; nothing if nothing was."""
    if _armed:
        _trigger(name)


def arm(name: str, action: Callable[[str], None] | str, nth: int = 1) -> None:
    """Arm a point.

    :param name: one of :data:`NAMES`.
    :param action: ``"kill"``, ``"raise"``, or a callable that gets the name.
    :param nth: the hit at which it acts, counted from 1; it acts once.
    :raises ValueError: for a name or an action that does not exist.
    """
    if name not in NAMES:
        raise ValueError(f"no failpoint {name!r}; there are: {', '.join(NAMES)}")
    if isinstance(action, str):
        try:
            action = _ACTIONS[action]
        except KeyError:
            raise ValueError(f"no failpoint action {action!r}; use kill or raise") from None
    with _lock:
        _armed[name] = (action, nth)


def disarm() -> None:
    """Disarm every point."""
    with _lock:
        _armed.clear()


def _trigger(name: str) -> None:
    with _lock:
        action, left = _armed.get(name, (None, 0))
        if action is None:
            return
        if left > 1:
            _armed[name] = (action, left - 1)
            return
        del _armed[name]
    action(name)


def _kill(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise(name: str) -> None:
    raise FailpointError(name)


_ACTIONS: dict[str, Callable[[str], None]] = {"kill": _kill, "raise": _raise}


def _arm_from_environment() -> None:
    for item in filter(None, os.environ.get("TASKWORKER_FAILPOINTS", "").split(",")):
        name, _, rest = item.partition("=")
        action, _, nth = rest.partition(":")
        arm(name.strip(), action.strip() or "kill", int(nth or 1))


_arm_from_environment()
