"""Writes docs/cli.md from the commands themselves: ``python docs/cli_reference.py``.

With ``--check`` it only says whether the file is up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from flask_taskworker.cli import root, taskworker

TARGET = Path(__file__).with_name("cli.md")

HEAD = """\
# The command line

`flask taskworker ...` and `taskworker -A module:app ...` are the same program, as is
`python -m flask_taskworker`. This page is made from it by `docs/cli_reference.py`.

The options of the first table may stand before a command or after it. Those of a command can be
set in the environment as well: `TASKER_WORKER_CONCURRENCY=8` is `worker --concurrency 8`.

Data goes to stdout, and everything else to stderr. Every command that reads has `--json`.

## Exit codes

| Code | Meaning |
|---|---|
"""

EXIT_CODES = {
    0: "all is well",
    root.FAILED: "the task failed, or a part of what was asked for did; `health`: not well",
    root.USAGE: "the command line or the configuration cannot be used",
    root.NOT_READY: "`result`: the task is not done yet",
    root.UNKNOWN: "`result`: nothing is stored about this id",
    root.NO_REPLY: "no worker answered",
    root.UNAVAILABLE: "the broker or the database cannot be reached",
    root.TIMED_OUT: "it did not come in time",
    root.INTERRUPTED: "Ctrl-C",
}


def page() -> str:
    """The whole page."""
    ctx = click.Context(taskworker, info_name="taskworker")
    parts = [HEAD + "".join(f"| {code} | {text} |\n" for code, text in EXIT_CODES.items())]
    parts += ["## Options of all commands\n", _options(taskworker, ctx)]
    for name in taskworker.list_commands(ctx):
        command = taskworker.get_command(ctx, name)
        if command is not None and not command.hidden:
            parts += _command(command, click.Context(command, info_name=name, parent=ctx), 2)
    return "\n".join(part for part in parts if part)


def _command(command: click.Command, ctx: click.Context, level: int) -> Iterator[str]:
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    usage = " ".join([ctx.command_path, *map(_argument, arguments)])
    yield f"{'#' * level} {usage}\n"
    yield f"{_text(command.help or '')}\n"
    yield _options(command, ctx)
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            inner = command.get_command(ctx, name)
            assert inner is not None
            yield from _command(inner, click.Context(inner, info_name=name, parent=ctx), level + 1)


def _argument(argument: click.Argument) -> str:
    name = argument.metavar or str(argument.name).upper()
    return name if argument.required or name.startswith("[") else f"[{name}]"


def _options(command: click.Command, ctx: click.Context) -> str:
    options = [p for p in command.get_params(ctx) if isinstance(p, click.Option) and not p.hidden]
    rows = [_row(option) for option in options if option.opts[-1] not in ("--help", "--version")]
    return "| Option | Meaning |\n|---|---|\n" + "".join(rows) if rows else ""


def _row(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    if not option.is_flag:
        choices = getattr(option.type, "choices", ())
        names += f" `{option.metavar or '|'.join(choices) or option.type.name.upper()}`"
    text = _text(option.help or "")
    if option.show_default:
        text += f" Default: {option.default}"
    cells = (cell.replace("|", "\\|") for cell in (names, text))
    return f"| {' | '.join(cells)} |\n"


def _text(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(TARGET.read_text(encoding="utf-8") != page())
    TARGET.write_text(page(), encoding="utf-8")
