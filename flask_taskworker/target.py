"""Finds the task worker that ``-A`` names, or that the Flask command line has loaded."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from flask import Flask
from flask.cli import NoAppException, ScriptInfo

from .app import TaskApp
from .exceptions import ConfigurationError, TaskWorkerError
from .extension import EXTENSION, AppState, BaseTaskWorker

_ATTRIBUTES = (
    "app",
    "application",
    "task_worker",
    "taskworker",
    "tw",
    "worker",
    "celery",
    "celery_app",
)
_FACTORIES = ("create_app", "make_app")


def from_target(target: str) -> TaskApp:
    """The task app behind a target.

    :param target: ``module``, ``module:attribute``, ``module.attribute`` or
        ``module:factory('argument')``.
    :raises ConfigurationError: if it cannot be found; the text says what was looked for.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module_name, _, attribute = target.partition(":")
    if module_name.endswith(".py"):
        module_name = module_name[:-3].replace(os.sep, ".")
    if not module_name:
        raise ConfigurationError(
            f"{target!r} names no module. Write for example: taskworker -A module:app worker"
        )
    if "(" in attribute:
        return _from_flask(_load_flask(ScriptInfo(app_import_path=target)))
    module, rest = _import(module_name)
    if attribute or rest:
        return _from_attribute(module, attribute or rest)
    return _from_module(module)


def from_flask_cli(info: ScriptInfo) -> TaskApp:
    """The task app of the Flask app that ``flask`` was started with, or that it finds by itself."""
    return _from_flask(_load_flask(info))


def _load_flask(info: ScriptInfo) -> Flask:
    try:
        return info.load_app()
    except NoAppException as exc:
        raise ConfigurationError(
            f"{exc} With taskworker name it: taskworker -A module:app worker"
        ) from exc


def _import(name: str) -> tuple[ModuleType, str]:
    """Import the longest part of a dotted name that is a module; return the rest as well."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as exc:
        parent, _, last = name.rpartition(".")
        missing = exc.name or ""
        if name != missing and not name.startswith(missing + "."):
            raise ConfigurationError(f"{name!r} was found, but importing it failed: {exc}") from exc
        if not parent:
            raise ConfigurationError(
                f"there is no module {name!r} in {os.getcwd()}{_similar_files(name)}"
            ) from None
        module, rest = _import(parent)
        return module, f"{rest}.{last}" if rest else last
    except TaskWorkerError:
        raise
    except Exception as exc:
        where = traceback.extract_tb(exc.__traceback__)[-1]
        raise ConfigurationError(
            f"importing {name!r} failed at {where.filename}:{where.lineno}: "
            f"{type(exc).__name__}: {exc}"
        ) from exc


def _similar_files(name: str) -> str:
    return _similar(name, [f[:-3] for f in os.listdir() if f.endswith(".py")])


def _similar(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f". Did you mean {close[0]!r}?" if close else ""


def _from_attribute(module: ModuleType, path: str) -> TaskApp:
    found: Any = module
    for name in path.split("."):
        if not hasattr(found, name):
            raise ConfigurationError(
                f"module {module.__name__!r} has no {path!r}{_similar(name, dir(found))}"
            )
        found = getattr(found, name)
    if isinstance(found, ModuleType):
        return _from_module(found)
    task_app = _as_task_app(found)
    if task_app is None and callable(found) and not isinstance(found, (Flask, type)):
        found = found()
        task_app = _as_task_app(found)
    if task_app is None:
        raise _no_worker(f"{module.__name__}:{path}", found)
    return task_app


def _from_module(module: ModuleType) -> TaskApp:
    values = [vars(module).get(name) for name in _ATTRIBUTES] + list(vars(module).values())
    for value in values:
        task_app = _as_task_app(value)
        if task_app is not None:
            return task_app
    for name in _FACTORIES:
        factory = vars(module).get(name)
        if callable(factory):
            return _from_flask(factory())
    flask_app = next((v for v in values if isinstance(v, Flask)), None)
    raise _no_worker(module.__name__, flask_app)


def _as_task_app(value: Any) -> TaskApp | None:
    if isinstance(value, BaseTaskWorker):
        return value.task_app() if value.apps() else None
    if isinstance(value, Flask) and EXTENSION in value.extensions:
        return _from_flask(value)
    return None


def _from_flask(app: Any) -> TaskApp:
    state = app.extensions.get(EXTENSION) if isinstance(app, Flask) else None
    if not isinstance(state, AppState):
        raise _no_worker(getattr(app, "name", repr(app)), app)
    return state.task_app


def _no_worker(name: str, found: Any) -> ConfigurationError:
    if isinstance(found, Flask):
        return ConfigurationError(
            f"{name!r} has a Flask app but no task worker. Add: task_worker = "
            "BackgroundTaskWorker(app)  (or task_worker.init_app(app) in create_app)"
        )
    return ConfigurationError(
        f"{name!r} has neither a task worker, nor a Flask app with one, nor create_app(). "
        "Name it: taskworker -A module:task_worker worker"
    )
