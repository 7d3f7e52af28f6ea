"""What a launch has to do, before any of it is done: which messages to send, which chords to open.

A plan is plain data. The client carries it out at once, a worker together with what it settles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, NamedTuple

from ..calls import compose
from ..exceptions import InvalidSignatureError
from ..fields import moment
from ..message import TaskMessage
from .signature import listed, plain

if TYPE_CHECKING:
    from ..app import TaskApp
    from ..options import CallOptions, TaskOptions
    from ..result import AsyncResult
    from ..task import Task


class Planned(NamedTuple):
    """One message to be sent, and how."""

    message: TaskMessage
    queue: str
    serializer: str | None = None
    compression: str | None = None
    retry: bool = True
    retry_policy: Mapping[str, float] | None = None


class OpenChord(NamedTuple):
    """A chord whose header is about to be sent.

    ``size`` is how many tasks have to end before its body is sent. ``header`` is the
    header's result as a tuple where it is nested, so that the body gets it in that shape.
    """

    group_id: str
    size: int
    header: Any = None


@dataclass
class Plan:
    """What a launch has to do, in this order: open the chords, send the messages."""

    messages: list[Planned] = field(default_factory=list)
    chords: list[OpenChord] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.messages or self.chords)


class Planner:
    """Collects a plan.

    :param app: whose tasks, defaults and settings count.
    :param parent_id: the run that sends; None leaves it to the one that is going on.
    :param root_id: the first run of all that led here.
    :param check: whether to check arguments against the signatures of tasks that are known
        here. A worker leaves that to the run it sends.
    """

    def __init__(
        self,
        app: TaskApp,
        parent_id: str | None = None,
        root_id: str | None = None,
        *,
        check: bool = False,
    ) -> None:
        self.app = app
        self.plan = Plan()
        self._parent_id, self._root_id = parent_id, root_id
        self._check = check

    def open_chord(self, group_id: str, size: int, header: Any) -> None:
        """Have a chord opened before anything is sent.

        :raises ChordNotSupportedError: if the result backend cannot count its tasks.
        """
        self.app.backend.ensure_chords()
        self.plan.chords.append(OpenChord(group_id, size, header))

    def call(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> AsyncResult[Any]:
        """Add the call of one task.

        :param options: as a signature has them; those that mean nothing here are left out.
        """
        app = self.app
        task: Task[..., Any] | _Stranger = app.registry.get(name) or _Stranger(name)
        if self._check and not isinstance(task, _Stranger):
            task._signature.check(name, args, kwargs)
        message = compose(
            task, args, kwargs, _call_options(options), app.config,
            options.get("reply_to") or app.reply_to(),
        )  # fmt: skip
        message = self._related(message, options)
        serializer = options.get("serializer") or task.options_.get("serializer")
        if (serializer or app.config.serializer) != "json":  # that one takes subclasses of dict
            payload = message.payload
            message = message.copy(payload=payload._replace(**{
                name: plain(getattr(payload, name)) for name in payload._fields
            }))  # fmt: skip
        self.plan.messages.append(
            Planned(
                message,
                queue_of(options) or task.options_.get("queue") or app.config.default_queue,
                serializer,
                options.get("compression", task.options_.get("compression")),
                bool(options.get("retry", True)),
                options.get("retry_policy"),
            )
        )
        return app.result(message.id)

    def _related(self, message: TaskMessage, options: Mapping[str, Any]) -> TaskMessage:
        """The message with its place among others."""
        payload = message.payload._replace(
            callbacks=listed(options.get("link")) or None,
            errbacks=listed(options.get("link_error")) or None,
            chain=options.get("chain"),
            chord=options.get("chord"),
        )
        limits = (options.get("time_limit"), options.get("soft_time_limit"))
        stamped = options.get("stamped_headers")
        return message.copy(
            payload=payload,
            root_id=options.get("root_id") or self._root_id or message.root_id,
            parent_id=options.get("parent_id") or self._parent_id or message.parent_id,
            group=options.get("group_id"),
            group_index=options.get("group_index"),
            retries=options.get("retries") or 0,
            timelimit=limits if any(limits) else message.timelimit,
            replaced_task_nesting=options.get("replaced_task_nesting") or 0,
            stamped_headers=None if stamped is None else sorted(stamped),
            stamps={name: _stamp(options.get(name)) for name in stamped or ()},
        )


class _Stranger:
    """A task that is defined elsewhere: it has a name and no defaults."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.options_: TaskOptions = {}


def queue_of(options: Mapping[str, Any]) -> str | None:
    """The queue that options name: by itself, or as the key of a direct exchange."""
    queue = options.get("queue") or options.get("routing_key")
    name = getattr(queue, "name", queue)  # kombu's Queue
    return name if isinstance(name, str) and name else None


def _call_options(options: Mapping[str, Any]) -> CallOptions:
    """The options that one call understands, each of its type."""
    call: dict[str, Any] = {
        name: options[name] for name in _PASSED if options.get(name) is not None
    }
    for name in ("eta", "expires"):
        if name in call:
            call[name] = _aware(call[name], name)
    return call  # type: ignore[return-value]


_PASSED = (
    "countdown", "eta", "expires", "task_id", "priority", "headers", "ignore_result", "shadow",
)  # fmt: skip


def _aware(value: Any, name: str) -> float | timedelta | datetime | None:
    """A time as options out of a message have it: a naive one means UTC."""
    if isinstance(value, str):
        return moment(value, name)
    if isinstance(value, datetime) and value.tzinfo is None:
        return value.replace(tzinfo=timezone.utc)
    if not isinstance(value, (int, float, timedelta, datetime)):
        raise InvalidSignatureError(f"a signature has {name}={value!r}, which is no time")
    return value


def _stamp(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def planned_for(
    app: TaskApp,
    signatures: Iterable[Any],
    args: Sequence[Any],
    parent_id: str,
    root_id: str,
) -> tuple[Plan, list[Any]]:
    """The plan of sending signatures from inside a worker, and the handles to their results."""
    planner = Planner(app, parent_id, root_id)
    return planner.plan, [signature.plan(planner, args) for signature in signatures]
