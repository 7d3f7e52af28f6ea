"""The Flask context that surrounds a run."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from flask import Flask

from .exceptions import NotInitialisedError


class _Context:
    """What surrounds a run: a fresh app context, or a request context around it.

    A class and not a generator: that one writes into exceptions which pass it, and some
    exceptions allow no writing.
    """

    def __init__(self, app: Flask, wants_request: bool) -> None:
        self._app = app
        self._wants_request = wants_request
        self._context = app.test_request_context() if wants_request else app.app_context()

    def __enter__(self) -> None:
        self._context.__enter__()
        if self._wants_request:
            try:
                self._app.preprocess_request()
            except BaseException:
                self._context.__exit__(*sys.exc_info())
                raise

    def __exit__(self, *exc_info: Any) -> None:
        try:
            if self._wants_request and exc_info[0] is None:
                self._app.process_response(self._app.response_class())
        finally:
            self._context.__exit__(*exc_info)


def execution_context(app: Flask) -> Callable[[bool], AbstractContextManager[object]]:
    """Makes the context of each run of an app's tasks; True asks for a request context."""
    reference = weakref.ref(app)  # the app owns the TaskApp, not the other way round

    def context(wants_request: bool) -> AbstractContextManager[object]:
        flask_app = reference()
        if flask_app is None:
            raise NotInitialisedError("the app of this task is gone")
        return _Context(flask_app, wants_request)

    return context
