"""How a child process finds the app, and makes sure that it is the same one."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ...exceptions import ConfigurationError

if TYPE_CHECKING:
    from ...app import TaskApp

#: Is in the environment while a child process loads the app; see :mod:`flask_taskworker.reloader`.
LOADING = "TASKWORKER_LOADING"
#: With this Flask ignores app.run(), and says so.
_NO_SERVER = "FLASK_RUN_FROM_CLI"


@dataclass(frozen=True)
class AppSource:
    """Where a child process gets the app.

    :param loader: ``module:function``, called with ``argument`` and ``options``, gives the
        :class:`~flask_taskworker.app.TaskApp`.
    :param argument: what the user wrote, such as ``shop:create_app()``.
    :param options: plain data.
    """

    loader: str
    argument: str | None
    options: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)

    def load(self) -> TaskApp:
        """Import the app; nothing that starts a worker or a server does so now.

        :raises Exception: whatever importing it raises.
        """
        before = {name: os.environ.get(name) for name in (LOADING, _NO_SERVER)}
        os.environ.update({LOADING: "1", _NO_SERVER: "true"})
        try:
            module, _, name = self.loader.partition(":")
            load = getattr(importlib.import_module(module), name)
            app: TaskApp = load(self.argument, **self.options)
            return app
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def traits(app: TaskApp) -> dict[str, Any]:
    """What the app of a child must have in common with its worker's."""
    config = app.config
    return {
        "broker": _digest(config.broker_url),
        "results": _digest(config.result_backend or ""),
        "tasks": sorted(app.registry),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]  # it may hold a password


def check_same(app: TaskApp, expected: Mapping[str, Any], argument: str | None) -> None:
    """Refuse an app that is not the worker's.

    :raises ConfigurationError: saying what differs.
    """
    found = traits(app)
    missing = sorted(set(expected["tasks"]) - set(found["tasks"]))
    differences = []
    if found["broker"] != expected["broker"]:
        differences.append("it uses another broker")
    if found["results"] != expected["results"]:
        differences.append("it keeps its results elsewhere")
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        differences.append(f"it has no task {shown}")
    if differences:
        raise ConfigurationError(
            f"a child process loads the app from {argument!r}, and that is not the app of this "
            f"worker: {'; '.join(differences)}. Name it with -A, or set TASKER_APP to a text such "
            "as 'module:app' or \"module:create_app('production')\", or use the pool threads."
        )
