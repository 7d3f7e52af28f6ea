"""Where states and results of tasks are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..config import Config
    from ..message import WireMessage
    from .base import ResultBackend


def create_backend(config: Config, reply: Callable[[str, WireMessage], None]) -> ResultBackend:
    """The result backend that a configuration names. Nothing is connected yet.

    :param reply: sends a message to a queue, for the backend that answers with messages.
    """
    url = config.result_backend
    scheme = (url or "disabled").split("://", 1)[0]
    if scheme.startswith(("taskworker+", "db+")):
        from .database import DatabaseBackend

        return DatabaseBackend(config)
    if scheme in ("redis", "rediss"):
        from .redis import RedisBackend

        return RedisBackend(config)
    if scheme == "rpc":
        from .rpc import RpcBackend

        return RpcBackend(config, reply)
    if scheme == "cache+memory":
        from .memory import MemoryBackend

        return MemoryBackend(config)
    from .base import DisabledBackend

    return DisabledBackend(config)
