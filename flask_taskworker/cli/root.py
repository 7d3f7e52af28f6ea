"""The group all commands hang on, its exit codes, and how a command finds the app."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click
from flask.cli import ScriptInfo

from .. import __version__
from ..exceptions import BrokerUnavailableError, TaskWorkerError

if TYPE_CHECKING:
    from ..app import TaskApp

#: Exit codes: usage or configuration, and a broker that cannot be reached.
USAGE, UNAVAILABLE = 2, 75


class UsageProblem(click.ClickException):
    """A fault in the configuration or the command, shown as one line."""

    exit_code = USAGE


class Unavailable(click.ClickException):
    """A broker that cannot be reached, shown as one line."""

    exit_code = UNAVAILABLE


class Group(click.Group):
    """A group whose commands end with one line where this package raises."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokerUnavailableError as exc:
            raise Unavailable(str(exc)) from exc
        except TaskWorkerError as exc:
            raise UsageProblem(str(exc)) from exc


@click.group("taskworker", cls=Group)
@click.option(
    "-A",
    "--app",
    "target",
    metavar="TARGET",
    help="Where the task worker is: module, module:attribute or module:factory(). "
    "Default: the app that Flask finds.",
)
@click.version_option(__version__, prog_name="Flask-TaskWorker")
@click.pass_context
def taskworker(ctx: click.Context, target: str | None) -> None:
    """Run background tasks of a Flask app."""
    ctx.meta["flask_taskworker.target"] = target


def load_task_app(ctx: click.Context) -> TaskApp:
    """The task app that the command line names."""
    from ..target import from_flask_cli, from_target

    target = ctx.meta.get("flask_taskworker.target")
    if target:
        return from_target(target)
    info = ctx.find_object(ScriptInfo)
    return from_flask_cli(info if info is not None else ScriptInfo())


def main() -> None:
    """The ``taskworker`` command."""
    taskworker.main(prog_name="taskworker", args=sys.argv[1:])
