"""A file of one line a step, appended to by several processes that may be killed at any time.

The tasks of a fault test write to it: what is in it has happened, whatever a broker says.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path


class Ledger:
    """Lines of ``<step> <name>``; a line is written whole or not at all."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    def write(self, step: str, name: object) -> None:
        """Append a line; when this returns, the death of the process does not undo it."""
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(fd, f"{step} {name}\n".encode())
        finally:
            os.close(fd)

    def lines(self) -> list[tuple[str, str]]:
        """All steps so far, the oldest first."""
        try:
            with open(self.path, encoding="utf-8") as file:
                text = file.read()
        except FileNotFoundError:
            return []
        pairs = (line.partition(" ") for line in text.splitlines())
        return [(step, name) for step, _, name in pairs]

    def count(self, step: str) -> Counter[str]:
        """How often each name took a step."""
        return Counter(name for taken, name in self.lines() if taken == step)
