"""The commands of remote control that only look, by name. See :mod:`.commands`."""

from __future__ import annotations

import json
import platform
import resource
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import kombu

from .. import clock
from ..config import SETTINGS
from ..control import KEPT
from ..texts import safe_repr
from .commands import COMMANDS, command, ok
from .state import version

if TYPE_CHECKING:
    from ..task import Task
    from .state import WorkerState

__all__ = ["COMMANDS"]

_TASK_ITEMS = ("exchange", "routing_key", "rate_limit")
#: The samples of memory that are remembered.
_SAMPLES = 100


@command("inspect")
def ping(state: WorkerState, **kwargs: Any) -> Any:
    """Ping worker(s)."""
    return ok("pong")


@command("inspect", "dump_active")
def active(state: WorkerState, safe: bool = False, **kwargs: Any) -> Any:
    """List of tasks currently being executed."""
    return _sendable([state.info(delivery, safe) for delivery in state.active()])


@command("inspect", "dump_reserved")
def reserved(state: WorkerState, **kwargs: Any) -> Any:
    """List of currently reserved tasks, not including scheduled/active."""
    return _sendable([state.info(delivery) for delivery in state.reserved()])


@command("inspect", "dump_schedule")
def scheduled(state: WorkerState, **kwargs: Any) -> Any:
    """List of currently scheduled ETA/countdown tasks."""
    return _sendable(
        [
            {
                "eta": delivery.message.eta and delivery.message.eta.isoformat(),
                "priority": 6,
                "request": state.info(delivery),
            }
            for delivery in state.scheduled()
        ]
    )


@command("inspect", variadic="ids", signature="[id1 [id2 [... [idN]]]]")
def query_task(state: WorkerState, ids: str | Sequence[str], **kwargs: Any) -> Any:
    """Query for task information by id."""
    found = state.find([ids] if isinstance(ids, str) else ids)
    return _sendable(
        {task_id: [word, state.info(delivery)] for task_id, (word, delivery) in found.items()}
    )


def _sendable(answer: Any) -> Any:
    """The answer, with arguments that cannot be sent as text."""
    try:
        json.dumps(answer)
    except (TypeError, ValueError, RecursionError):
        return json.loads(json.dumps(answer, default=safe_repr, skipkeys=True))
    return answer


@command("inspect", "dump_revoked")
def revoked(state: WorkerState, **kwargs: Any) -> Any:
    """List of revoked task-ids."""
    return state.revoked.ids()


@command(
    "inspect", "dump_tasks", variadic="taskinfoitems", signature="[attr1 [attr2 [... [attrN]]]]"
)
def registered(
    state: WorkerState,
    taskinfoitems: Sequence[str] | None = None,
    builtins: bool = False,
    **kwargs: Any,
) -> Any:
    """List of registered tasks."""
    items = [str(item) for item in taskinfoitems or _TASK_ITEMS]
    names = sorted(
        name for name in state.app.registry if builtins or not name.startswith("celery.")
    )
    return [_described(state, state.app.registry[name], items) for name in names]


def _described(state: WorkerState, task: Task[..., Any], items: Sequence[str]) -> str:
    options: dict[str, Any] = {
        "max_retries": state.app.config.max_retries,
        **task.options_,
        "routing_key": task.options_.get("queue"),
    }
    if task.name in state.rate_limits:
        options["rate_limit"] = state.rate_limits[task.name]
    known = [f"{item}={options[item]}" for item in items if options.get(item) is not None]
    return f"{task.name} [{' '.join(known)}]" if known else task.name


@command("inspect")
def stats(state: WorkerState, **kwargs: Any) -> Any:
    """Request worker statistics/information."""
    return state.stats()


@command("inspect")
def active_queues(state: WorkerState, **kwargs: Any) -> Any:
    """List the task queues a worker is currently consuming from."""
    reading = state.worker.consumer.subscriptions
    return [
        reading.entity(name).as_dict(recurse=True)
        for name in list(reading.queues)
        if name not in reading.resting
    ]


def _truth(text: str) -> bool:
    return text.strip().lower() in ("1", "true", "yes", "y", "on", "t")


@command(
    "inspect", "dump_conf", args=[("with_defaults", _truth)], signature="[include_defaults=False]"
)
def conf(state: WorkerState, with_defaults: bool = False, **kwargs: Any) -> Any:
    """List configuration."""
    return settings(state, with_defaults)


def settings(state: WorkerState, with_defaults: bool) -> dict[str, Any]:
    """The settings under Celery's names where it has one, with nothing secret in them."""
    config, shown = state.app.config, {}
    masked = config.masked()
    for setting in SETTINGS:
        changed = getattr(config, setting.field) != setting.value
        if with_defaults or changed or setting.field in ("broker_url", "result_backend"):
            name = setting.celery[0] if setting.celery else setting.key
            shown[name] = _plain(masked[setting.field])
    return shown


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset, tuple)):
        return sorted(value, key=str)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return safe_repr(dict(value)) if hasattr(value, "keys") else safe_repr(value)


@command("inspect")
def report(state: WorkerState, **kwargs: Any) -> Any:
    """Information about Flask-TaskWorker installation for bug reports."""
    shown = settings(state, with_defaults=False)
    python = ".".join(map(str, sys.version_info[:3]))
    lines = [
        "",
        f"software -> flask-taskworker:{version()} kombu:{kombu.__version__} py:{python}",
        f"platform -> system:{platform.system()} arch:{platform.machine()}",
        f"            kernel version:{platform.release()} imp:{platform.python_implementation()}",
        f"settings -> transport:{state.app.config.engine} results:{shown['result_backend']}",
        "",
        *(f"{name}: {value!r}" for name, value in shown.items()),
        "",
    ]
    return ok("\n".join(lines))


@command("inspect", name="clock")
def current_clock(state: WorkerState, **kwargs: Any) -> Any:
    """Get current logical clock value."""
    return {"clock": state.app.clock.value}


@command("inspect", visible=False)
def hello(state: WorkerState, from_node: str, revoked: Any = None, **kwargs: Any) -> Any:
    """Request mingle sync-data."""
    if from_node == state.hostname:
        return None
    state.revoked.add([one for one in revoked or () if isinstance(one, str)], clock.wall() + KEPT)
    return {"revoked": state.revoked.ids(), "clock": state.app.clock.forward()}


@command("inspect")
def memsample(state: WorkerState, **kwargs: Any) -> Any:
    """Sample current RSS memory usage."""
    size = _memory()
    state.samples.append(size)
    del state.samples[:-_SAMPLES]
    return size


@command("inspect", args=[("samples", int)], signature="[n_samples=10]")
def memdump(state: WorkerState, samples: int = 10, **kwargs: Any) -> Any:
    """Dump statistics of previous memsample requests."""
    lines = [f"- rss (sample {i}): {size}" for i, size in enumerate(state.samples[-samples:])]
    return "\n".join([*lines, f"- rss (end): {_memory()}.", ""])


def _memory() -> str:
    try:
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):  # the most it ever was, where it cannot be had
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"{size / 1024 / 1024:.3f}".rstrip("0").rstrip(".") + "MB"


@command(
    "inspect",
    args=[("type", str), ("num", int), ("max_depth", int)],
    signature="[object_type=Request] [num=200 [max_depth=10]]",
)
def objgraph(
    state: WorkerState, num: int = 200, max_depth: int = 10, type: str = "Request", **kwargs: Any
) -> Any:
    """Create graph of uncollected objects (memory-leak debugging)."""
    try:
        import objgraph as graphs  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise ImportError("Requires the objgraph library") from None
    import tempfile

    objects = graphs.by_type(type)[:num]
    with tempfile.NamedTemporaryFile(prefix="taskworker-", suffix=".png", delete=False) as file:
        graphs.show_backrefs(
            objects, max_depth=max_depth, highlight=lambda one: one in objects, filename=file.name
        )
    return {"filename": file.name}
