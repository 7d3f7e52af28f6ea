"""Names of nodes, and the patterns of file names that are made of them."""

from __future__ import annotations

import re
import socket

#: Which of its processes a worker's log or name belongs to: for Celery, the main one.
_INDEX = {"i": "0", "I": ""}


def node_name(template: str | None) -> str:
    """A node name from a template such as ``mail@%h``.

    ``%h`` is the host, ``%n`` its first part, ``%d`` the rest; ``%i`` is 0 and ``%I`` nothing.
    """
    host = socket.gethostname()
    name = template or "worker@%h"
    if "@" not in name:
        name += "@%h"
    short, _, domain = host.partition(".")
    return _fill(name, {"h": host, "n": short, "d": domain, **_INDEX})


def file_name(pattern: str, node: str) -> str:
    """The name of a file of a node, from a pattern such as ``/var/log/%n.log``.

    ``%p`` is the node name, ``%n`` its part before the ``@``, ``%h`` the host after it,
    ``%d`` that host's domain; ``%i`` is 0 and ``%I`` nothing, as for Celery's main process.
    """
    name, _, host = node.rpartition("@")
    values = {"p": node, "n": name, "h": host, "d": host.partition(".")[2], **_INDEX}
    return _fill(pattern, values)


def _fill(text: str, values: dict[str, str]) -> str:
    values["%"] = "%"
    return re.sub(r"%(.)", lambda match: values.get(match[1], match[0]), text)
