"""The command line, behind two doors: ``flask taskworker ...`` and ``taskworker -A target ...``.

Each module adds its commands to the group; none has logic of its own.
"""

from __future__ import annotations

from . import db, worker
from .root import main, taskworker

__all__ = ["db", "main", "taskworker", "worker"]
