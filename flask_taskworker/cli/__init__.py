"""The command line, behind two doors: ``flask taskworker ...`` and ``taskworker -A target ...``.

Each module adds its commands to the group, which loads it when one of them is used; none
has logic of its own.
"""

from __future__ import annotations

from .root import main, taskworker

__all__ = ["main", "taskworker"]
