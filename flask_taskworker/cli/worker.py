"""``taskworker worker``: run tasks."""

from __future__ import annotations

import importlib
import inspect
import os
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click
from flask.cli import ScriptInfo

from .. import __version__
from ..config import mask_url
from ..exceptions import ConfigurationError, TaskWorkerError
from .root import (
    be_quiet,
    is_quiet,
    load_task_app,
    may_color,
    note,
    overrides,
    taskworker,
    without_effect,
)

if TYPE_CHECKING:
    from ..app import TaskApp
    from ..worker.logs import Log
    from ..worker.pools.source import AppSource
    from ..worker.reload import SourceWatch
    from ..worker.supervisor import Worker

F = TypeVar("F", bound=Callable[..., Any])

LEVELS = ("debug", "info", "warning", "error", "critical", "fatal")
#: Pools by the names that Celery gives them.
POOLS = {
    "threads": "threads",
    "solo": "solo",
    "prefork": "processes",
    "processes": "processes",
    "gevent": "threads",
    "eventlet": "threads",
}

#: Options of Celery's worker that change nothing here, whether they take a value, and why.
NO_EFFECT = (
    (("-S", "--statedb"), True, "what was revoked is kept elsewhere"),
    (("-O", "--optimization"), True, "a task always goes to a free slot"),
    (("--prefetch-multiplier",), True, "no more is fetched than can run"),
    (("--disable-prefetch",), False, "no more is fetched than can run"),
    (("--pool-start-method",), True, "the pool chooses the safe one"),
    (("--without-gossip",), False, "workers do not gossip"),
    (("--without-mingle",), False, "workers do not mingle"),
    (("--without-heartbeat",), False, "heartbeats are part of the events, -E"),
    (("--heartbeat-interval",), True, "heartbeats are part of the events, -E"),
    (("--executable",), True, "-D starts the same Python"),
    (("-B", "--beat"), False, "there is no scheduler yet: nothing periodic is sent"),
    (("-s", "--schedule", "--schedule-filename"), True, "there is no scheduler yet"),
    (("--scheduler",), True, "there is no scheduler yet"),
)


def _concurrency(ctx: click.Context, param: click.Parameter, value: str | None) -> int | str | None:
    """A number of 1 or more, or ``auto``."""
    if value is None or value == "auto":
        return value
    if not value.isdigit() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither a number of 1 or more nor 'auto'")
    return int(value)


def _autoscale(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, int] | None:
    """Two numbers with a comma between, in either order; as (most, least)."""
    if value is None:
        return None
    parts = value.split(",")
    if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
        raise click.BadParameter(f"{value!r} is not MOST,LEAST such as 10,3")
    numbers = sorted((int(part) for part in parts), reverse=True)
    return numbers[0], numbers[1] if len(numbers) > 1 else 0


def _log_format(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if value == "json":  # a banner or a note would be a line that is no JSON
        be_quiet(ctx)
    return value


def _no_effect(command: F) -> F:
    def take(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value:
            without_effect(ctx, param.opts[-1])

    for names, takes_value, why in reversed(NO_EFFECT):
        more: dict[str, Any] = {"metavar": "VALUE"} if takes_value else {"is_flag": True}
        command = click.option(
            *names, expose_value=False, callback=take, help=f"Celery's; no effect: {why}.", **more
        )(command)
    return command


@taskworker.command()
@click.option(
    "-l",
    "--loglevel",
    type=click.Choice(LEVELS, case_sensitive=False),
    default="info",
    show_default=True,
    help="What to log.",
)
@click.option(
    "-c",
    "--concurrency",
    callback=_concurrency,
    metavar="NUMBER|auto",
    help="How many tasks run at once; auto: as many as this process may use processors. "
    "Default: TASKER_CONCURRENCY.",
)
@click.option(
    "-P",
    "--pool",
    type=click.Choice([*POOLS, "custom"]),
    help="Where tasks run. prefork is processes; gevent and eventlet are threads here.",
)
@click.option(
    "-n",
    "--hostname",
    metavar="NAME",
    help="Node name; %h is the host, %n its first part, %d its domain. Default: worker@%h",
)
@click.option(
    "-Q",
    "--queues",
    metavar="NAMES",
    help="The queues to read, with commas between. Default: the default queue and "
    "those that tasks name.",
)
@click.option("-X", "--exclude-queues", metavar="NAMES", help="Queues not to read.")
@click.option(
    "-I", "--include", metavar="MODULES", help="Modules to import first, with commas between."
)
@click.option(
    "--purge",
    "--discard",
    "purge",
    is_flag=True,
    help="Delete what waits in the queues first. There is no way back.",
)
@click.option("--burst", is_flag=True, help="End when the queues are empty.")
@click.option(
    "--reload",
    "reloads",
    is_flag=True,
    help="Start anew when a source file changes, for development.",
)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How long running tasks may take when the worker is stopped. "
    "Default: TASKER_DRAIN_TIMEOUT.",
)
@click.option(
    "-E",
    "--task-events",
    "--events",
    "task_events",
    is_flag=True,
    help="Send events, for monitors.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Longest run of a task; then its process is killed.",
)
@click.option(
    "--soft-time-limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Longest run of a task; then SoftTimeLimitExceeded is raised in it.",
)
@click.option(
    "--max-tasks-per-child",
    type=click.IntRange(min=1),
    metavar="NUMBER",
    help="Replace a process after so many tasks.",
)
@click.option(
    "--max-memory-per-child",
    type=click.IntRange(min=1),
    metavar="KIB",
    help="Replace a process that has grown to so many KiB.",
)
@click.option(
    "--autoscale",
    callback=_autoscale,
    metavar="MOST,LEAST",
    help="Grow and shrink the pool between these sizes.",
)
@click.option(
    "-f",
    "--logfile",
    metavar="PATTERN",
    help="Log to a file; %n is the node's name, %h its host, %p both. Default: stderr",
)
@click.option(
    "--log-format",
    callback=_log_format,
    is_eager=True,
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Lines for people, or one JSON object a line.",
)
@click.option(
    "--pidfile",
    metavar="PATTERN",
    help="Write the process id to this file; two workers cannot share one.",
)
@click.option("-D", "--detach", is_flag=True, help="Run in the background.")
@click.option("--uid", metavar="USER", help="Become this user, a name or a number.")
@click.option("--gid", metavar="GROUP", help="Become this group, a name or a number.")
@click.option("--umask", metavar="OCTAL", help="The umask, such as 022.")
@_no_effect
@click.pass_context
def worker(
    ctx: click.Context,
    /,
    uid: str | None,
    gid: str | None,
    umask: str | None,
    reloads: bool,
    detach: bool,
    **options: Any,
) -> None:
    """Run tasks until SIGINT or SIGTERM. The second signal stops at once."""
    from ..worker import daemon

    if umask:
        daemon.set_umask(umask)
    if uid or gid:
        daemon.become(uid, gid)

    def load() -> TaskApp:
        task_app = load_task_app(ctx, **_settings(options))
        for module in _names(options["include"]) or []:
            importlib.import_module(module)
        return task_app

    if detach and not daemon.is_detached():
        _detach(ctx, load(), options)
    elif reloads:
        _run_and_reload(ctx, load, options)
    else:
        _run(ctx, load(), options)


def _settings(options: dict[str, Any]) -> dict[str, object]:
    """The settings that options of this command stand for."""
    return {"TASKER_DRAIN_TIMEOUT": options["drain_timeout"]}


def _detach(ctx: click.Context, task_app: TaskApp, options: dict[str, Any]) -> None:
    """Start the same command in the background, once it is known to be all right."""
    from ..pidfile import holder
    from ..worker import daemon
    from ..worker.nodes import file_name, node_name

    node = node_name(options["hostname"])
    _worker_options(task_app, options)
    log_file = options["logfile"] and file_name(options["logfile"], node)
    running = options["pidfile"] and holder(file_name(options["pidfile"], node))
    if running:
        raise ConfigurationError(f"{node} runs already, process {running}")
    if log_file is None:
        note(ctx, "-D without --logfile: what the worker says goes nowhere")
    process = daemon.launch(daemon.own_command(), log_file)
    process.returncode = 0  # it is on its own from here; nobody waits for it
    note(ctx, f"{node} starts in the background, process {process.pid}")


def _run_and_reload(
    ctx: click.Context, load: Callable[[], TaskApp], options: dict[str, Any]
) -> None:
    """Run, and start this program anew each time one of its files has changed."""
    from ..worker.os_signals import start_anew
    from ..worker.reload import SourceWatch

    watch = SourceWatch()
    try:
        task_app = load()
    except Exception as exc:  # the program is being written: its next version may be better
        watch.also(exc)
        expected = isinstance(exc, TaskWorkerError)
        click.echo(f"Error: {exc}" if expected else traceback.format_exc(), err=True)
        click.echo("Waiting for a change.", err=True)
        watch.wait()
        start_anew()
        return
    watch.changed()  # from here on, the program's own files are known
    _run(ctx, task_app, options, watch)


def _run(
    ctx: click.Context,
    task_app: TaskApp,
    options: dict[str, Any],
    watch: SourceWatch | None = None,
) -> None:
    from ..pidfile import PidFile
    from ..queues import purge
    from ..worker.nodes import file_name, node_name
    from ..worker.program import serve
    from ..worker.supervisor import Worker

    node = node_name(options["hostname"])
    chosen = _worker_options(task_app, options)
    _log(ctx, options, node).start()
    pid_file = PidFile(file_name(options["pidfile"], node)) if options["pidfile"] else None
    if pid_file is not None:
        pid_file.acquire()
    try:
        if options["purge"]:
            count = sum(purge(task_app, chosen["queues"]).values())
            note(ctx, f"{count} messages were deleted")
        process = Worker(
            task_app,
            hostname=options["hostname"],
            burst=options["burst"],
            source=_source(ctx, options, node),
            **chosen,
        )
        if not is_quiet(ctx):
            click.echo(banner(process), err=True)
        serve(process, pid_file, watch)
    finally:
        if pid_file is not None:
            pid_file.release()


def _source(ctx: click.Context, options: dict[str, Any], node: str) -> AppSource:
    """How a child process of this worker loads the same app, and logs to the same place."""
    from ..worker.pools.source import AppSource

    target, path = ctx.meta.get("flask_taskworker.target"), None
    info = ctx.find_object(ScriptInfo)
    if target is None and info is not None and info.create_app is not None:
        make = info.create_app
        target = f"{make.__module__}:{getattr(make, '__qualname__', make)}"
    elif target is None:
        path = info.app_import_path if info is not None else os.environ.get("FLASK_APP")
    return AppSource(
        f"{__name__}:load_in_child",
        target,
        {
            "path": path,
            "settings": overrides(ctx, **_settings(options)),
            "include": _names(options["include"]) or [],
            "log": asdict(_log(ctx, options, node)),
        },
    )


def load_in_child(
    target: str | None,
    path: str | None,
    settings: dict[str, Any],
    include: list[str],
    log: dict[str, Any],
) -> TaskApp:
    """Load the app as the worker has done it; see :class:`.worker.pools.source.AppSource`.

    :param path: as ``flask --app`` has it, where no target was given.
    :param settings: those that the command line changes.
    :param include: modules to import after the app.
    :param log: the fields of a :class:`~flask_taskworker.worker.logs.Log`.
    """
    from ..extension import override
    from ..target import from_flask_cli, from_target
    from ..worker.logs import Log

    Log(**log).start()
    if target is not None:
        task_app = from_target(target)
    else:
        task_app = from_flask_cli(ScriptInfo(app_import_path=path))
    override(task_app, settings)
    for module in include:
        importlib.import_module(module)
    return task_app


def _log(ctx: click.Context, options: dict[str, Any], node: str) -> Log:
    from ..worker.logs import Log
    from ..worker.nodes import file_name

    level = options["loglevel"].lower()
    return Log(
        "critical" if level == "fatal" else level,
        options["log_format"],
        options["logfile"] and file_name(options["logfile"], node),
        may_color(ctx),
    )


#: Options that are handed to the worker as they are.
_PASSED = (
    "concurrency", "time_limit", "soft_time_limit", "max_tasks_per_child",
    "max_memory_per_child", "autoscale",
)  # fmt: skip


def _worker_options(task_app: TaskApp, options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the worker that were chosen.

    :raises ConfigurationError: for what it cannot do.
    """
    from ..worker import supervisor
    from ..worker.program import usable_cpus

    chosen: dict[str, Any] = {name: options[name] for name in _PASSED if options[name] is not None}
    if chosen.get("concurrency") == "auto":
        chosen["concurrency"] = usable_cpus()
    if options["task_events"]:
        chosen["task_events"] = True
    if options["pool"] is not None:
        chosen["pool"] = POOLS.get(options["pool"], options["pool"])
    possible = inspect.signature(supervisor.Worker).parameters
    for name in chosen:
        if name not in possible:
            option = name.replace("_", "-")
            raise ConfigurationError(f"this worker has no --{option} yet; leave it out")
    if chosen.get("pool", "threads") not in supervisor.POOLS:
        raise ConfigurationError(
            f"this worker has no pool {options['pool']!r}; there is {', '.join(supervisor.POOLS)}"
        )
    chosen["queues"] = _queues(task_app, options)
    return chosen


def _queues(task_app: TaskApp, options: dict[str, Any]) -> list[str]:
    from ..queues import known_queues

    queues = _names(options["queues"])
    if queues == []:
        raise ConfigurationError("-Q names no queue; write for example -Q default,mail")
    excluded = set(_names(options["exclude_queues"]) or ())
    left = [name for name in queues or known_queues(task_app) if name not in excluded]
    if not left:
        raise ConfigurationError("-X leaves no queue to read")
    return left


def _names(text: str | None) -> list[str] | None:
    """What stands between the commas; None if the option was not given."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def banner(process: Worker) -> str:
    """What a worker says of itself at its start."""
    config = process.app.config
    rows = {
        "node": process.hostname,
        "broker": mask_url(config.broker_url),
        "results": mask_url(config.result_backend) if config.result_backend else "off",
        "pool": f"{process.pool_name}, {process.pool.size} at once",
        "queues": ", ".join(process.queues),
        "tasks": _task_names(sorted(process.app.registry)),
    }
    lines = [f"Flask-TaskWorker {__version__}"]
    lines += [f"  {name:<8} {value}" for name, value in rows.items()]
    return "\n".join([*lines, "  Ctrl-C to stop"])


def _task_names(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none: is the module with the tasks imported by the app?"
    return f"{len(names)} ({shown}{', ...' if len(names) > 8 else ''})"
