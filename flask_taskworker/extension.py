"""The Flask side: the extension objects, and what each app keeps of them."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    Protocol,
    TypeGuard,
    TypeVar,
    cast,
    overload,
)

from flask import Flask, current_app, has_app_context

from .app import TaskApp
from .builtin_tasks import register_builtins
from .config import Config, write_defaults
from .contexts import execution_context
from .exceptions import (
    BrokerError,
    ConfigurationError,
    NotInitialisedError,
    TaskDefinitionError,
    TaskWorkerError,
    WorkerError,
)
from .registry import Registry, main_module_name
from .reloader import is_loading, may_become_reloader, watches_for_reloader
from .result import GroupResult
from .task import Task, current_request

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .control import Control
    from .options import TaskOptions
    from .result import AsyncResult
    from .worker.pools.source import AppSource
    from .worker.supervisor import Worker

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound=Task[..., Any])


class _Definition(Protocol):
    """What ``define_task(...)`` with options returns; a task gives what its coroutine gives."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...


class _BoundDefinition(Protocol):
    """The same with ``bind=True``: the caller does not give the first parameter."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[Task[..., Any], P], Coroutine[Any, Any, R]], /
    ) -> Task[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Task[..., Any], P], R], /) -> Task[P, R]: ...


log = logging.getLogger("flask_taskworker")

#: The key of this extension in ``app.extensions``.
EXTENSION = "taskworker"
#: How long a Background worker waits before it starts in a program that may turn out to be
#: the watching parent of Werkzeug's reloader. Seconds.
_RELOADER_GRACE = 0.1


class AppState:
    """What the extension keeps for one app, as ``app.extensions["taskworker"]``."""

    def __init__(self, extension: BaseTaskWorker, task_app: TaskApp) -> None:
        self.extension = extension
        self.task_app = task_app
        self.worker: Worker | None = None
        self.thread: threading.Thread | None = None
        self.pid = os.getpid()
        self.lock = threading.Lock()


class BaseTaskWorker:
    """Registers tasks and sends them. See its two kinds, which differ in ``start()``.

    :param app: the app to set up at once; without it call :meth:`init_app` later. One
        extension may serve several apps, each with its own settings.

    Which app a call belongs to: the app given here, else Flask's ``current_app``, else
    the only app that was initialised.
    """

    def __init__(self, app: Flask | None = None) -> None:
        self.registry = Registry()
        register_builtins(self.registry, self.task_app)
        self._own_app: weakref.ref[Flask] | None = None
        self._apps: weakref.WeakSet[Flask] = weakref.WeakSet()
        # The latest app is kept alive, and no other: create_app() may be called for its
        # effect, with start() to follow.
        self._latest_app: Flask | None = None
        if app is not None:
            self.init_app(app)
            self._own_app = weakref.ref(app)

    def init_app(self, app: Flask) -> None:
        """Set up an app: check its settings, write the defaults into ``app.config``.

        Settings that are changed afterwards are not seen. The keys are described in
        :class:`~flask_taskworker.config.Config`.

        :raises ConfigurationError: naming every fault there is.
        """
        if EXTENSION in app.extensions:
            raise TaskWorkerError(
                f"app {app.name!r} has a task worker already. Create one worker object, "
                "import it everywhere, and call init_app(app) once for each app."
            )
        config = Config.from_mapping(
            app.config, debug=app.debug, instance_path=app.instance_path, testing=app.testing
        )
        write_defaults(app.config, config)
        _make_instance_folder(app, config)
        task_app = TaskApp(config, self.registry, execution_context(app))
        app.extensions[EXTENSION] = AppState(self, task_app)
        self._apps.add(app)
        self._latest_app = app
        if config.debug:
            _show_debug_log()

    # -- defining tasks -------------------------------------------------------------------

    @overload
    def define_task(self, function: type[T], /) -> T: ...
    @overload
    def define_task(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def define_task(self, function: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def define_task(
        self,
        *,
        bind: Literal[True],
        base: type[Task[..., Any]] = ...,
        **options: Unpack[TaskOptions],
    ) -> _BoundDefinition: ...
    @overload
    def define_task(
        self,
        *,
        bind: Literal[False] = ...,
        base: type[Task[..., Any]] = ...,
        **options: Unpack[TaskOptions],
    ) -> _Definition: ...

    def define_task(  # type: ignore[misc]  # mypy does not match **Any with Unpack[TypedDict]
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        bind: bool = False,
        base: type[Task[..., Any]] = Task,
        **options: Any,
    ) -> Any:
        """Make a task of a function, or of a subclass of ``Task`` that has a ``run``.

        Use it bare or with options.

        ::

            @task_worker.define_task
            def send_email(to): ...

            @task_worker.define_task(queue="reports", bind=True, max_retries=5)
            def build_report(self, number): ...

        :param bind: give the task itself to the function as its first argument.
        :param base: the class of the task, for hooks and a ``__call__`` of your own; see
            :class:`~flask_taskworker.task.Task`.
        :param options: see :class:`~flask_taskworker.options.TaskOptions`.
        :return: the :class:`~flask_taskworker.task.Task`.
        :raises UnknownOptionError: for an option that does not exist.
        :raises InvalidOptionError: for a value that an option cannot have.
        :raises DuplicateTaskError: if another function has the name already.
        """

        def define(function: Callable[..., Any]) -> Task[..., Any]:
            checked = cast("TaskOptions", options)  # Task() checks them
            body, kind = (None, function) if _is_task_class(function) else (function, base)
            task: Task[..., Any] = kind(body, self.task_app, bind=bind, options=checked)
            self.registry.add(task)
            return task

        if not _is_task_class(base):
            raise TaskDefinitionError(f"define_task(base={base!r}): must be a subclass of Task")

        if function is None:
            return define
        if options or bind or base is not Task:
            raise TaskDefinitionError("define_task takes a function or options, not both")
        return define(function)

    def signature(self, task: str | Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """A call of a task by its name, or one that was stored as a mapping.

        :param args: and ``kwargs``, ``options`` and ``immutable`` by name: as
            :class:`~flask_taskworker.canvas.Signature` takes them.
        """
        from .canvas.signature import signature

        return signature(task, *args, app=self, **options)

    def GroupResult(self, group_id: str) -> GroupResult | None:
        """The handle to a group that was saved, by its id; None if there is none."""
        task_app = self.task_app()
        return GroupResult.restore(group_id, task_app.backend, task_app)

    def AsyncResult(self, task_id: str) -> AsyncResult[Any]:
        """The handle to the result of an earlier call, by its id."""
        return self.task_app().result(task_id)

    @property
    def control(self) -> Control:
        """Remote control of the workers: inspect them, steer them, revoke tasks."""
        return self.task_app().control

    # -- finding the app ------------------------------------------------------------------

    def task_app(self, app: Flask | None = None) -> TaskApp:
        """The :class:`~flask_taskworker.app.TaskApp` of an app, or of the one in charge.

        :raises NotInitialisedError: if there is none, or more than one to choose from.
        """
        return self.state(app).task_app

    def state(self, app: Flask | None = None) -> AppState:
        """What this extension keeps for an app; raises as :meth:`task_app`."""
        app = app or self._app_in_charge()
        state = app.extensions.get(EXTENSION)
        if state is None or state.extension is not self:
            raise NotInitialisedError(
                f"app {app.name!r} is not set up for this task worker. "
                "Call task_worker.init_app(app) where the app is made."
            )
        assert isinstance(state, AppState)
        return state

    def apps(self) -> list[Flask]:
        """The apps that were initialised and are still alive."""
        return list(self._apps)

    def _app_in_charge(self) -> Flask:
        if self._own_app is not None:
            app = self._own_app()
            if app is not None:
                return app
        if has_app_context():
            app = current_app._get_current_object()  # type: ignore[attr-defined]
            if app in self._apps:
                return app  # type: ignore[no-any-return]
        apps = list(self._apps)
        if len(apps) == 1:
            return apps[0]
        raise NotInitialisedError(
            "this task worker has no app yet. Pass it to the constructor, or call "
            "task_worker.init_app(app) first."
            if not apps
            else f"this task worker serves {len(apps)} apps "
            f"({', '.join(sorted(a.name for a in apps))}). Call it inside app.app_context()."
        )

    def start(self) -> None:
        """Start to run tasks. What that means is up to the subclass."""
        raise NotImplementedError("use BackgroundTaskWorker or BlockingTaskWorker")

    def stop(self, drain_timeout: float | None = None) -> None:
        """Stop running tasks. Does nothing if none is running.

        :param drain_timeout: seconds for running tasks to end; the default is
            ``TASKER_DRAIN_TIMEOUT``. What still runs then goes back to its queue.
        """
        for app in list(self._apps):
            state: AppState = app.extensions[EXTENSION]
            worker, thread = state.worker, state.thread
            if worker is None or state.pid != os.getpid():
                continue
            worker.stop(drain_timeout)
            inside_a_task = not current_request().called_directly  # the worker waits for that one
            if thread is not None and not inside_a_task:
                seconds = drain_timeout
                if seconds is None:
                    seconds = state.task_app.config.drain_timeout
                thread.join(seconds + 5.0)


class BackgroundTaskWorker(BaseTaskWorker):
    """Runs the tasks in threads of this process; ``start()`` returns at once.

    Under Werkzeug's reloader it starts in the serving process only. In a server that
    forks, call ``start()`` in each process that should run tasks: they compete safely,
    and a child never uses a connection of its parent.
    """

    def start(self) -> None:
        """Start the worker's threads, for each app that was initialised. Idempotent.

        :raises NotInitialisedError: if no app was.
        """
        if not self._apps:
            self._app_in_charge()  # raises
        if watches_for_reloader() or is_loading():
            return
        for app in list(self._apps):
            self._start_one(app.extensions[EXTENSION], app)

    def _start_one(self, state: AppState, app: Flask) -> None:
        if state.pid != os.getpid():  # a forked child: nothing of the parent's worker runs here
            state.worker = state.thread = None
            state.lock = threading.Lock()
            state.pid = os.getpid()
        with state.lock:
            if state.thread is not None and state.thread.is_alive():
                return
            from .worker.supervisor import Worker

            worker = state.worker = Worker(state.task_app, source=_source_of(app))
            grace = _RELOADER_GRACE if may_become_reloader() else 0.0
            state.thread = threading.Thread(
                target=_run_in_background, args=(worker, grace), name="taskworker", daemon=True
            )
            state.thread.start()
        _stop_at_exit(self)


class BlockingTaskWorker(BaseTaskWorker):
    """Runs the tasks in this process and nothing else; ``start()`` blocks.

    For a process, or a machine, of its own. The web process makes the same object and
    never calls ``start()``.
    """

    def start(self) -> None:
        """Run tasks until SIGINT or SIGTERM, or until :meth:`stop` from another thread.

        The first signal lets running tasks end, the second stops at once.

        :raises NotInitialisedError: if no app was initialised, or it is unclear which is meant.
        """
        from .worker.supervisor import Worker, os_signals

        app = self._app_in_charge()
        state = self.state(app)
        if is_loading():
            return  # a child process of a worker, which only needs the tasks
        if state.worker is not None and state.pid == os.getpid():
            return  # running already: a call from inside a task
        worker = state.worker = Worker(state.task_app, source=_source_of(app))
        state.pid = os.getpid()
        try:
            if threading.current_thread() is threading.main_thread():
                with os_signals(worker):
                    worker.run()
            else:
                worker.run()
        finally:
            state.worker = None


def _is_task_class(value: object) -> TypeGuard[type[Task[..., Any]]]:
    return isinstance(value, type) and issubclass(value, Task)


def flask_app_of(task_app: TaskApp) -> Flask:
    """The Flask app that a :class:`~flask_taskworker.app.TaskApp` belongs to."""
    with task_app.execution_context(False):
        return current_app._get_current_object()  # type: ignore[attr-defined,no-any-return]


def shell_names(task_app: TaskApp, *, with_tasks: bool = True) -> dict[str, Any]:
    """What an interactive session finds: Flask's own names, ``task_worker`` and the tasks.

    :param with_tasks: also each task under the last part of its name; a name that is
        there already wins.
    """
    app = flask_app_of(task_app)
    registry = task_app.registry
    short = {name.rpartition(".")[2]: task for name, task in registry.items()}
    return {
        **(short if with_tasks else {}),
        **app.make_shell_context(),
        "app": app,
        "task_worker": app.extensions[EXTENSION].extension,
        "tasks": registry,
    }


def override(task_app: TaskApp, settings: Mapping[str, object]) -> None:
    """Change settings of an app that is set up already, as the command line may.

    :param settings: ``TASKER_*`` keys; they are written into ``app.config`` as well.
    :raises ConfigurationError: naming every fault there is; then nothing is changed.
    """
    if not settings:
        return
    app = flask_app_of(task_app)
    config = Config.from_mapping(
        {**app.config, **settings},
        debug=app.debug,
        instance_path=app.instance_path,
        testing=app.testing,
    )
    app.config.update(settings)
    task_app.reconfigure(config)


def _make_instance_folder(app: Flask, config: Config) -> None:
    """Make the instance folder if the queue or the results are to be in it: Flask does not."""
    inside = f":///{app.instance_path}{os.sep}"
    if not any(inside in (url or "") for url in (config.broker_url, config.result_backend)):
        return
    try:
        os.makedirs(app.instance_path, exist_ok=True)
    except OSError as exc:
        raise ConfigurationError(
            f"the instance folder {app.instance_path} cannot be made: {exc.strerror or exc}. Set "
            "TASKER_DATABASE_URI to a file in a folder that this process may write to, or give "
            "Flask another instance_path."
        ) from exc


def _source_of(app: Flask) -> AppSource | None:
    """Where a child process finds the app, if the app's name tells: its module."""
    from .worker.pools.source import AppSource

    name = app.import_name
    if name == "__main__":
        name = main_module_name()
    if name == "__main__":
        return None
    return AppSource("flask_taskworker.target:from_target", name)


def _run_in_background(worker: Worker, grace: float) -> None:
    if grace:
        threading.Event().wait(grace)
        if watches_for_reloader():
            return
    try:
        worker.run()
    except (BrokerError, WorkerError) as exc:
        log.error("no task will run here: %s", exc)


def _stop_at_exit(extension: BaseTaskWorker) -> None:
    reference = weakref.ref(extension)

    def stop() -> None:
        alive = reference()
        if alive is not None:
            alive.stop()

    atexit.register(stop)


def _show_debug_log() -> None:
    """Show our log where nobody else does, as Flask shows its own in debug mode."""
    log.setLevel(logging.DEBUG)
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)s %(name)s: %(message)s"))
        log.addHandler(handler)
