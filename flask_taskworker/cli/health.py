"""``taskworker health``: a probe for containers and monitors. It does not load the app."""

from __future__ import annotations

import os

import click

from .output import json_option, show_json
from .root import FAILED, taskworker


@taskworker.command()
@click.argument("url", required=False)
@click.option(
    "--pidfile",
    metavar="FILE",
    help="Probe the worker that was started with this --pidfile: it lives, and its loop turns.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a broker may take to answer.",
)
@json_option
@click.pass_context
def health(
    ctx: click.Context, url: str | None, pidfile: str | None, timeout: float, as_json: bool
) -> None:
    """Exit 0 if all is well, 1 if not.

    Probes the broker at URL, or else the one of TASKER_BROKER_URL and the like in the
    environment, unless --pidfile names a worker instead; with both, both.
    """
    from ..health import broker_in, of_broker, of_worker

    findings = []
    if pidfile is not None:
        findings.append(of_worker(pidfile))
    if pidfile is None or url is not None:
        findings.append(of_broker(url or broker_in(os.environ), timeout))
    ok = all(finding.ok for finding in findings)
    if as_json:
        show_json({"ok": ok, "findings": [finding._asdict() for finding in findings]})
    else:
        for finding in findings:
            click.echo(finding.text, err=not finding.ok)
    ctx.exit(0 if ok else FAILED)
