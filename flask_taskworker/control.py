"""Remote control, the side that asks: inspect the workers, steer them, revoke tasks.

::

    task_worker.control.inspect().active()
    task_worker.control.revoke(result.id, terminate=True)
    task_worker.control.pause_queue("mail")
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import clock, states
from .backends.base import TaskRecord
from .backends.encoding import encode_exception
from .broker import broker_connection, capabilities_of, recoverable_errors
from .events import no_broadcast
from .exceptions import BrokerError, TaskRevokedError
from .fields import FARTHEST_ETA
from .mailbox import Mailbox
from .transports.fleet import Fleet, Stamp

if TYPE_CHECKING:
    from .app import TaskApp

log = logging.getLogger("flask_taskworker")

#: What one worker answers, by node name.
Replies = dict[str, Any]
OnReply = Callable[[Replies], object]

#: How long a revocation is kept: as long as a task may wait for its ETA. Seconds.
KEPT = FARTHEST_ETA
#: The states of a task that no worker has begun.
_NOT_BEGUN = frozenset({states.PENDING, states.RECEIVED, states.RETRY, states.REJECTED})


class Control:
    """Talks to the workers of an app's broker: all of them, or those it names.

    Where a method takes ``destination`` it is a list of node names; None means all.
    With ``reply=True`` a method waits up to ``timeout`` seconds for the answers, and
    returns a list with one ``{node name: answer}`` a worker; without it returns None.

    :param app: whose broker.
    """

    def __init__(self, app: TaskApp) -> None:
        self._app = app

    def inspect(
        self,
        destination: Sequence[str] | None = None,
        timeout: float = 1.0,
        callback: OnReply | None = None,
    ) -> Inspect:
        """Questions to the workers."""
        return Inspect(self, destination, timeout, callback)

    def broadcast(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        destination: Sequence[str] | None = None,
        reply: bool = False,
        timeout: float = 1.0,
        limit: int | None = None,
        callback: OnReply | None = None,
        pattern: str | None = None,
        matcher: str | None = None,
    ) -> list[Replies] | None:
        """Send a command to the workers.

        :param limit: stop waiting after so many answers.
        :param callback: called with each answer as it comes.
        :param pattern: only workers whose node name matches it.
        :param matcher: how to read the pattern: ``"glob"`` or ``"pcre"``.
        :raises BrokerError: if the broker cannot broadcast, or cannot be reached.
        """
        names = [destination] if isinstance(destination, str) else destination
        with broker_connection(self._app.config, role="publish") as connection:
            if not capabilities_of(connection).fanout:
                raise no_broadcast(self._app)
            try:
                answers: list[Replies] | None = Mailbox(
                    self._app.config, self._app.clock, connection
                )._broadcast(
                    command,
                    dict(arguments or {}),
                    destination=list(names) if names else None,
                    reply=reply,
                    timeout=timeout,
                    limit=limit,
                    callback=callback,
                    pattern=pattern,
                    matcher=matcher,
                )
            except BrokerError:
                raise
            except recoverable_errors(connection) as exc:
                raise self._app.publisher.unavailable(exc) from exc
        return answers

    # -- tasks ----------------------------------------------------------------------------

    def revoke(
        self,
        task_id: str | Sequence[str],
        terminate: bool = False,
        signal: str | int = "SIGTERM",
        **options: Any,
    ) -> list[Replies] | None:
        """Have tasks not run.

        It holds for workers that start later, too, where the broker keeps it (SQL, Redis);
        elsewhere for as long as one of the workers that heard of it is there. A task that no
        worker has begun is REVOKED at once.

        :param task_id: one id or several.
        :param terminate: also end the tasks that are running; only processes can.
        :param signal: what to end them with.
        :param options: ``destination``, ``reply``, ``timeout`` and the like, as for
            :meth:`broadcast`.
        """
        ids = [task_id] if isinstance(task_id, str) else list(task_id)
        self._keep(lambda fleet: fleet.revoke(ids, clock.wall() + KEPT))
        arguments = {"task_id": task_id, "terminate": terminate, "signal": signal}
        answers = self.broadcast("revoke", arguments, **options)
        for one in ids:
            mark_revoked(self._app, one)
        return answers

    def terminate(
        self, task_id: str | Sequence[str], signal: str | int = "SIGTERM", **options: Any
    ) -> list[Replies] | None:
        """Revoke tasks, and end them if they are running."""
        return self.revoke(task_id, terminate=True, signal=signal, **options)

    def revoke_by_stamped_headers(
        self,
        headers: Mapping[str, Any],
        terminate: bool = False,
        signal: str | int = "SIGTERM",
        **options: Any,
    ) -> list[Replies] | None:
        """Revoke the tasks that carry one of some stamps, as ``{"tenant": ["acme"]}``."""
        entries = [stamp.entry for stamp in stamps_of(headers)]
        self._keep(lambda fleet: fleet.revoke(entries, clock.wall() + KEPT))
        arguments = {"headers": dict(headers), "terminate": terminate, "signal": signal}
        return self.broadcast("revoke_by_stamped_headers", arguments, **options)

    def rate_limit(
        self, task_name: str, rate_limit: str | float, **options: Any
    ) -> list[Replies] | None:
        """Change how often a task may start on each worker, as ``"10/m"``; 0 is without limit."""
        return self.broadcast(
            "rate_limit", {"task_name": task_name, "rate_limit": rate_limit}, **options
        )

    def time_limit(
        self,
        task_name: str,
        soft: float | None = None,
        hard: float | None = None,
        **options: Any,
    ) -> list[Replies] | None:
        """Change how long a task may run, in seconds."""
        return self.broadcast(
            "time_limit", {"task_name": task_name, "hard": hard, "soft": soft}, **options
        )

    # -- queues ---------------------------------------------------------------------------

    def pause_queue(self, queue: str, **options: Any) -> list[Replies] | None:
        """Let no worker take messages from a queue until :meth:`resume_queue`.

        What a worker has taken already runs. SQL and Redis keep this for workers that start
        later; elsewhere it holds for the workers that are there now.
        """
        return self._pause("pause_queue", queue, options)

    def resume_queue(self, queue: str, **options: Any) -> list[Replies] | None:
        """Undo :meth:`pause_queue`."""
        return self._pause("resume_queue", queue, options)

    def _pause(self, command: str, queue: str, options: Mapping[str, Any]) -> list[Replies] | None:
        self._keep(lambda fleet: fleet.pause(queue, command == "pause_queue"))
        return self.broadcast(command, {"queue": queue}, **options)

    def paused_queues(self) -> set[str] | None:
        """The queues that rest; None where the broker does not keep it."""
        paused: set[str] | None = self._keep(lambda fleet: fleet.paused())
        return paused

    def add_consumer(
        self,
        queue: str,
        exchange: str | None = None,
        exchange_type: str = "direct",
        routing_key: str | None = None,
        **options: Any,
    ) -> list[Replies] | None:
        """Have workers read another queue as well."""
        arguments = {
            "queue": queue,
            "exchange": exchange,
            "exchange_type": exchange_type,
            "routing_key": routing_key,
        }
        return self.broadcast("add_consumer", arguments, **options)

    def cancel_consumer(self, queue: str, **options: Any) -> list[Replies] | None:
        """Have workers read a queue no more."""
        return self.broadcast("cancel_consumer", {"queue": queue}, **options)

    # -- workers --------------------------------------------------------------------------

    def ping(
        self, destination: Sequence[str] | None = None, timeout: float = 1.0, **options: Any
    ) -> list[Replies]:
        """Which workers are there."""
        return self._ask("ping", {}, destination=destination, timeout=timeout, **options)

    def shutdown(self, destination: Sequence[str] | None = None, **options: Any) -> None:
        """Stop workers; what they run may end. They do not answer."""
        self.broadcast("shutdown", {}, destination, **options)

    def pool_grow(self, n: int = 1, **options: Any) -> list[Replies] | None:
        """Have workers run so many more tasks at once."""
        return self.broadcast("pool_grow", {"n": n}, **options)

    def pool_shrink(self, n: int = 1, **options: Any) -> list[Replies] | None:
        """Have workers run so many fewer tasks at once."""
        return self.broadcast("pool_shrink", {"n": n}, **options)

    def pool_restart(self, **options: Any) -> list[Replies] | None:
        """Have workers start their pool anew, where they can."""
        return self.broadcast("pool_restart", {}, **options)

    def autoscale(self, max: int, min: int, **options: Any) -> list[Replies] | None:
        """Change between which sizes the pools of autoscaling workers move."""
        return self.broadcast("autoscale", {"max": max, "min": min}, **options)

    def enable_events(self, **options: Any) -> list[Replies] | None:
        """Have workers send an event for each step of a task."""
        return self.broadcast("enable_events", {}, **options)

    def disable_events(self, **options: Any) -> list[Replies] | None:
        """Undo :meth:`enable_events`."""
        return self.broadcast("disable_events", {}, **options)

    def heartbeat(self, **options: Any) -> None:
        """Have workers send a sign of life to the event stream now."""
        self.broadcast("heartbeat", {}, **options)

    def _ask(self, command: str, arguments: Mapping[str, Any], **options: Any) -> list[Replies]:
        return self.broadcast(command, arguments, reply=True, **options) or []

    def _keep(self, action: Callable[[Fleet], Any]) -> Any:
        """Do something with what the broker keeps for all workers, where it does."""
        return self._app.publisher.with_fleet(action)


class Inspect:
    """Questions to the workers; each answers ``{node name: answer}``, or None for silence.

    :param destination: node names; None asks all.
    :param timeout: how long to wait for the next answer, in seconds.
    :param callback: called with each answer as it comes.
    """

    def __init__(
        self,
        control: Control,
        destination: Sequence[str] | None = None,
        timeout: float = 1.0,
        callback: OnReply | None = None,
    ) -> None:
        self._control = control
        self.destination, self.timeout, self.callback = destination, timeout, callback

    def request(self, command: str, **arguments: Any) -> Replies | None:
        """Ask by the name of a command."""
        answers = self._control._ask(
            command,
            arguments,
            destination=self.destination,
            timeout=self.timeout,
            callback=self.callback,
        )
        merged: Replies = {}
        for answer in answers:
            merged.update(answer)
        return merged or None

    def ping(self) -> Replies | None:
        """Which workers are there."""
        return self.request("ping")

    def active(self, safe: bool = False) -> Replies | None:
        """The tasks that are running; ``safe`` gives their arguments as text."""
        return self.request("active", safe=safe)

    def reserved(self) -> Replies | None:
        """The tasks that were taken and wait for a free slot."""
        return self.request("reserved")

    def scheduled(self) -> Replies | None:
        """The tasks that wait for their time in a worker."""
        return self.request("scheduled")

    def query_task(self, *ids: str) -> Replies | None:
        """Where tasks are, by id."""
        return self.request("query_task", ids=list(ids))

    def revoked(self) -> Replies | None:
        """The ids of revoked tasks."""
        return self.request("revoked")

    def registered(self, *taskinfoitems: str) -> Replies | None:
        """The names of the tasks, with some of their options."""
        return self.request("registered", taskinfoitems=list(taskinfoitems))

    def stats(self) -> Replies | None:
        """Figures about a worker: tasks done, pool, broker, resources."""
        return self.request("stats")

    def active_queues(self) -> Replies | None:
        """The queues that are read."""
        return self.request("active_queues")

    def conf(self, with_defaults: bool = False) -> Replies | None:
        """The settings, with nothing secret in them."""
        return self.request("conf", with_defaults=with_defaults)

    def report(self) -> Replies | None:
        """Versions and settings, for a bug report."""
        return self.request("report")

    def clock(self) -> Replies | None:
        """The logical clocks."""
        return self.request("clock")

    def memsample(self) -> Replies | None:
        """How much memory is in use."""
        return self.request("memsample")


def stamps_of(headers: Mapping[str, Any]) -> list[Stamp]:
    """The stamps in ``{header: value or values}``."""
    return [
        Stamp(str(header), str(value))
        for header, values in headers.items()
        for value in (values if isinstance(values, (list, tuple, set)) else [values])
    ]


def mark_revoked(app: TaskApp, task_id: str) -> None:
    """Store REVOKED for a task that has not begun, so that nobody waits for it."""
    backend = app.backend
    if not backend.enabled:
        return
    try:
        known = backend.fetch(task_id)
        if known is not None and known.status not in _NOT_BEGUN:
            return
        error = TaskRevokedError("revoked")
        backend.store(TaskRecord(task_id, states.REVOKED, encode_exception(error)).done_now())
    except Exception as exc:  # the worker that meets the task stores it again
        log.warning("REVOKED of task %s is not stored yet: %s", task_id, exc)
