"""Finding the task worker that a command line names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flask.cli import ScriptInfo

from flask_taskworker.app import TaskApp
from flask_taskworker.exceptions import ConfigurationError, TaskWorkerError
from flask_taskworker.target import from_flask_cli, from_target

HEAD = """
from flask import Flask
from flask_taskworker import BackgroundTaskWorker
def made(name="shop"):
    app = Flask(name)
    app.config.update(TASKER_ENGINE="memory", TASKER_DEFAULT_QUEUE=name)
    return app
"""
WITH_WORKER = HEAD + "flask_app = made()\ntask_worker = BackgroundTaskWorker(flask_app)\n"
FACTORY = (
    HEAD
    + """
worker_object = BackgroundTaskWorker()
def create_app(name="factory"):
    app = made(name)
    worker_object.init_app(app)
    return app
def bare():
    return Flask("bare")
"""
)

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes modules into the current folder; forgets them after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("FLASK_APP", raising=False)
    before = set(sys.modules)

    def write(**modules: str) -> None:
        for name, text in modules.items():
            path = tmp_path / (name.replace("__in__", "/") + ".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    yield write
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def queue_of(task_app: TaskApp) -> str:
    assert isinstance(task_app, TaskApp)
    return task_app.config.default_queue


@pytest.mark.parametrize(
    ("target", "queue"),
    [
        ("tw_found", "shop"),
        ("tw_found.py", "shop"),
        ("tw_found:task_worker", "shop"),
        ("tw_found.task_worker", "shop"),
        ("tw_found:flask_app", "shop"),
        ("tw_found:holder.inner", "shop"),
        ("tw_factory", "factory"),
        ("tw_factory:create_app", "factory"),
        ("tw_factory:create_app()", "factory"),
        ("tw_factory:create_app('named')", "named"),
        ("tw_package.sub", "shop"),
        ("tw_package.sub:task_worker", "shop"),
        ("tw_package/sub.py", "shop"),
        ("tw_package.sub.task_worker", "shop"),
    ],
)
def test_a_target_is_found(target: str, queue: str, write: Write) -> None:
    write(
        tw_found=WITH_WORKER + "class holder: inner = task_worker\n",
        tw_factory=FACTORY,
        tw_package__in____init__="",
        tw_package__in__sub=WITH_WORKER,
    )
    assert queue_of(from_target(target)) == queue


def test_usual_names_win_over_other_variables(write: Write) -> None:
    write(
        tw_two=HEAD
        + "other = BackgroundTaskWorker(made('other'))\n"
        + "task_worker = BackgroundTaskWorker(made('usual'))\n"
    )
    assert queue_of(from_target("tw_two")) == "usual"


BROKEN = "import flask\n\n\nraise RuntimeError('the database is missing')\n"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("tw_fond", "there is no module 'tw_fond' in {folder}. Did you mean 'tw_found'?"),
        ("zzz", "there is no module 'zzz' in {folder}"),
        ("tw_found:worker", "module 'tw_found' has no 'worker'"),
        ("tw_found:holder.outer", "module 'tw_found' has no 'holder.outer'"),
        ("tw_found.nothing", "module 'tw_found' has no 'nothing'"),
        ("tw_found:holdr", "module 'tw_found' has no 'holdr'. Did you mean 'holder'?"),
        ("tw_broken", "importing 'tw_broken' failed at {folder}/tw_broken.py:4: RuntimeError: the"),
        (
            "tw_needs",
            "'tw_needs' was found, but importing it failed: No module named 'zzz_missing'",
        ),
        ("tw_plain", "'tw_plain' has neither a task worker, nor a Flask app with one, nor create_"),
        ("tw_bare", "'tw_bare' has a Flask app but no task worker. Add: task_worker = Background"),
        ("tw_factory:bare", "has a Flask app but no task worker"),
        ("tw_factory:bare()", "'bare' has a Flask app but no task worker"),
        ("tw_factory:worker_object", "'tw_factory:worker_object' has neither a task worker"),
        ("tw_factory:missing()", "With taskworker name it: taskworker -A module:app worker"),
        ("tw_found:made", "has a Flask app but no task worker"),
        (":app", "':app' names no module. Write for example: taskworker -A module:app worker"),
    ],
)
def test_what_is_not_found_is_explained(
    target: str, words: str, write: Write, tmp_path: Path
) -> None:
    write(
        tw_found=WITH_WORKER + "class holder: inner = task_worker\n",
        tw_factory=FACTORY,
        tw_broken=BROKEN,
        tw_needs="import zzz_missing\n",
        tw_plain="x = 1\n",
        tw_bare="from flask import Flask\nthing = Flask('bare')\n",
    )
    with pytest.raises(ConfigurationError) as caught:
        from_target(target)
    assert words.format(folder=tmp_path) in str(caught.value)


def test_faults_of_the_settings_are_shown_as_they_are(write: Write) -> None:
    write(
        tw_config=HEAD
        + "app = made()\napp.config['TASKER_CONCURRENCY'] = 'many'\nBackgroundTaskWorker(app)\n"
    )
    with pytest.raises(TaskWorkerError, match="TASKER_CONCURRENCY = 'many'") as caught:
        from_target("tw_config")
    assert "importing" not in str(caught.value)


def test_flask_finds_the_app_by_its_own_rules(write: Write) -> None:
    write(app=WITH_WORKER.replace("flask_app", "app"))
    assert queue_of(from_flask_cli(ScriptInfo())) == "shop"


def test_no_app_for_flask_is_explained(write: Write) -> None:
    write()
    with pytest.raises(ConfigurationError, match=r"Could not locate a Flask .* taskworker -A mod"):
        from_flask_cli(ScriptInfo())
