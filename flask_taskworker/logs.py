"""Which task a line of the log belongs to.

Our own loggers put ``task_id`` and ``task_name`` on each record. The root logger and the app's
handlers stay as they are; add :class:`TaskFilter` to a handler of your own to have them there::

    handler.addFilter(TaskFilter())
    handler.setFormatter(logging.Formatter("%(task_name)s[%(task_id)s] %(message)s"))
"""

from __future__ import annotations

import logging

from .task import current_request

#: The parent of the loggers that tasks write to.
TASK_LOGGER = "flask_taskworker.task"


class TaskFilter(logging.Filter):
    """Puts ``task_id`` and ``task_name`` of the run that is going on on every record.

    Both are None outside a run. It lets every record pass.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "task_id"):
            request = current_request()
            record.task_id, record.task_name = request.id, request.task
        return True


def get_task_logger(name: str) -> logging.Logger:
    """A logger for the lines of tasks, for example ``get_task_logger(__name__)``.

    It is a child of ``flask_taskworker.task``: it has the level and the handlers of a worker,
    and its records carry ``task_id`` and ``task_name``.
    """
    return _marked(logging.getLogger(f"{TASK_LOGGER}.{name}"))


def _marked(logger: logging.Logger) -> logging.Logger:
    # A filter of a logger sees the records of that logger alone, not those of its children.
    if not any(isinstance(known, TaskFilter) for known in logger.filters):
        logger.addFilter(TaskFilter())
    return logger


for _name in ("flask_taskworker", "flask_taskworker.worker", TASK_LOGGER):
    _marked(logging.getLogger(_name))
