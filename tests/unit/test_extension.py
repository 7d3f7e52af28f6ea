"""The extension: which app a call belongs to, how tasks are defined, start and stop."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, current_app

from flask_taskworker import (
    BackgroundTaskWorker,
    BaseTask,
    BaseTaskWorker,
    BlockingTaskWorker,
    ConfigurationError,
    Task,
    TaskWorkerError,
    current_request,
)
from flask_taskworker.config import ConfigurationWarning
from flask_taskworker.exceptions import (
    DuplicateTaskError,
    NotInitialisedError,
    TaskDefinitionError,
)
from flask_taskworker.extension import AppState
from support import AppRoom, make_app, run_worker, wait_until

# -- setting up ---------------------------------------------------------------------------


def test_the_constructor_sets_up_an_app() -> None:
    app = make_app()
    worker = BackgroundTaskWorker(app)
    state = app.extensions["taskworker"]
    assert isinstance(state, AppState)
    assert state.extension is worker
    assert worker.apps() == [app]
    assert worker.task_app() is worker.task_app(app) is state.task_app


def test_defaults_are_written_and_what_is_there_is_kept() -> None:
    app = make_app(TASKER_CONCURRENCY=9)
    BaseTaskWorker(app)
    assert app.config["TASKER_CONCURRENCY"] == 9
    assert app.config["TASKER_LOOP_INTERVAL"] == 5
    assert app.config["TASKER_ENGINE"] == "memory"
    assert app.config["TASKER_DEBUG"] is False


def test_an_app_is_set_up_once() -> None:
    app = make_app("shop")
    worker = BaseTaskWorker(app)
    for again in (lambda: worker.init_app(app), lambda: BaseTaskWorker(app)):
        with pytest.raises(TaskWorkerError, match=r"app 'shop' has a task worker already\. Create"):
            again()
    assert app.extensions["taskworker"].extension is worker


def test_all_faults_of_the_settings_are_told_at_once_and_nothing_is_set_up() -> None:
    app = make_app(TASKER_CONCURRENCY="many", TASKER_LOOP_INTERVAL=-1)
    with pytest.raises(ConfigurationError) as caught:
        BaseTaskWorker(app)
    assert len(caught.value.problems) == 2
    assert "TASKER_CONCURRENCY" in str(caught.value)
    assert "TASKER_LOOP_INTERVAL" in str(caught.value)
    assert "taskworker" not in app.extensions


def test_a_key_that_is_no_setting_is_warned_of() -> None:
    with pytest.warns(ConfigurationWarning, match=r"TASKER_CONCURENCY .* Did you mean 'TASKER_CON"):
        BaseTaskWorker(make_app(TASKER_CONCURENCY=3))


def test_debug_shows_the_log_where_nobody_else_does(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("flask_taskworker")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    try:
        logger.propagate = False  # pytest listens at the root
        BaseTaskWorker(make_app(TASKER_DEBUG=True))
        BaseTaskWorker(make_app(TASKER_DEBUG=True))
        added = [handler for handler in logger.handlers if handler not in handlers]
        assert len(added) == 1
        assert logger.level == logging.DEBUG
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def test_the_folder_of_the_queue_is_made(tmp_path: Path) -> None:
    BaseTaskWorker(Flask("shop", instance_path=str(tmp_path / "deep" / "instance")))
    assert (tmp_path / "deep" / "instance").is_dir()
    app = Flask("shop", instance_path=str(tmp_path / "unused"))
    app.config["TASKER_ENGINE"] = "memory"
    BaseTaskWorker(app)
    assert not (tmp_path / "unused").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    app = Flask("shop", instance_path=str(tmp_path / "file" / "instance"))
    with pytest.raises(
        ConfigurationError, match=r"file/instance cannot be made: .*Set TASKER_DATA"
    ):
        BaseTaskWorker(app)


# -- which app ----------------------------------------------------------------------------


def test_without_an_app_the_error_says_what_to_do() -> None:
    worker = BaseTaskWorker()

    @worker.define_task
    def bill() -> None: ...

    for use in (bill.delay, worker.task_app, lambda: worker.AsyncResult("a")):
        with pytest.raises(NotInitialisedError, match=r"has no app yet\. Pass it to the construct"):
            use()
    with Flask("elsewhere").app_context(), pytest.raises(NotInitialisedError, match="no app yet"):
        bill.delay()
    assert issubclass(NotInitialisedError, RuntimeError)


def test_a_single_app_needs_no_context() -> None:
    worker = BaseTaskWorker()
    app = make_app()
    worker.init_app(app)
    assert worker.task_app() is app.extensions["taskworker"].task_app


def test_of_several_apps_the_current_one_counts() -> None:
    worker = BaseTaskWorker()
    apps = [make_app("one"), make_app("two")]
    for app in apps:
        worker.init_app(app)
    for app in apps:
        with app.app_context():
            assert worker.task_app() is app.extensions["taskworker"].task_app
    with pytest.raises(NotInitialisedError, match=r"serves 2 apps \(one, two\)\. Call it inside"):
        worker.task_app()
    with Flask("three").app_context(), pytest.raises(NotInitialisedError, match="serves 2 apps"):
        worker.task_app()


def test_the_app_of_the_constructor_wins_over_the_current_one() -> None:
    mine, other = make_app("mine"), make_app("other")
    worker = BaseTaskWorker(mine)
    worker.init_app(other)
    with other.app_context():
        assert worker.task_app() is mine.extensions["taskworker"].task_app
    assert worker.task_app(other) is other.extensions["taskworker"].task_app


def test_an_app_of_another_worker_is_refused() -> None:
    worker, other = BaseTaskWorker(make_app("mine")), make_app("other")
    BaseTaskWorker(other)
    for app in (other, Flask("plain")):
        with pytest.raises(NotInitialisedError, match=r"is not set up for this task worker\. Call"):
            worker.task_app(app)


def test_two_workers_share_nothing(unique: str) -> None:
    one, two = BaseTaskWorker(make_app("one")), BaseTaskWorker(make_app("two"))

    @one.define_task(name=unique)
    def first() -> None: ...

    @two.define_task(name=unique)
    def second() -> None: ...

    assert one.registry[unique] is first
    assert two.registry[unique] is second


def test_each_app_has_its_own_settings_and_results() -> None:
    worker = BaseTaskWorker()
    one, two = make_app("one", TASKER_CONCURRENCY=1), make_app("two", TASKER_CONCURRENCY=2)
    worker.init_app(one)
    worker.init_app(two)
    assert worker.task_app(one).config.concurrency == 1
    assert worker.task_app(two).config.concurrency == 2
    assert worker.task_app(one).backend is not worker.task_app(two).backend


def test_the_extension_keeps_no_app_alive_but_the_latest() -> None:
    worker = BaseTaskWorker()

    @worker.define_task
    def bill() -> None: ...

    def create_app() -> Flask:
        app = make_app()
        worker.init_app(app)
        with app.app_context():
            bill.delay()
            assert worker.AsyncResult("a").state == "PENDING"
        return app

    made = [weakref.ref(create_app()) for _ in range(4)]
    gc.collect()
    assert [reference() is None for reference in made] == [True, True, True, False]
    assert worker.apps() == [made[-1]()]
    assert worker.task_app().registry is worker.registry


# -- defining -----------------------------------------------------------------------------


def test_a_task_is_defined_bare_or_with_options(room: AppRoom) -> None:
    @room.task_worker.define_task
    def bare(x: int) -> int:
        return x

    @room.task_worker.define_task()
    def called(x: int) -> int:
        return x

    @room.task_worker.define_task(name="other.name", queue="mail", max_retries=7)
    def with_options(x: int) -> int:
        return x

    assert [type(task) for task in (bare, called, with_options)] == [Task] * 3
    assert BaseTask is Task
    assert list(room.task_worker.registry) == [
        f"{__name__}.bare",
        f"{__name__}.called",
        "other.name",
    ]
    assert with_options.options_["max_retries"] == 7
    assert [bare(1), called(2), with_options(3)] == [1, 2, 3]


def test_a_task_may_be_bound(room: AppRoom) -> None:
    @room.task_worker.define_task(bind=True)
    def bound(self: Task[..., Any], x: int) -> Any:
        return self, x

    assert bound(5) == (bound, 5)


def test_a_bound_task_needs_a_place_for_itself(room: AppRoom) -> None:
    with pytest.raises(TaskDefinitionError, match="bind=True gives the task to 'nothing'"):

        @room.task_worker.define_task(bind=True)  # type: ignore[arg-type]
        def nothing() -> None: ...


@pytest.mark.parametrize("wrong", ["mail", 5, None])
def test_only_a_function_is_a_task(wrong: Any, room: AppRoom) -> None:
    with pytest.raises(TaskDefinitionError, match="define_task needs a function"):
        room.task_worker.define_task()(wrong)


def test_a_function_and_options_together_are_refused(room: AppRoom) -> None:
    with pytest.raises(TaskDefinitionError, match="takes a function or options, not both"):
        room.task_worker.define_task(print, name="t")  # type: ignore[call-overload]


def test_two_functions_under_one_name_are_refused(room: AppRoom) -> None:
    def make(name: str) -> None:
        @room.task_worker.define_task(name=name)
        def first() -> None: ...

        @room.task_worker.define_task(name=name)
        def second() -> None: ...

    with pytest.raises(
        DuplicateTaskError, match=r"first \(.*test_extension\.py:\d+\) and .*second"
    ):
        make("shop.bill")


def test_tasks_may_be_defined_before_there_is_an_app() -> None:
    worker = BaseTaskWorker()

    @worker.define_task
    def bill() -> None: ...

    app = make_app()
    worker.init_app(app)
    assert worker.task_app().registry[bill.name] is bill


# -- a worker in this process -------------------------------------------------------------


@pytest.fixture
def background() -> Iterator[BackgroundTaskWorker]:
    app = make_app()
    worker = BackgroundTaskWorker(app)
    yield worker
    worker.stop(5)
    app.extensions["taskworker"].task_app.close()


def test_a_background_worker_runs_what_is_sent(background: BackgroundTaskWorker) -> None:
    @background.define_task
    def where(x: int) -> Any:
        return [x, current_app.name, threading.current_thread().name]

    sent_before = where.apply(x=1)
    background.start()
    sent_after = where.delay(2)
    for number, handle in ((1, sent_before), (2, sent_after)):
        x, app_name, thread = handle.get(timeout=5)
        assert (x, app_name) == (number, "shop")
        assert thread != threading.current_thread().name


def test_start_and_stop_may_be_called_twice(background: BackgroundTaskWorker) -> None:
    background.stop()  # nothing runs: nothing happens
    background.start()
    (app,) = background.apps()
    state = app.extensions["taskworker"]
    thread = state.thread
    background.start()
    assert state.thread is thread
    assert thread.daemon
    background.stop(5)
    assert not thread.is_alive()
    background.stop(5)
    background.start()
    assert state.thread is not thread
    wait_until(lambda: state.worker.ready.is_set(), "the second worker is ready")


def test_start_needs_an_app() -> None:
    for kind in (BackgroundTaskWorker, BlockingTaskWorker):
        with pytest.raises(NotInitialisedError, match="no app yet"):
            kind().start()
    with pytest.raises(NotImplementedError, match="use BackgroundTaskWorker or Blocking"):
        BaseTaskWorker(make_app()).start()


def test_each_app_of_a_background_worker_runs_its_own_tasks() -> None:
    worker = BackgroundTaskWorker()
    apps = [make_app("one"), make_app("two")]
    for app in apps:
        worker.init_app(app)

    @worker.define_task
    def where() -> str:
        return current_app.name

    worker.start()
    try:
        for app in apps:
            with app.app_context():
                assert where.delay().get(timeout=5) == app.name
    finally:
        worker.stop(5)
        for app in apps:
            worker.task_app(app).close()


def test_the_process_that_only_watches_files_runs_no_tasks(
    background: BackgroundTaskWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    (app,) = background.apps()
    state = app.extensions["taskworker"]
    monkeypatch.setitem(sys.modules, "werkzeug._reloader", sys)  # as Werkzeug imports it
    monkeypatch.delenv("WERKZEUG_RUN_MAIN", raising=False)
    background.start()
    assert state.thread is None
    monkeypatch.setenv("WERKZEUG_RUN_MAIN", "true")  # as it marks the child that serves
    background.start()
    assert state.thread is not None


def test_a_failing_task_does_not_stop_the_worker(background: BackgroundTaskWorker) -> None:
    @background.define_task
    def divide(x: int) -> float:
        if x == 0:
            raise SystemExit(1)
        return 1 / x

    background.start()
    broken, fine = divide.delay(0), divide.delay(2)
    assert fine.get(timeout=5) == 0.5
    assert isinstance(broken.get(timeout=5, propagate=False), Exception)


def test_a_retry_runs_again_under_the_same_id(background: BackgroundTaskWorker) -> None:
    seen: list[tuple[str | None, int]] = []

    @background.define_task(bind=True)
    def flaky(self: Task[..., Any]) -> int:
        seen.append((self.request.id, self.request.retries))
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return self.request.retries

    background.start()
    handle = flaky.delay()
    assert handle.get(timeout=5) == 2
    assert seen == [(handle.id, 0), (handle.id, 1), (handle.id, 2)]


def test_a_blocking_worker_runs_until_it_is_stopped() -> None:
    app = make_app()
    worker = BlockingTaskWorker(app)

    @worker.define_task
    def inner() -> str:
        worker.start()  # running already: does nothing, rather than for ever
        return current_request().hostname or ""

    thread = threading.Thread(target=worker.start)
    thread.start()
    try:
        assert inner.delay().get(timeout=5).startswith("worker@")
        assert thread.is_alive()
    finally:
        worker.stop(5)
        thread.join(5)
        worker.task_app().close()
    assert not thread.is_alive()
    assert app.extensions["taskworker"].worker is None


def test_stopping_from_inside_a_task_ends_the_worker(background: BackgroundTaskWorker) -> None:
    @background.define_task
    def last() -> str:
        background.stop(5)
        return "done"

    background.start()
    (app,) = background.apps()
    handle = last.delay()
    assert handle.get(timeout=5) == "done"
    wait_until(lambda: not app.extensions["taskworker"].thread.is_alive(), "the worker ended")


def test_another_thread_may_send_without_a_context(background: BackgroundTaskWorker) -> None:
    @background.define_task
    def double(x: int) -> int:
        return 2 * x

    handles: list[Any] = []
    threads = [
        threading.Thread(target=lambda n=n: handles.append(double.delay(n))) for n in range(5)
    ]
    background.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert sorted(handle.get(timeout=5) for handle in handles) == [0, 2, 4, 6, 8]


# -- with Flask-SQLAlchemy ----------------------------------------------------------------


def test_the_session_of_flask_sqlalchemy_is_clean_for_each_task(tmp_path: Path) -> None:
    from flask_sqlalchemy import SQLAlchemy

    app = make_app(SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path / 'shop.db'}")
    db = SQLAlchemy(app)
    worker = BaseTaskWorker(app)
    sessions: list[Any] = []

    class Order(db.Model):  # type: ignore[name-defined,misc]
        id = db.Column(db.Integer, primary_key=True)
        state = db.Column(db.String)

    @worker.define_task
    def change(state: str, commit: bool, fail: bool) -> int:
        sessions.append(db.session())
        assert not db.session.dirty
        assert not db.session.new
        assert not db.session().in_transaction()
        order = db.session.get(Order, 1)
        assert order is not None
        order.state = state
        db.session.flush()
        if commit:
            db.session.commit()
        if fail:
            raise ValueError(state)
        return len(db.session.dirty)

    with app.app_context():
        db.create_all()
        db.session.add(Order(id=1, state="new"))
        db.session.commit()
    with run_worker(worker.task_app(), size=1):
        change.delay("forgotten", False, False).get(timeout=5)
        change.delay("failed", False, True).get(timeout=5, propagate=False)
        change.delay("paid", True, True).get(timeout=5, propagate=False)
        change.delay("after", False, False).get(timeout=5)
    assert len({id(session) for session in sessions}) == len(sessions) == 4
    with app.app_context():
        order = db.session.get(Order, 1)
        assert order is not None
        assert order.state == "paid"
        pool: Any = db.engine.pool
        assert pool.checkedout() == 1  # this context's own
        db.session.remove()
        assert pool.checkedout() == 0
        db.engine.dispose()
