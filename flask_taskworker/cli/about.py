"""``taskworker report``, ``shell`` and ``completion``."""

from __future__ import annotations

import importlib.util
from typing import Any

import click

from .output import json_option, show_json, show_pairs
from .root import UsageProblem, load_task_app, taskworker

SHELLS = ("bash", "zsh", "fish")


@taskworker.command()
@json_option
@click.pass_context
def report(ctx: click.Context, as_json: bool) -> None:
    """What to add to a bug report: versions, machine, settings. Passwords are masked."""
    from ..report import describe

    data = describe(load_task_app(ctx))
    if as_json:
        show_json(data)
        return
    show_pairs(data.pop("packages"))
    settings = data.pop("settings")
    show_pairs(data)
    click.echo("settings")
    show_pairs(settings, indent="  ")


@taskworker.command()
@click.option("-I", "--ipython", "kind", flag_value="IPython", help="IPython.")
@click.option("-B", "--bpython", "kind", flag_value="bpython", help="bpython.")
@click.option("--python", "kind", flag_value="code", help="Python's own.")
@click.option("-T", "--without-tasks", is_flag=True, help="Leave the tasks' names out.")
@click.pass_context
def shell(ctx: click.Context, kind: str | None, without_tasks: bool) -> None:
    """A Python shell inside the app context, with app, task_worker, tasks and each task.

    IPython or bpython are used where they are installed.
    """
    from ..extension import shell_names

    names = shell_names(load_task_app(ctx), with_tasks=not without_tasks)
    kinds = [kind] if kind else ["IPython", "bpython", "code"]
    found = next((name for name in kinds if importlib.util.find_spec(name)), None)
    if found is None:
        raise UsageProblem(f"{kind} is not installed here")
    with names["app"].app_context():
        _interact(found, names)


def _interact(kind: str, names: dict[str, Any]) -> None:
    shell = importlib.import_module(kind)
    shown = ", ".join(sorted(names))
    if kind == "IPython":
        shell.start_ipython(argv=[], user_ns=names, display_banner=False)
    elif kind == "bpython":
        shell.embed(locals_=names, banner=shown)
    else:
        shell.interact(banner=f"Flask-TaskWorker: {shown}", local=names, exitmsg="")


@taskworker.command()
@click.argument("shell_name", type=click.Choice(SHELLS), metavar="|".join(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell_name: str) -> None:
    """The script that completes commands and options, for your shell to read.

    For bash: eval "$(taskworker completion bash)" in ~/.bashrc.
    """
    from click.shell_completion import get_completion_class

    root = ctx.find_root()
    program = root.info_name or "taskworker"
    found = get_completion_class(shell_name)
    assert found is not None
    variable = f"_{program.replace('-', '_').replace('.', '_')}_COMPLETE".upper()
    click.echo(found(root.command, {}, program, variable).source())
