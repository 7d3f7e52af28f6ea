"""Stores the records of runs, and waits for a store that is away."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from .. import clock, failpoints, states
from .delivery import Outcome
from .outcomes import record_of

if TYPE_CHECKING:
    from ..backends.base import ResultBackend
    from ..message import TaskMessage

log = logging.getLogger("flask_taskworker.worker")

#: How long a finished result is tried to be stored before its message is put back, in seconds.
#: The run is done and only its result is not, so this outlasts a restart of a database.
STORE_PATIENCE = 600.0
T = TypeVar("T")


class Recorder:
    """Stores records at once, or prepares them to be stored with the settlement.

    :param backend: where they go.
    :param with_settlement: whether the consumer stores a record in the transaction that
        acknowledges the message.
    :param closing: set when nothing is to be waited for any more.
    """

    def __init__(
        self, backend: ResultBackend, with_settlement: bool, closing: threading.Event
    ) -> None:
        self.backend = backend
        self.with_settlement = with_settlement
        self._closing = closing

    def store_started(self, message: TaskMessage, hostname: str) -> None:
        """Store that a run has begun. Never raises."""
        if not self.backend.enabled:
            return
        meta = {"pid": os.getpid(), "hostname": hostname}
        try:
            self.backend.store(replace(record_of(message, states.STARTED, None), result=meta))
        except Exception as exc:  # worth a line, not worth the run
            log.warning("state STARTED of %s is not stored: %s", message.id, exc)

    def store(self, outcome: Outcome, at_once: bool = False, patient: bool = True) -> Outcome:
        """Store the record of an outcome, or prepare it; what is stored is no longer in it.

        :param at_once: store it before this returns, in any case.
        :param patient: wait for a store that is away.
        :raises EncodeError: if the result cannot be kept.
        :raises Exception: one of the backend's ``transient_errors``, if it stays away.
        """
        record = outcome.record
        if record is None:
            return outcome
        if self.with_settlement and not at_once:
            # It may have to look at the database once.
            statement = self.take(
                lambda: self.backend.statement(record), record.task_id, patient=patient
            )
            return outcome._replace(statement=statement)
        failpoints.hit("before_result")
        self.take(lambda: self.backend.store(record), record.task_id, patient=patient)
        failpoints.hit("after_result")
        return outcome._replace(record=None)

    def take(self, step: Callable[[], T], task_id: str, *, patient: bool = True) -> T:
        """Take a step that needs a store or a broker, again and again while that is away."""
        pause = 0.1
        deadline = clock.monotonic() + STORE_PATIENCE
        while True:
            try:
                return step()
            except self.backend.transient_errors as exc:
                if not patient or clock.monotonic() + pause > deadline:
                    raise
                if self._closing.wait(pause):
                    raise
                log.warning("result of %s is not stored yet: %s", task_id, exc)
                pause = min(pause * 2, 5.0)
