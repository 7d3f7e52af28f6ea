"""A Celery app that sends to our worker and reads its results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kombu


@contextmanager
def celery_client(broker: str, backend: str, queue: str) -> Iterator[Any]:
    """A Celery app for a block; it leaves no connection behind."""
    import celery

    app = celery.Celery("client", broker=broker, backend=backend, set_as_current=False)
    app.conf.task_default_queue = queue
    yield app
    # A result that is collected later would connect once more to unsubscribe.
    app.backend.remove_pending_result = lambda result: result
    app.backend.result_consumer.stop()
    if backend.startswith("redis"):
        app.backend.client.connection_pool.disconnect()
    app.close()
    kombu.pools.reset()
