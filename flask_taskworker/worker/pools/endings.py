"""What becomes of a run whose process died: by a limit, an order, or by itself."""

from __future__ import annotations

import logging
import signal
from typing import TYPE_CHECKING

from ... import states
from ...exceptions import TaskRevokedError, TimeLimitExceeded, WorkerLostError
from ..delivery import Outcome, Settlement

if TYPE_CHECKING:
    from ..executor import Executor
    from .offspring import Given

log = logging.getLogger("flask_taskworker.worker")


def described(code: int) -> str:
    """An exit code in words, as Celery's pool has them."""
    if code >= 0:
        return f"exitcode {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"


class Endings:
    """Makes the outcomes of runs whose process died.

    :param executor: the worker's own; it knows how outcomes are recorded.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def of(self, job: Given, code: int) -> Outcome:
        """The outcome of a run that ended with its process.

        :param code: the exit code of the process, negative for a signal.
        """
        delivery = job.delivery
        if job.out_of_time:
            hard = delivery.limits[0]
            return self._executor.ended(delivery, states.FAILURE, TimeLimitExceeded(hard))
        if delivery.terminated is not None:
            return self._executor.ended(delivery, states.REVOKED, TaskRevokedError("terminated"))
        return self._lost(job, code)

    def _lost(self, job: Given, code: int) -> Outcome:
        delivery, message = job.delivery, job.delivery.message
        text = f"Worker exited prematurely: {described(code)} Job: {job.number}."
        log.error("task %s[%s] has ended its process: %s", message.task, message.id, text)
        if not delivery.acknowledged and self._goes_back(message.task):
            return Outcome(Settlement.REQUEUE, reason=text)
        return self._executor.ended(delivery, states.FAILURE, WorkerLostError(text))

    def _goes_back(self, name: str) -> bool:
        task, config = self._executor.app.registry.get(name), self._executor.app.config
        default = config.reject_on_worker_lost
        return bool(task.options_.get("reject_on_worker_lost", default)) if task else default
