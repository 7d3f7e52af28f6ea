"""Comparing answers with captured ones: the same names and the same types of values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CAPTURED = Path(__file__).resolve().parent.parent / "data" / "protocol"


def captured(kind: str, name: str) -> Any:
    """A captured exchange of Celery's: ``captured("pidbox", "ping")``."""
    return json.loads((CAPTURED / kind / f"{name}.json").read_text())


def answer_of(name: str) -> Any:
    """What Celery's worker answered to a command."""
    returned = captured("pidbox", name)["api_return"]
    if isinstance(returned, list):
        returned = returned[0]
    (answer,) = returned.values()
    return answer


def shape(value: Any) -> Any:
    """The value with types instead of values; lists by their first element."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number"
    return type(value).__name__
