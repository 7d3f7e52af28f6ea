"""Start a worker anew when its program changes, in development."""

from __future__ import annotations

import logging
import os
import site
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator

log = logging.getLogger("flask_taskworker.worker")

#: Seconds between two looks at the files.
INTERVAL = 0.5


class SourceWatch:
    """Notices that a source file of this program has changed.

    Watched are the files of all modules that are loaded, save Python's own and what is
    installed; modules that are loaded later are noticed at the next look.
    """

    def __init__(self) -> None:
        installed = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib")]
        folders = {*installed, *site.getsitepackages(), site.getusersitepackages()}
        self._installed = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)
        self._extra: set[str] = set()
        self._own: dict[str, bool] = {}  # whether a file is the program's
        self._seen: dict[str, float] = {}
        self.changed()

    def also(self, exc: BaseException) -> None:
        """Watch the files that an exception came through as well: they could not be loaded."""
        frames = traceback.extract_tb(exc.__traceback__)
        self._extra.update(frame.filename for frame in frames if os.path.exists(frame.filename))
        if isinstance(exc, SyntaxError) and exc.filename:
            self._extra.add(exc.filename)
        if exc.__cause__ is not None:
            self.also(exc.__cause__)
        self.changed()

    def changed(self) -> str | None:
        """A file that was changed since it was first seen."""
        for file in self._files():
            try:
                written = os.stat(file).st_mtime
            except OSError:  # editors remove a file before they write it anew
                continue
            if self._seen.setdefault(file, written) != written:
                return file
        return None

    def wait(self, end: threading.Event | None = None) -> str | None:
        """Block until a file has changed and return it, or None once ``end`` is set."""
        end = end or threading.Event()
        while not end.wait(INTERVAL):
            file = self.changed()
            if file is not None:
                return file
        return None

    def _files(self) -> Iterator[str]:
        for module in list(sys.modules.values()):
            file = getattr(module, "__file__", None)
            if not isinstance(file, str):
                continue
            if file not in self._own:
                self._own[file] = not os.path.realpath(file).startswith(self._installed)
            if self._own[file]:
                yield file
        yield from list(self._extra)


class Reloader:
    """While its block runs, calls ``on_change`` once when a file has changed."""

    def __init__(self, watch: SourceWatch, on_change: Callable[[], None]) -> None:
        self._watch, self._on_change = watch, on_change
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="taskworker-reload", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        file = self._watch.wait(self._end)
        if file is not None:
            log.info("%s has changed, starting anew", file)
            self._on_change()
