"""The group all commands hang on, its exit codes, and how a command finds the app."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click
from flask.cli import ScriptInfo

from .. import __version__
from ..exceptions import BrokerUnavailableError, ResultTimeoutError, TaskWorkerError

if TYPE_CHECKING:
    from ..app import TaskApp

#: Exit codes. The task failed, or a part of what was asked for did.
FAILED = 1
#: The command line or the configuration cannot be used.
USAGE = 2
#: ``result``: the task is not done yet; nothing is known about this id.
NOT_READY, UNKNOWN = 3, 4
#: No worker answered (Celery's code).
NO_REPLY = 69
#: The broker or the database cannot be reached.
UNAVAILABLE = 75
#: It was waited for longer than allowed.
TIMED_OUT = 124
#: Ctrl-C.
INTERRUPTED = 130

#: Which module of this package adds which command: it is loaded when the command is used.
COMMANDS = {
    "call": "calls",
    "completion": "about",
    "control": "remote",
    "db": "db",
    "dead": "dead",
    "events": "remote",
    "health": "health",
    "inspect": "remote",
    "multi": "multi",
    "pause": "queues",
    "purge": "queues",
    "queues": "queues",
    "report": "about",
    "result": "calls",
    "resume": "queues",
    "shell": "about",
    "status": "remote",
    "tasks": "calls",
    "worker": "worker",
    # Celery's, with nothing here that they could do
    "amqp": "elsewhere",
    "beat": "elsewhere",
    "graph": "elsewhere",
    "list": "elsewhere",
    "logtool": "elsewhere",
    "migrate": "elsewhere",
    "upgrade": "elsewhere",
}

_KEY = "flask_taskworker."


class UsageProblem(click.ClickException):
    """A fault in the configuration or the command, shown as one line."""

    exit_code = USAGE


class Unavailable(click.ClickException):
    """A broker that cannot be reached, shown as one line."""

    exit_code = UNAVAILABLE


class TimedOut(click.ClickException):
    """Something did not come in time, shown as one line."""

    exit_code = TIMED_OUT


# -- options that every command takes, before its name and after it --------------------------


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value:
        ctx.meta[_KEY + str(param.name)] = value


def _change_folder(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value:
        os.chdir(value)


def _no_color(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().color = ctx.color = False
        ctx.meta[_KEY + "no_color"] = True


def _without_effect(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value:
        without_effect(ctx, param.opts[-1])


def _shared_options(hidden: bool) -> list[click.Option]:
    # Their environment variables would have the names of settings.
    more: dict[str, Any] = {"expose_value": False, "hidden": hidden, "allow_from_autoenv": False}
    return [
        click.Option(
            ["-A", "--app", "target"],
            metavar="TARGET",
            callback=_keep,
            help="Where the task worker is: module, module:attribute or module:factory(). "
            "Default: FLASK_APP, or the app that Flask finds.",
            **more,
        ),
        click.Option(
            ["-b", "--broker"],
            metavar="URL",
            callback=_keep,
            help="The broker, instead of the app's.",
            **more,
        ),
        click.Option(
            ["--result-backend"],
            metavar="URL",
            callback=_keep,
            help="Where results are, instead of the app's.",
            **more,
        ),
        click.Option(
            ["--workdir"],
            metavar="FOLDER",
            type=click.Path(exists=True, file_okay=False),
            callback=_change_folder,
            is_eager=True,
            help="Change to this folder first.",
            **more,
        ),
        click.Option(
            ["-C", "--no-color"],
            is_flag=True,
            callback=_no_color,
            help="No colours, not even on a terminal. NO_COLOR in the environment does the same.",
            **more,
        ),
        click.Option(
            ["-q", "--quiet"], is_flag=True, callback=_keep, help="No banner, no notes.", **more
        ),
        click.Option(
            ["--loader"],
            metavar="NAME",
            callback=_without_effect,
            help="Celery's; no effect here.",
            **more,
        ),
        click.Option(
            ["--config"],
            metavar="NAME",
            callback=_without_effect,
            help="Celery's; no effect here: the app's config counts.",
            **more,
        ),
        click.Option(
            ["--skip-checks"],
            is_flag=True,
            callback=_without_effect,
            help="Celery's; no effect here.",
            **more,
        ),
    ]


def _with_shared(own: Sequence[click.Parameter], hidden: bool) -> list[click.Parameter]:
    taken = {name for param in own for name in param.opts}
    shared = [option for option in _shared_options(hidden) if not taken.intersection(option.opts)]
    return [*own, *shared]


def without_effect(ctx: click.Context, option: str) -> None:
    """Remember that an option was taken which changes nothing."""
    ctx.meta.setdefault(_KEY + "without_effect", []).append(option)


def note(ctx: click.Context, text: str) -> None:
    """Tell people something that is no data, unless they want it quiet."""
    if not is_quiet(ctx):
        click.echo(f"Note: {text}", err=True)


def note_without_effect(ctx: click.Context) -> None:
    """Say in one line which options were taken and change nothing."""
    options: list[str] = ctx.meta.pop(_KEY + "without_effect", [])
    if options:
        note(ctx, f"no effect here: {', '.join(dict.fromkeys(options))}")


def be_quiet(ctx: click.Context) -> None:
    """Do as if ``-q`` had been given."""
    ctx.meta[_KEY + "quiet"] = True


def is_quiet(ctx: click.Context) -> bool:
    """Whether ``-q`` was given."""
    return bool(ctx.meta.get(_KEY + "quiet"))


def may_color(ctx: click.Context) -> bool:
    """Whether colours are allowed; a terminal has to be there as well."""
    return not ctx.meta.get(_KEY + "no_color") and not os.environ.get("NO_COLOR")


# -- the groups ------------------------------------------------------------------------------


class Verb(click.Command):
    """A command that takes the shared options after its name, as older scripts write them."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return _with_shared(super().get_params(ctx), hidden=True)

    def invoke(self, ctx: click.Context) -> Any:
        note_without_effect(ctx)
        return super().invoke(ctx)


class Group(click.Group):
    """A group whose commands end with one line where this package raises."""

    command_class = Verb

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return _with_shared(super().get_params(ctx), hidden=True)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokerUnavailableError as exc:
            raise Unavailable(str(exc)) from exc
        except ResultTimeoutError as exc:
            raise TimedOut(str(exc)) from exc
        except TaskWorkerError as exc:
            raise UsageProblem(str(exc)) from exc
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(INTERRUPTED)


class Root(Group):
    """The group of all commands; each is loaded when it is used."""

    group_class = Group

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return _with_shared(click.Group.get_params(self, ctx), hidden=False)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*COMMANDS, *self.commands})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands and cmd_name in COMMANDS:
            importlib.import_module(f".{COMMANDS[cmd_name]}", __package__)
        return super().get_command(ctx, cmd_name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        ordered = self._command_first(ctx, given)
        rest = super().parse_args(ctx, list(ordered))
        if ordered != given:
            note(ctx, "options of a command now stand after its name")
        return rest

    def _command_first(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put a command before its own options: scripts of Celery 3 have them in front."""
        takes_value = {
            name: not param.is_flag
            for param in self.get_params(ctx)
            if isinstance(param, click.Option)
            for name in param.opts
        }
        known = set(self.list_commands(ctx))
        front: list[str] = []
        late: list[str] = []
        tokens = iter(args)
        for token in tokens:
            if token in known:
                return [*front, token, *late, *tokens]
            name, inline = _option_name(token)
            if name in takes_value:
                front += [token, *([] if inline else _values(tokens, takes_value[name]))]
            elif token != "--" and (late or token.startswith("-")):
                late.append(token)
            else:
                break
        return args


def _option_name(token: str) -> tuple[str, bool]:
    """The name of an option, and whether its value is in the same word."""
    if token.startswith("--"):
        name, mark, _ = token.partition("=")
        return name, bool(mark)
    return token[:2], len(token) > 2


def _values(tokens: Iterator[str], wanted: bool) -> list[str]:
    value = next(tokens, None) if wanted else None
    return [] if value is None else [value]


@click.group("taskworker", cls=Root, context_settings={"auto_envvar_prefix": "TASKER"})
@click.version_option(__version__, prog_name="Flask-TaskWorker")
def taskworker() -> None:
    """Run background tasks of a Flask app."""


# -- the app ---------------------------------------------------------------------------------


def load_task_app(ctx: click.Context, **settings: object) -> TaskApp:
    """The task app that the command line names.

    :param settings: further settings that win over the app's, by their key.
    """
    from ..extension import override
    from ..target import from_flask_cli, from_target

    target = ctx.meta.get(_KEY + "target")
    if target:
        task_app = from_target(target)
    else:
        info = ctx.find_object(ScriptInfo)
        task_app = from_flask_cli(info or ScriptInfo(app_import_path=os.environ.get("FLASK_APP")))
    override(task_app, overrides(ctx, **settings))
    return task_app


def overrides(ctx: click.Context, **settings: object) -> dict[str, object]:
    """The settings that the command line changes, by their key."""
    for name, key in (("broker", "TASKER_BROKER_URL"), ("result_backend", "TASKER_RESULT_BACKEND")):
        settings[key] = ctx.meta.get(_KEY + name)
    return {key: value for key, value in settings.items() if value is not None}


def chosen(ctx: click.Context, name: str) -> str | None:
    """A shared option: ``target``, ``broker`` or ``result_backend``."""
    value: str | None = ctx.meta.get(_KEY + name)
    if value is None and name == "target":
        info = ctx.find_object(ScriptInfo)
        value = info.app_import_path if info is not None else None
    return value


def main() -> None:
    """The ``taskworker`` command."""
    taskworker.main(prog_name="taskworker", args=sys.argv[1:])
