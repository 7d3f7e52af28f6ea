"""The commands of remote control that change something, by name.

Each gets the :class:`~.state.WorkerState` and the arguments of the sender. What it returns is
answered; an exception is answered as ``{"error": repr}``. The names, the arguments and the
texts are Celery's: its command line and its monitors show them, and some read them.
"""

from __future__ import annotations

import logging
import signal as signals
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import kombu

from .. import clock
from ..control import KEPT, mark_revoked, stamps_of
from ..publisher import task_queue
from .revoked import stamps_on

if TYPE_CHECKING:
    from .delivery import Delivery
    from .state import WorkerState

log = logging.getLogger("flask_taskworker.worker")

Handler = Callable[..., Any]
Argument = tuple[str, Callable[[str], Any]]


class Command(NamedTuple):
    """A command.

    :param kind: ``"inspect"`` or ``"control"``: with which verb it is sent.
    :param args: what the words of a command line are, in their order.
    :param variadic: the argument that takes all further words.
    :param signature: the arguments as help shows them.
    :param visible: whether help lists it.
    """

    handler: Handler
    kind: str
    args: Sequence[Argument] = ()
    variadic: str | None = None
    signature: str = ""
    visible: bool = True

    @property
    def help(self) -> str:
        return (self.handler.__doc__ or "").strip().partition("\n")[0]


#: All commands, by name.
COMMANDS: dict[str, Command] = {}


def command(
    kind: str, *aliases: str, name: str | None = None, **more: Any
) -> Callable[[Handler], Handler]:
    """Register a function as the command of its name, and under older names."""

    def register(handler: Handler) -> Handler:
        COMMANDS[name or handler.__name__] = Command(handler, kind, **more)
        for alias in aliases:
            COMMANDS[alias] = Command(handler, kind, **{**more, "visible": False})
        return handler

    return register


def ok(text: str) -> dict[str, str]:
    return {"ok": text}


def refused(text: str) -> dict[str, str]:
    return {"error": text}


# -- tasks --------------------------------------------------------------------------------


@command("control", variadic="task_id", signature="[id1 [id2 [... [idN]]]]")
def revoke(
    state: WorkerState,
    task_id: str | Sequence[str],
    terminate: bool = False,
    signal: str | int | None = None,
    **kwargs: Any,
) -> Any:
    """Revoke task by task id (or list of ids)."""
    ids = _ids(task_id)
    until = clock.wall() + KEPT
    state.revoked.add(ids, until)
    state.keep(lambda fleet: fleet.revoke(ids, until))
    log.info("revoked: %s", ", ".join(ids))
    here = state.find(ids)
    running = [delivery for word, delivery in here.values() if word == "active"]
    state.worker.consumer.request(state.worker.consumer.refuse_again)
    for one in ids:
        if one not in here:  # what is here tells its own end
            mark_revoked(state.app, one)
    if not terminate:
        return ok(f"tasks {set(ids)} flagged as revoked")
    if not here:
        return ok("terminate: tasks unknown")
    _terminate(state, running, signal)
    return ok(f"terminate: {', '.join(here)}")


@command(
    "control",
    args=[("signal", str)],
    variadic="task_id",
    signature="<signal> [id1 [id2 [... [idN]]]]",
)
def terminate(
    state: WorkerState, signal: str | int, task_id: str | Sequence[str], **kwargs: Any
) -> Any:
    """Terminate task by task id (or list of ids)."""
    return revoke(state, task_id, terminate=True, signal=signal)


@command(
    "control",
    variadic="headers",
    signature="[key1=value1 [key2=value2 [... [keyN=valueN]]]]",
)
def revoke_by_stamped_headers(
    state: WorkerState,
    headers: Any,
    terminate: bool = False,
    signal: str | int | None = None,
    **kwargs: Any,
) -> Any:
    """Revoke task by header (or list of headers)."""
    if isinstance(headers, list):
        headers = dict(header.split("=", 1) for header in headers)
    stamps, until = stamps_of(headers), clock.wall() + KEPT
    state.revoked.add_stamps(stamps, until)
    state.keep(lambda fleet: fleet.revoke([stamp.entry for stamp in stamps], until))
    state.worker.consumer.request(state.worker.consumer.refuse_again)
    if not terminate:
        return ok(f"headers {headers} flagged as revoked, but not terminated")
    running: list[Delivery] = []
    found: dict[str, set[str]] = {}
    for delivery in state.active():
        for stamp in set(stamps_on(delivery.message)).intersection(stamps):
            running.append(delivery)
            found.setdefault(stamp.header, set()).add(stamp.value)
    _terminate(state, running, signal)
    return ok(f"headers {found or headers} {'revoked' if found else 'were not terminated'}")


def _ids(task_id: Any) -> list[str]:
    ids = [task_id] if isinstance(task_id, str) else list(task_id or ())
    if not all(isinstance(one, str) for one in ids):
        raise TypeError(f"task ids are texts, not {task_id!r}")
    return list(dict.fromkeys(ids))


def _terminate(state: WorkerState, running: Iterable[Delivery], signal: str | int | None) -> None:
    number, pool = _signal_number(signal), state.worker.pool
    for task_id in [delivery.message.id for delivery in running]:
        if not pool.can_terminate:
            raise NotImplementedError(
                f"task {task_id} goes on: the {state.worker.pool_name} pool cannot end a running "
                "task; use -P processes"
            )
        done = state.ask_consumer(lambda id=task_id: pool.terminate(id, number))  # type: ignore[misc]
        if done is False:
            log.info("task %s ended by itself before signal %d", task_id, number)
        else:
            log.warning("task %s gets signal %d", task_id, number)


def _signal_number(signal: str | int | None) -> int:
    if signal is None:
        return int(signals.SIGTERM)
    if isinstance(signal, int):
        return int(signals.Signals(signal))
    name = signal.upper()
    return int(signals.Signals[name if name.startswith("SIG") else f"SIG{name}"])


@command(
    "control",
    args=[("task_name", str), ("rate_limit", str)],
    signature="<task_name> <rate_limit (e.g., 5/s | 5/m | 5/h)>",
)
def rate_limit(state: WorkerState, task_name: str, rate_limit: Any, **kwargs: Any) -> Any:
    """Tell worker(s) to modify the rate limit for a task by type."""
    try:
        _rate(rate_limit)
    except ValueError as exc:
        return refused(f"Invalid rate limit string: {exc!r}")
    if state.app.registry.get(task_name) is None:
        return refused("unknown task")
    rates = state.worker.rates
    state.ask_consumer(lambda: rates.set(task_name, rate_limit or None))
    state.rate_limits[task_name] = rate_limit or None
    log.info("new rate limit of task %s: %s", task_name, rate_limit or "none")
    if not rate_limit:
        return ok("rate limit disabled successfully")
    return ok("new rate limit set successfully")


def _rate(value: Any) -> float:
    """Runs a second in ``"10/m"``; for its errors, which are answered."""
    if not isinstance(value, str):
        return float(value or 0)
    count, _, unit = value.partition("/")
    seconds = {"s": 1, "m": 60, "h": 3600}[unit or "s"]  # first: its KeyError is Celery's
    return float(count) / seconds


@command(
    "control",
    args=[("task_name", str), ("soft", float), ("hard", float)],
    signature="<task_name> <soft_secs> [hard_secs]",
)
def time_limit(
    state: WorkerState,
    task_name: str | None = None,
    hard: float | None = None,
    soft: float | None = None,
    **kwargs: Any,
) -> Any:
    """Tell worker(s) to modify the time limit for task by type."""
    task = state.app.registry.get(task_name or "")
    if task is None:
        return refused("unknown task")
    if hard and not (state.worker.pool.can_terminate or task.is_async):
        raise NotImplementedError(
            f"the {state.worker.pool_name} pool cannot end a running task, so that no hard time "
            "limit holds; set a soft one alone, or use -P processes"
        )
    state.ask_consumer(lambda: state.worker.limits.set(task.name, hard, soft))
    log.info("new time limits of task %s: soft=%s hard=%s", task_name, soft, hard)
    return ok("time limits set successfully")


# -- queues -------------------------------------------------------------------------------


@command(
    "control",
    args=[("queue", str), ("exchange", str), ("exchange_type", str), ("routing_key", str)],
    signature="<queue> [exchange [type [routing_key]]]",
)
def add_consumer(
    state: WorkerState,
    queue: str,
    exchange: str | None = None,
    exchange_type: str | None = None,
    routing_key: str | None = None,
    **kwargs: Any,
) -> Any:
    """Tell worker(s) to consume from task queue by name."""
    entity = task_queue(queue)
    if exchange:
        source = kombu.Exchange(exchange, type=exchange_type or "direct", durable=True)
        entity = kombu.Queue(queue, source, routing_key=routing_key or queue, durable=True)
    elif routing_key:
        entity.routing_key = routing_key
    state.worker.consumer.request(lambda: state.worker.consumer.subscriptions.add(entity))
    return ok(f"add consumer {queue}")


@command("control", args=[("queue", str)], signature="<queue>")
def cancel_consumer(state: WorkerState, queue: str, **kwargs: Any) -> Any:
    """Tell worker(s) to stop consuming from task queue by name."""
    state.worker.consumer.request(lambda: state.worker.consumer.subscriptions.cancel(queue))
    return ok(f"no longer consuming from {queue}")


@command("control", args=[("queue", str)], signature="<queue>")
def pause_queue(state: WorkerState, queue: str, **kwargs: Any) -> Any:
    """Let a queue rest: no worker takes messages from it."""
    state.keep(lambda fleet: fleet.pause(queue, True))
    if state.fleet is None or not state.fleet.pauses_by_itself:
        state.worker.consumer.request(lambda: state.worker.consumer.subscriptions.rest(queue))
    log.warning("queue %s is paused", queue)
    return ok(f"queue {queue} paused")


@command("control", args=[("queue", str)], signature="<queue>")
def resume_queue(state: WorkerState, queue: str, **kwargs: Any) -> Any:
    """Take messages from a paused queue again."""
    state.keep(lambda fleet: fleet.pause(queue, False))
    state.worker.consumer.request(lambda: state.worker.consumer.subscriptions.resume(queue))
    log.warning("queue %s is resumed", queue)
    return ok(f"queue {queue} resumed")


# -- pool ---------------------------------------------------------------------------------


@command("control", args=[("n", int)], signature="[N=1]")
def pool_grow(state: WorkerState, n: int = 1, **kwargs: Any) -> Any:
    """Grow pool by n processes/threads."""
    return _resize(state, "grow", n)


@command("control", args=[("n", int)], signature="[N=1]")
def pool_shrink(state: WorkerState, n: int = 1, **kwargs: Any) -> Any:
    """Shrink pool by n processes/threads."""
    return _resize(state, "shrink", n)


def _resize(state: WorkerState, verb: str, n: int) -> Any:
    if state.worker.autoscaler is not None:
        return refused(
            f"pool_{verb} is not supported with autoscale. Adjust autoscale range instead."
        )
    if not 0 <= n <= 10_000:
        raise ValueError(f"a number of 0 to 10000 is needed, not {n!r}")
    state.ask_consumer(lambda: getattr(state.worker.pool, verb)(n))
    return ok(f"pool will {verb}")


@command("control")
def pool_restart(state: WorkerState, **kwargs: Any) -> Any:
    """Restart execution pool."""
    restart = getattr(state.worker.pool, "restart", None)
    if restart is None:
        raise ValueError("Pool restarts not enabled")
    state.ask_consumer(restart)
    return ok("reload started")


@command("control", args=[("max", int), ("min", int)], signature="[max [min]]")
def autoscale(state: WorkerState, max: int | None = None, min: int | None = None) -> Any:
    """Modify autoscale settings."""
    autoscaler = state.worker.autoscaler
    if autoscaler is None:
        raise ValueError("Autoscale not enabled")
    largest, smallest = autoscaler.update(max, min)
    state.ask_consumer(lambda: None)  # at its next turn it holds
    return ok(f"autoscale now max={largest} min={smallest}")


@command("control")
def shutdown(state: WorkerState, msg: str = "Got shutdown from remote", **kwargs: Any) -> Any:
    """Shutdown worker(s)."""
    log.warning("%s", msg)
    state.worker.stop()
    raise SystemExit  # Celery's own do not answer


# -- events -------------------------------------------------------------------------------


@command("control")
def enable_events(state: WorkerState) -> Any:
    """Tell worker(s) to send task-related events."""
    if state.events.tasks:
        return ok("task events already enabled")
    state.events.tasks = True
    log.info("task events are enabled by remote control")
    return ok("task events enabled")


@command("control")
def disable_events(state: WorkerState) -> Any:
    """Tell worker(s) to stop sending task-related events."""
    # What -E has switched on, Celery's workers do not switch off either.
    if state.events.always or not state.events.tasks:
        return ok("task events already disabled")
    state.events.tasks = False
    log.info("task events are disabled by remote control")
    return ok("task events disabled")


@command("control")
def heartbeat(state: WorkerState, **kwargs: Any) -> None:
    """Tell worker(s) to send event heartbeat immediately."""
    state.events.send_heartbeat_on_request(state.channel)


@command("control")
def election(state: WorkerState, **kwargs: Any) -> None:
    """Hold election."""
    # Celery's workers elect among those that gossip; this one does not stand.
