"""``taskworker worker``: run tasks."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import click

from .. import __version__
from ..config import mask_url
from ..exceptions import ConfigurationError
from .root import load_task_app, taskworker

if TYPE_CHECKING:
    from ..worker.supervisor import Worker

LEVELS = ("debug", "info", "warning", "error", "critical")


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
    type=click.IntRange(min=1),
    help="How many tasks run at once. Default: TASKER_CONCURRENCY.",
)
@click.option(
    "-Q",
    "--queues",
    metavar="NAMES",
    help="The queues to read, with commas between. Default: the default queue and those that "
    "tasks name.",
)
@click.option(
    "-n", "--hostname", metavar="NAME", help="Node name; %h is the host. Default: worker@%h"
)
@click.option(
    "-P",
    "--pool",
    type=click.Choice(("threads", "solo")),
    default="threads",
    show_default=True,
    help="Where tasks run.",
)
@click.option("--burst", is_flag=True, help="End when the queues are empty.")
@click.option("-q", "--quiet", is_flag=True, help="No banner at the start.")
@click.pass_context
def worker(
    ctx: click.Context,
    loglevel: str,
    concurrency: int | None,
    queues: str | None,
    hostname: str | None,
    pool: str,
    burst: bool,
    quiet: bool,
) -> None:
    """Run tasks until SIGINT or SIGTERM. The second signal stops at once."""
    from ..worker.supervisor import POOLS, Worker, os_signals

    task_app = load_task_app(ctx)
    _log_to_stderr(loglevel)
    process = Worker(
        task_app,
        queues=_names(queues),
        concurrency=concurrency,
        pool=next(name for name in POOLS if name == pool),
        hostname=hostname,
        burst=burst,
    )
    if not quiet:
        click.echo(banner(process), err=True)
    with os_signals(process):
        process.run()


def _names(queues: str | None) -> list[str] | None:
    if queues is None:
        return None
    names = [name.strip() for name in queues.split(",") if name.strip()]
    if not names:
        raise ConfigurationError("-Q names no queue; write for example -Q default,mail")
    return names


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


def _log_to_stderr(level: str) -> None:
    """Log our own messages; the root logger and the app's handlers stay as they are."""
    logger = logging.getLogger("flask_taskworker")
    logger.setLevel(level.upper())
    if not any(getattr(handler, "_taskworker_cli", False) for handler in logger.handlers):
        handler = logging.StreamHandler()
        handler._taskworker_cli = True  # type: ignore[attr-defined]
        handler.setFormatter(
            logging.Formatter("[%(asctime)s: %(levelname)s/%(threadName)s] %(message)s")
        )
        logger.addHandler(handler)
        logger.propagate = False
