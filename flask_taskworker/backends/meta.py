"""A record as the mapping that Celery's key-value and message backends store."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from ..exceptions import ResultError
from .base import TaskRecord


def to_meta(record: TaskRecord) -> dict[str, Any]:
    """Write a record as Celery's task meta."""
    meta: dict[str, Any] = {
        "status": record.status,
        "result": record.result,
        "traceback": record.traceback,
        "children": list(record.children or ()),
        "date_done": record.date_done.isoformat() if record.date_done else None,
        "task_id": record.task_id,
    }
    if record.group_id:
        meta["group_id"] = record.group_id
    if record.parent_id:
        meta["parent_id"] = record.parent_id
    return meta


def from_meta(meta: Any) -> TaskRecord:
    """Read Celery's task meta.

    :raises ResultError: if it is none.
    """
    if not isinstance(meta, Mapping) or "task_id" not in meta or "status" not in meta:
        raise ResultError(f"the stored result is no task meta: {str(meta)[:200]}")
    return TaskRecord(
        task_id=str(meta["task_id"]),
        status=str(meta["status"]),
        result=meta.get("result"),
        traceback=meta.get("traceback"),
        children=meta.get("children"),
        date_done=_moment(meta.get("date_done")),
        group_id=meta.get("group_id"),
        parent_id=meta.get("parent_id"),
    )


def _moment(value: Any) -> datetime | None:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value[:-1] + "+00:00" if value.endswith("Z") else value)
        except ValueError:
            return None
    if not isinstance(value, datetime):
        return None
    return value if value.tzinfo else value.replace(tzinfo=timezone.utc)
