"""The tasks that every Celery worker has: messages of other programs name them.

Most apps never run one, so each loads the canvas by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .exceptions import Retry
from .registry import Registry
from .task import Task

if TYPE_CHECKING:
    from .app import TaskApp
    from .options import TaskOptions

#: How often a chord that polls looks at its header, if its sender names no time. Seconds.
UNLOCK_INTERVAL = 1.0


def register_builtins(registry: Registry, locate: Callable[[], TaskApp]) -> None:
    """Add the built-in tasks to a registry, unlisted."""
    for name, (function, more) in _BUILTINS.items():
        options: TaskOptions = {"name": name, **more}  # type: ignore[typeddict-item]
        registry.add_builtin(Task(function, locate, bind=True, options=options))


def _accumulate(self: Task[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Ends a group that takes the place of a task: gives what the group gave."""
    index = kwargs.get("index")
    return args[index] if index is not None else list(args)


def _backend_cleanup(self: Task[..., Any]) -> None:
    """Delete all results that have expired."""
    backend = self._locate().backend
    while backend.cleanup():
        pass


def _map(self: Task[..., Any], task: Any, it: Sequence[Any]) -> list[Any]:
    called = self._locate().registry[_named(task)]
    return [called(item) for item in it]


def _starmap(self: Task[..., Any], task: Any, it: Sequence[Sequence[Any]]) -> list[Any]:
    called = self._locate().registry[_named(task)]
    return [called(*item) for item in it]


def _named(task: Any) -> str:
    from .canvas import maybe_signature

    return str(maybe_signature(task).task)


def _chunks(self: Task[..., Any], task: Any, it: Sequence[Any], n: int) -> Any:
    from .canvas import chunks, maybe_signature

    app = self._locate()
    return chunks(maybe_signature(task, app), it, n, app).apply_async().as_tuple()


def _group(
    self: Task[..., Any],
    tasks: Sequence[Any],
    result: Any = None,
    group_id: str | None = None,
    partial_args: Sequence[Any] = (),
    **more: Any,
) -> Any:
    from .canvas import Group

    options = {"task_id": group_id} if group_id else {}
    return Group(tasks, app=self._locate(), **options).apply_async(partial_args).as_tuple()


def _chain(self: Task[..., Any], *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("a chain is no task: its first step is what is sent")


def _chord(
    self: Task[..., Any], header: Any, body: Any, partial_args: Sequence[Any] = (), **more: Any
) -> Any:
    from .canvas import Chord

    return Chord(header, body, app=self._locate()).apply_async(partial_args).as_tuple()


def _chord_unlock(
    self: Task[..., Any],
    group_id: str,
    callback: Mapping[str, Any],
    interval: float | None = None,
    max_retries: int | None = None,
    result: Sequence[Any] = (),
    **more: Any,
) -> None:
    """Look whether a header is done, and send the body; a Celery client asks for it in databases.

    Our own chords do not need it: they count.
    """
    from .canvas import maybe_signature
    from .canvas.aftermath import Aftermath, chord_error_of
    from .result import GroupResult, result_from_tuple

    app = self._locate()
    header = GroupResult(
        group_id, [result_from_tuple(shape, app.backend) for shape in result], app.backend
    )
    aftermath = Aftermath(app)
    if not header.ready():
        pause = UNLOCK_INTERVAL if interval is None else interval
        try:
            self.retry(countdown=pause, max_retries=max_retries)
        except Retry:
            raise
        except Exception as exc:
            aftermath.fail_body(callback, chord_error_of(f"chord_unlock gave up: {exc!r}", exc))
            raise
    failed = next((handle for handle in header if handle.failed()), None)
    if failed is None:
        maybe_signature(callback, app).apply_async((header.get(timeout=0),))
        return
    error = failed.get(timeout=0, propagate=False)
    text = f"Dependency {failed.id} raised {error!r}"
    aftermath.fail_body(callback, chord_error_of(text, error))


_BUILTINS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "celery.accumulate": (_accumulate, {}),
    "celery.backend_cleanup": (_backend_cleanup, {"ignore_result": True}),
    "celery.chain": (_chain, {}),
    "celery.chord": (_chord, {}),
    "celery.chord_unlock": (_chord_unlock, {"max_retries": None, "ignore_result": True}),
    "celery.chunks": (_chunks, {}),
    "celery.group": (_group, {}),
    "celery.map": (_map, {}),
    "celery.starmap": (_starmap, {}),
}
