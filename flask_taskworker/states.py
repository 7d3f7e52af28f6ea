"""The states of a task, with Celery's names, and which moves between them are legal."""

from __future__ import annotations

#: The task is queued, or nothing is known about it.
PENDING = "PENDING"
#: A worker has it, but has not started it.
RECEIVED = "RECEIVED"
#: A worker runs it (stored only with ``track_started``).
STARTED = "STARTED"
#: It returned.
SUCCESS = "SUCCESS"
#: It raised.
FAILURE = "FAILURE"
#: It was queued again and will run once more.
RETRY = "RETRY"
#: It was revoked, or expired, before it ran.
REVOKED = "REVOKED"
#: It refused its message. Not stored: the message is back in its queue, or parked.
REJECTED = "REJECTED"
#: It asked for nothing to be stored.
IGNORED = "IGNORED"

READY_STATES = frozenset({SUCCESS, FAILURE, REVOKED})
UNREADY_STATES = frozenset({PENDING, RECEIVED, STARTED, REJECTED, RETRY})
EXCEPTION_STATES = frozenset({RETRY, FAILURE, REVOKED})
PROPAGATE_STATES = frozenset({FAILURE, REVOKED})
ALL_STATES = READY_STATES | UNREADY_STATES


def may_follow(stored: str | None, new: str) -> bool:
    """Whether a stored state may be replaced by a new one.

    Only SUCCESS is final: a message that is delivered twice must not turn a task
    that succeeded into a failed one, while a failed one may still succeed when it
    is run again. A state on the way there (the RETRY of an earlier run, written late)
    does not undo the end.
    """
    if stored == SUCCESS:
        return new == SUCCESS
    return stored not in READY_STATES or new in READY_STATES
