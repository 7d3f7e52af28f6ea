"""Drives the steps of a run, in a thread or on an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

from .limits import Limits, limited

T = TypeVar("T")
#: Steps yield a coroutine to await or an :class:`Aside`, and end with a value.
Steps = Generator[Any, Any, T]


class Aside(NamedTuple):
    """A step that may block: an event loop has a thread do it."""

    action: Callable[[], Any]


def drive(steps: Steps[T], limits: Limits) -> T:
    """Run steps to their end; a coroutine gets a loop of its own.

    :param limits: the time limits of coroutines.
    """

    async def wait_for(coroutine: Any) -> Any:
        return await limited(coroutine, limits)

    try:
        step = next(steps)
        while True:
            try:
                value = step.action() if isinstance(step, Aside) else asyncio.run(wait_for(step))
            except BaseException as exc:
                step = steps.throw(exc)
            else:
                step = steps.send(value)
    except StopIteration as end:
        result: T = end.value
        return result


async def drive_async(steps: Steps[T], limits: Limits, closing: threading.Event) -> T:
    """Run steps to their end on the event loop that runs now.

    :param limits: the time limits of coroutines.
    :param closing: set when runs are cancelled because the loop ends: they are abandoned.
    """
    try:
        step = next(steps)
        while True:
            try:
                if isinstance(step, Aside):
                    value = await asyncio.to_thread(step.action)
                else:
                    value = await limited(step, limits)
            except BaseException as exc:
                if closing.is_set() and isinstance(exc, asyncio.CancelledError):
                    steps.close()
                    raise
                step = steps.throw(exc)
            else:
                step = steps.send(value)
    except StopIteration as end:
        result: T = end.value
        return result
