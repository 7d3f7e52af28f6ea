"""What somebody who looks into a problem has to know about an installation."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import TaskApp

_PACKAGES = (
    "flask-taskworker", "Flask", "Werkzeug", "click", "kombu", "SQLAlchemy", "Flask-SQLAlchemy",
    "redis", "amqp", "psycopg", "psycopg2", "PyMySQL", "greenstalk", "celery",
)  # fmt: skip


def describe(app: TaskApp) -> dict[str, Any]:
    """Versions, machine, settings and tasks; passwords are masked."""
    return {
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "settings": {key: _plain(value) for key, value in app.config.masked().items()},
        "tasks": sorted(app.registry),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _plain(value: object) -> object:
    """The value as JSON knows it."""
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return dict(value) if hasattr(value, "items") else value  # type: ignore[call-overload]
