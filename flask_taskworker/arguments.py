"""Checks a call's arguments against the task's signature before anything is queued."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .exceptions import TaskArgumentError, TaskDefinitionError

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Signature:
    """What a task can be called with.

    :param function: the task's function.
    :param bound: whether its first parameter is the task itself.
    :raises TaskDefinitionError: if it is to be bound, but has no place for the task.
    """

    def __init__(self, function: Callable[..., Any], bound: bool = False) -> None:
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # some builtins have none: nothing to check
            signature = inspect.Signature(
                [
                    inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
                    inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
                ]
            )
        parameters = list(signature.parameters.values())
        if bound:
            parameters = _without_task(parameters, function)
        self._signature = signature.replace(
            parameters=parameters, return_annotation=inspect.Signature.empty
        )
        positional = [p for p in parameters if p.kind in _POSITIONAL]
        self._most = len(positional)
        self._least = sum(p.default is inspect.Parameter.empty for p in positional)
        self._any_positional = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        self._only_positional = not any(
            p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters
        )

    def takes_one_positional(self) -> bool:
        """Whether a call with a single positional argument could fit."""
        return self._any_positional or self._most >= 1

    def free_positional(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
        """How many positional arguments a call may have in front of these; it may be infinite."""
        if self._any_positional:
            return float("inf")
        named = sum(p.name in kwargs for p in self._signature.parameters.values()
                    if p.kind is p.POSITIONAL_OR_KEYWORD)  # fmt: skip
        return self._most - len(args) - named

    def check(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Check one call.

        :param name: the task's name, for the error's text.
        :raises TaskArgumentError: if it does not fit.
        """
        if (
            not kwargs
            and self._only_positional
            and self._least <= len(args)
            and (len(args) <= self._most or self._any_positional)
        ):
            return  # the usual call, without the cost of binding it
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as exc:
            raise TaskArgumentError(f"{name}{self._signature}: {exc}") from None


def _without_task(
    parameters: list[inspect.Parameter], function: Callable[..., Any]
) -> list[inspect.Parameter]:
    first = parameters[0] if parameters else None
    if first is not None and first.kind in _POSITIONAL:
        return parameters[1:]
    if first is not None and first.kind is first.VAR_POSITIONAL:
        return parameters
    raise TaskDefinitionError(
        f"bind=True gives the task to {getattr(function, '__name__', function)!r} as its first "
        "argument, but it takes none. Write def name(self, ...) or leave bind out."
    )
