"""Whether this process serves, or only watches files, or loads the app for a worker."""

from __future__ import annotations

import os
import sys
import threading


def watches_for_reloader() -> bool:
    """Whether this process only watches files, and its child serves.

    Werkzeug imports its reloader where it is used, and marks the child's environment.
    """
    if os.environ.get("WERKZEUG_RUN_MAIN") == "true":
        return False
    return "werkzeug._reloader" in sys.modules or _flask_run_will_reload()


def _flask_run_will_reload() -> bool:
    """Whether this is the parent of ``flask run`` with reload on, which loads the app too."""
    import click
    from flask.helpers import get_debug_flag

    context = click.get_current_context(silent=True)
    if context is None or context.info_name != "run" or "reload" not in context.params:
        return False
    reload = context.params["reload"]
    return bool(get_debug_flag() if reload is None else reload)


def may_become_reloader() -> bool:
    """Whether this is a program of the user's own that may go on to ``app.run(debug=True)``."""
    if os.environ.get("WERKZEUG_RUN_MAIN") == "true":
        return False
    import click

    return (
        threading.current_thread() is threading.main_thread()
        and click.get_current_context(silent=True) is None
    )


#: Is in the environment while a child process of a worker loads the app.
LOADING = "TASKWORKER_LOADING"


def is_loading() -> bool:
    """Whether the app is being loaded in a child process of a worker: nothing may start there."""
    return LOADING in os.environ
