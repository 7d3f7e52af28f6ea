"""kombu's file transport, with messages that appear whole or not at all.

kombu writes a message into its final file, where a consumer may find it half written and
take it for broken. Here it is written under another name first.
"""

from __future__ import annotations

import os
import time
import uuid
from typing import Any

from kombu.exceptions import ChannelError
from kombu.transport import filesystem
from kombu.utils.json import dumps

from . import Capabilities


class Channel(filesystem.Channel):  # type: ignore[misc]
    """A channel of kombu's, but for the way it writes."""

    def _put(self, queue: str, payload: dict[str, Any], **kwargs: Any) -> None:
        # kombu takes every file with ".<queue>.msg" anywhere in its name, in the order of the
        # names, so the unfinished file must not carry the name of the finished one
        stem = os.path.join(self.data_folder_out, f"{time.time_ns() // 1000}_{uuid.uuid4()}")
        path = f"{stem}.{queue}.msg"
        try:
            with open(f"{stem}.part", "wb") as file:
                file.write(dumps(payload).encode())
            os.replace(f"{stem}.part", path)
        except OSError as exc:
            raise ChannelError(f"cannot write the message to {path}: {exc}") from exc


class Transport(filesystem.Transport):  # type: ignore[misc]
    """``filesystem://`` for both sides."""

    Channel = Channel
    capabilities = Capabilities(cheap_prefetch=True)
