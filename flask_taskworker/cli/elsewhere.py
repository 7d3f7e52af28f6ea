"""Commands of Celery that have nothing to do here: each says what to use instead."""

from __future__ import annotations

import click

from .root import USAGE, taskworker

INSTEAD = {
    "amqp": "use RabbitMQ's own tools: rabbitmqctl, or its management pages",
    "beat": "this release has no scheduler: send tasks from cron with 'taskworker call'",
    "graph": "there is nothing to draw; 'taskworker tasks' lists the tasks, 'taskworker queues' "
    "the queues",
    "list": "use 'taskworker queues'",
    "logtool": "log with 'taskworker worker --log-format json' and use any tool that reads JSON "
    "lines, such as jq",
    "migrate": "use 'taskworker db migrate-kombu' for the tables of Celery's sqla+ broker",
    "upgrade": "there are no old settings to rewrite: mistakes are shown when the app starts",
}


def _add(name: str, text: str) -> None:
    @taskworker.command(
        name,
        hidden=True,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True},
        help=f"Celery's; here: {text}.",
    )
    @click.argument("words", nargs=-1, type=click.UNPROCESSED)
    @click.pass_context
    def instead(ctx: click.Context, words: tuple[str, ...]) -> None:
        click.echo(f"Error: there is no '{name}' here: {text}.", err=True)
        ctx.exit(USAGE)


for _name, _text in INSTEAD.items():
    _add(_name, _text)
