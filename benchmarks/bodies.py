"""The functions that every system runs as its tasks."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from flask import Flask

from .marks import Kind, mark

P = ParamSpec("P")
R = TypeVar("R")


def noop(number: int) -> None:
    """Its result is ignored."""
    mark(number)


def stored(number: int) -> int:
    """Its result is stored."""
    mark(number)
    return number


def nap(number: int, seconds: float) -> None:
    """Marks its start and its end."""
    mark(number, Kind.STARTED)
    time.sleep(seconds)
    mark(number, Kind.ENDED)


def in_app_context(app: Flask, function: Callable[P, R]) -> Callable[P, R]:
    """For systems that know nothing of Flask: the function inside the app context."""

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with app.app_context():
            return function(*args, **kwargs)

    return inside
