"""A call as data: what to call, with which arguments and options, to be sent later.

A signature is a dictionary of plain values, in Celery's form, so that it can travel in a
message and be sent by whichever worker comes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, Union, cast

from ..exceptions import InvalidSignatureError, NotInitialisedError
from ..options import check_signature_options
from ..texts import safe_repr

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..app import TaskApp
    from ..result import AsyncResult
    from .plan import Planner
    from .stamping import StampingVisitor

R = TypeVar("R", covariant=True)
R2 = TypeVar("R2")

#: How a signature finds the app to send with.
AppSource = Union["TaskApp", Callable[[], "TaskApp"], None]

#: Options that a later call does not change: a member stays in its group.
_KEPT = frozenset({"group_id", "stamped_headers"})


class Signature(dict[str, Any], Generic[R]):
    """A call of one task, to be sent later.

    :param task: a task, its name, or a mapping with the keys of a signature.
    :param args: positional arguments; those of the call come in front of them.
    :param kwargs: keyword arguments; those of the call win.
    :param options: as for :meth:`Task.apply_async <flask_taskworker.Task.apply_async>`.
    :param immutable: whether the call's arguments, and the result of the task before it,
        are left out.
    :param app: the task worker to send with; a signature made by ``task.s()`` knows it.
    :raises InvalidSignatureError: if a mapping is no signature.
    """

    #: The value of ``subtask_type``.
    kind: ClassVar[str | None] = None
    _kinds: ClassVar[dict[str, type[Signature[Any]]]] = {}

    def __init_subclass__(cls, kind: str | None = None, **more: Any) -> None:
        super().__init_subclass__(**more)
        if kind is not None:
            cls.kind = kind
            Signature._kinds[kind] = cls

    def __init__(
        self,
        task: Any,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        subtask_type: str | None = None,
        immutable: bool = False,
        app: Any = None,
        **more: Any,
    ) -> None:
        if isinstance(task, Mapping):
            super().__init__(checked(task))
        else:
            name = task if isinstance(task, str) else task.name
            if app is None and not isinstance(task, str):
                app = task._locate
            super().__init__(
                task=name,
                args=tuple(args or ()),
                kwargs=dict(kwargs or {}),
                options={**(options or {}), **more},
                subtask_type=subtask_type or self.kind,
                immutable=immutable,
            )
        self._app: AppSource = source_of(app)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], app: Any = None) -> Signature[Any]:
        """The signature of a mapping, of the class that its ``subtask_type`` names.

        :raises InvalidSignatureError: if it is none.
        """
        known = checked(fields)
        kind = cls._kinds.get(known["subtask_type"] or "")
        if kind is None:
            return Signature(known, app=app)
        return kind._of(known, app)

    @classmethod
    def _of(cls, fields: dict[str, Any], app: Any) -> Signature[Any]:
        """A signature of this class from the six keys."""
        made = cls.__new__(cls)
        dict.update(made, fields)
        made._app = source_of(app)
        return made

    # -- what it holds --------------------------------------------------------------------

    @property
    def task(self) -> str:
        """The task's name."""
        return cast(str, self["task"])

    name = task

    @property
    def args(self) -> Sequence[Any]:
        return cast("Sequence[Any]", self["args"])

    @args.setter
    def args(self, value: Sequence[Any]) -> None:
        self["args"] = value

    @property
    def kwargs(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self["kwargs"])

    @kwargs.setter
    def kwargs(self, value: dict[str, Any]) -> None:
        self["kwargs"] = value

    @property
    def options(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self["options"])

    @options.setter
    def options(self, value: dict[str, Any]) -> None:
        self["options"] = value

    @property
    def immutable(self) -> bool:
        return bool(self["immutable"])

    @immutable.setter
    def immutable(self, value: bool) -> None:
        self["immutable"] = value

    @property
    def subtask_type(self) -> str | None:
        return cast("str | None", self["subtask_type"])

    @property
    def id(self) -> str | None:
        """The id that the call will have, once it is frozen or was given one."""
        return cast("str | None", self.options.get("task_id"))

    @id.setter
    def id(self, value: str | None) -> None:
        self.options["task_id"] = value

    @property
    def app(self) -> TaskApp:
        """What it is sent with.

        :raises NotInitialisedError: if it does not know any.
        """
        source = self._source()
        if source is None:
            raise NotInitialisedError(
                f"the signature of {self.task!r} knows no app to be sent with. Make it with "
                "task.s(), or name one: signature(..., app=task_worker)"
            )
        return source() if callable(source) else source

    def _source(self) -> AppSource:
        return self._app

    # -- changing it ----------------------------------------------------------------------

    def set(self, immutable: bool | None = None, **options: Any) -> Self:
        """Add options to those it has; returns itself.

        :raises UnknownOptionError: for an option that does not exist.
        :raises InvalidOptionError: for a value that an option cannot have.
        """
        if immutable is not None:
            self.set_immutable(immutable)
        self._check_options(options)
        self.options.update(options)
        return self

    def set_immutable(self, immutable: bool) -> None:
        """Whether it leaves out the arguments of the call."""
        self.immutable = immutable

    def clone(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """A copy with more arguments and options, merged as a call would."""
        merged = self._merged(args or (), kwargs or {}, options)
        fields = dict(self)
        fields["args"], fields["kwargs"] = tuple(merged[0]), dict(merged[1])
        fields["options"] = copied(merged[2])
        return cast("Self", type(self)._of(fields, self._app))

    def replace(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Self:
        """A copy with other arguments or options."""
        changed = self.clone()
        if args is not None:
            changed.args = args
        if kwargs is not None:
            changed.kwargs = dict(kwargs)
        if options is not None:
            changed.options = dict(options)
        return changed

    def link(self, callback: Signature[Any]) -> Signature[Any]:
        """Send ``callback`` with the result once the task has succeeded; returns it."""
        return self._append("link", callback)

    def link_error(self, errback: Signature[Any]) -> Signature[Any]:
        """Call ``errback`` if the task fails; returns it."""
        return self._append("link_error", errback)

    def on_error(self, errback: Signature[Any]) -> Self:
        """As :meth:`link_error`, but returns itself."""
        self.link_error(errback)
        return self

    def stamp(
        self, visitor: StampingVisitor | None = None, append_stamps: bool = False, **headers: Any
    ) -> Self:
        """Put headers on this call, on all calls in it and on its callbacks; returns itself.

        :param visitor: chooses more of them for each part.
        :param append_stamps: whether a stamp that is there becomes a list, or is replaced.
        """
        from .stamping import stamp

        stamp(self, visitor, append_stamps, headers)
        return self

    def _append(self, option: str, signature: Signature[Any]) -> Signature[Any]:
        linked = listed(self.options.get(option))
        if signature not in linked:
            linked.append(signature)
        self.options[option] = linked
        return signature

    def _merged(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Mapping[str, Any], dict[str, Any]]:
        """Arguments and options of a call with these on top."""
        mine = self.options
        kept = _KEPT.union(mine.get("stamped_headers") or ())
        merged = {**mine, **{k: v for k, v in options.items() if k not in kept or k not in mine}}
        if self.immutable:
            return self.args, self.kwargs, merged
        return (
            (*args, *self.args) if args else self.args,
            {**self.kwargs, **kwargs} if kwargs else self.kwargs,
            merged,
        )

    # -- sending it -----------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task inline, in this thread, and return what it returns."""
        merged = self._merged(args, kwargs, {})
        return self.app.registry[self.task](*merged[0], **merged[1])

    def delay(self, *args: Any, **kwargs: Any) -> AsyncResult[R]:
        """Send it with these arguments in front of its own."""
        return self.apply_async(args, kwargs)

    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> AsyncResult[R]:
        """Send it.

        :param args: come in front of its own arguments, unless it is immutable.
        :param kwargs: win over its own, unless it is immutable.
        :param options: win over its own; see :class:`~flask_taskworker.options.CallOptions`.
        :return: a handle to the result.
        :raises TaskArgumentError: if the arguments do not fit the function.

        Raises further what :meth:`Task.apply_async <flask_taskworker.Task.apply_async>` raises.
        """
        self._check_options(options)
        handle: AsyncResult[R] = self.app.launch(self, args or (), kwargs or {}, options)
        return handle

    def freeze(
        self,
        task_id: str | None = None,
        group_id: str | None = None,
        chord: Signature[Any] | None = None,
        root_id: str | None = None,
        parent_id: str | None = None,
        group_index: int | None = None,
    ) -> AsyncResult[R]:
        """Give it the id that its call will have. Send a frozen signature once.

        :return: the handle to the result that the call will have.
        """
        options, app = self.options, self.app
        if not options.get("task_id"):
            options["task_id"] = task_id or app.new_id()
        options.setdefault("reply_to", app.reply_to())
        if group_id:
            options.setdefault("group_id", group_id)
        for name, value in (("root_id", root_id), ("parent_id", parent_id), ("chord", chord),
                            ("group_index", group_index)):  # fmt: skip
            if value is not None:
                options[name] = value
        return app.result(str(options["task_id"]))

    def plan(
        self,
        planner: Planner,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Add what sending it takes to a plan, and return the handle to its result."""
        return planner.call(self.task, *self._merged(args, kwargs or {}, options or {}))

    def _check_options(self, options: Mapping[str, Any]) -> None:
        check_signature_options(options, stamps=options.get("stamped_headers") or ())

    def size(self) -> int:
        """How many tasks have to end before it is done, as far as a chord has to count."""
        return 1

    # -- as part of others ----------------------------------------------------------------

    def __or__(self, other: Signature[R2]) -> Signature[R2]:  # type: ignore[override]
        """Chain: ``other`` gets the result of this one as its first argument."""
        if not isinstance(other, Signature):
            return NotImplemented
        from .chains import join

        return join([self.clone()], other)

    __ior__ = __or__  # type: ignore[assignment]

    def __invert__(self) -> R:
        """Send it, and wait for the result."""
        return self.apply_async().get()

    def reprcall(self, *args: Any, **kwargs: Any) -> str:
        """The call in words: ``add(2, 2)``."""
        shown = [safe_repr(arg) for arg in (*args, *self.args)]
        shown += [f"{name}={safe_repr(v)}" for name, v in {**self.kwargs, **kwargs}.items()]
        return f"{self.task}({', '.join(shown)})"

    def __repr__(self) -> str:
        return self.reprcall()

    def __deepcopy__(self, memo: Any) -> Self:
        return self.clone()

    def __reduce__(self) -> tuple[Any, ...]:
        return Signature.from_dict, (plain(self),)


def signature(task: Any, *args: Any, **kwargs: Any) -> Signature[Any]:
    """A signature of a task, of its name, or of a mapping; one that is given is copied."""
    if isinstance(task, Signature):
        return task.clone()
    if isinstance(task, Mapping):
        return Signature.from_dict(task, app=kwargs.get("app"))
    return Signature(task, *args, **kwargs)


def maybe_signature(value: Any, app: Any = None, clone: bool = False) -> Any:
    """A signature of a mapping; None stays None.

    :param app: what it is to be sent with, if it does not know.
    :param clone: whether to copy what is a signature already.
    """
    if value is None:
        return None
    if isinstance(value, Signature):
        value = value.clone() if clone else value
        if app is not None and value._app is None:
            value._app = source_of(app)
        return value
    return Signature.from_dict(value, app=app)


def checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The six keys of a mapping that may come from outside, each of its type.

    :raises InvalidSignatureError: saying what is wrong with it.
    """
    if not isinstance(fields, Mapping):
        raise InvalidSignatureError(f"{safe_repr(fields)[:80]} is no signature, not even a mapping")
    task = fields.get("task")
    if not isinstance(task, str) or not task:
        raise InvalidSignatureError(f"the signature {safe_repr(dict(fields))[:80]} names no task")
    found: dict[str, Any] = {"task": task}
    for key, types, default in _PARTS:
        value = fields.get(key)
        if value is None:
            value = default() if default else None
        elif not isinstance(value, types):
            raise InvalidSignatureError(
                f"the signature of {task!r} has {key} {safe_repr(value)[:80]}, not a "
                f"{types[-1].__name__}"
            )
        found[key] = value
    found["immutable"] = bool(fields.get("immutable", False))
    return found


_PARTS: tuple[tuple[str, tuple[type, ...], Callable[[], Any] | None], ...] = (
    ("args", (tuple, list), list),
    ("kwargs", (dict,), dict),
    ("options", (dict,), dict),
    ("subtask_type", (str,), None),
)


def source_of(app: Any) -> AppSource:
    """A way to the task app, of whatever names one: it, a task worker, a function."""
    return getattr(app, "task_app", app) if app is not None else None


def listed(value: Any) -> list[Any]:
    """One, several or no signatures as a new list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def copied(value: Any) -> Any:
    """A copy of options, with the signatures in them."""
    if isinstance(value, Signature):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(item) for item in value]
    return value


def plain(value: Any) -> Any:
    """The same with plain dictionaries in place of signatures, for serializers that care."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
