"""Signals that tell what happens to tasks and workers, with Celery's names and arguments.

::

    from flask_taskworker import signals

    @signals.task_failure.connect
    def report(sender, task_id, exception, **details): ...

A receiver gets the sender first and the rest by name; take ``**details`` as well, for what
later releases add. ``connect(f, sender=task)`` hears of one sender alone. Receivers only watch:
what one raises is logged, and changes nothing for the task, the worker or the other receivers.
They are told in the thread, or child process, where the thing happens.
"""

from __future__ import annotations

import logging
from typing import Any

from blinker import NamedSignal

log = logging.getLogger("flask_taskworker")


class TaskSignal(NamedSignal):  # type: ignore[misc,unused-ignore]
    """A blinker signal whose receivers cannot do harm."""

    def notify(self, sender: Any, **details: Any) -> None:
        """Tell every receiver. Costs next to nothing if there is none, and never raises.

        :param sender: what it happened to.
        :param details: what is known about it.
        """
        if not self.receivers:
            return
        for receiver in list(self.receivers_for(sender)):
            try:
                receiver(sender, **details)
            except BaseException:  # SystemExit included: that is not for a receiver to say
                log.exception("a receiver of %s failed: %r", self.name, receiver)


# -- sending; the sender is the task's name -----------------------------------------------

before_task_publish = TaskSignal(
    "before_task_publish",
    "A message is about to be sent. Changes in ``headers`` and ``properties`` travel with it: "
    "body, exchange, routing_key, headers, properties, declare, retry_policy.",
)
after_task_publish = TaskSignal(
    "after_task_publish", "The broker has the message: body, exchange, routing_key, headers."
)

# -- receiving; the sender is the consumer ------------------------------------------------

task_received = TaskSignal("task_received", "A worker has it, but has not started it: request.")
task_revoked = TaskSignal(
    "task_revoked",
    "It was revoked, was ended while it ran, or has expired; the sender is the task: "
    "request, terminated, signum, expired.",
)
task_rejected = TaskSignal(
    "task_rejected", "A message is no task message and is parked: message, exc."
)
task_unknown = TaskSignal(
    "task_unknown", "No task of this name is registered; it is parked: message, exc, name, id."
)

# -- running; the sender is the task ------------------------------------------------------

task_prerun = TaskSignal("task_prerun", "A run begins: task_id, task, args, kwargs.")
task_postrun = TaskSignal(
    "task_postrun", "A run has ended, however: task_id, task, args, kwargs, retval, state."
)
task_success = TaskSignal("task_success", "It returned, and that is stored: result.")
task_failure = TaskSignal(
    "task_failure",
    "It failed, and that is stored: task_id, exception, args, kwargs, traceback, einfo.",
)
task_retry = TaskSignal("task_retry", "It is queued once more: request, reason, einfo.")
task_internal_error = TaskSignal(
    "task_internal_error",
    "A fault of the worker itself; the message goes back to its queue: "
    "task_id, args, kwargs, request, exception, traceback, einfo.",
)

# -- workers ------------------------------------------------------------------------------

celeryd_init = TaskSignal(
    "celeryd_init",
    "A worker is being set up; the sender is its node name: instance, conf, options.",
)
celeryd_after_setup = TaskSignal(
    "celeryd_after_setup", "A worker is set up; the sender is its node name: instance, conf."
)
worker_init = TaskSignal("worker_init", "A worker is about to start; the sender is the worker.")
worker_ready = TaskSignal("worker_ready", "It reads its queues; the sender is the consumer.")
worker_shutting_down = TaskSignal(
    "worker_shutting_down",
    "It was asked to end; the sender is its node name: sig, how ('Warm' or 'Cold'), exitcode.",
)
worker_shutdown = TaskSignal("worker_shutdown", "It has ended; the sender is the worker.")
worker_before_create_process = TaskSignal(
    "worker_before_create_process", "A child process is about to be made; the sender is its pool."
)
worker_process_init = TaskSignal(
    "worker_process_init", "A child process is ready to run tasks; sent in that process."
)
worker_process_shutdown = TaskSignal(
    "worker_process_shutdown", "A child process ends; sent in that process: pid, exitcode."
)
heartbeat_sent = TaskSignal("heartbeat_sent", "A heartbeat event was sent.")
