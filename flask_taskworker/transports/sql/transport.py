"""The kombu transport ``taskworker+<sqlalchemy url>``."""

from __future__ import annotations

from queue import Empty
from typing import TYPE_CHECKING, Any, ClassVar

from kombu.exceptions import ChannelError
from kombu.transport import virtual
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from ... import clock
from .. import Capabilities
from .channel import Channel as SQLChannel
from .errors import DatabaseUnavailableError, DatabaseUnusableError
from .options import Options
from .waiting import Sleeper

if TYPE_CHECKING:
    import kombu

#: drain_events(timeout=None) waits in pieces of this many seconds.
_FOR_EVER = 3600.0


class Transport(virtual.Transport):  # type: ignore[misc]
    """Messages in a SQL database: SQLite, PostgreSQL, MariaDB or MySQL.

    At least once: a message is deleted when it is acknowledged, and delivered again if its
    consumer dies before that.
    """

    Channel = SQLChannel
    can_parse_url = True
    default_port = None
    driver_type = "sql"
    driver_name = "taskworker"

    connection_errors = (
        *virtual.Transport.connection_errors,
        DatabaseUnavailableError,
        DBAPIError,
    )
    channel_errors = (*virtual.Transport.channel_errors, ChannelError, DatabaseUnusableError)
    #: Only these are worth another try.
    recoverable_connection_errors = (DatabaseUnavailableError, DBAPIError)
    recoverable_channel_errors: ClassVar[tuple[type[BaseException], ...]] = ()

    implements = virtual.Transport.implements.extend(
        exchange_type=frozenset(["direct", "topic", "fanout"]),
        batch_publish=True,
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        delayed=True,
        delayed_requeue=True,
        dead_letter=True,
        lists_dead_letters=True,
        atomic_settle=True,
        buffers=True,
        leased=True,
        cheap_prefetch=True,
        wake=True,
        fanout=True,
        pause=True,
        queue_states=True,
    )

    def __init__(self, client: kombu.Connection, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        self.url: str = client.hostname
        given = dict(client.transport_options or {})
        if client.connect_timeout:
            given.setdefault("connect_timeout", client.connect_timeout)
        self.options = Options.read(given)
        self._sleeper = Sleeper(self)

    def establish_connection(self) -> Transport:
        """Open the first channel and its database.

        :raises DatabaseUnavailableError: the server does not answer, the file is locked.
        :raises DatabaseUnusableError: trying again does not help.
        """
        channel = self.create_channel(self)
        try:
            channel.held()
        except BaseException:
            channel.close()
            raise
        self._avail_channels.append(channel)
        return self

    def close_connection(self, connection: Any) -> None:
        """Close all channels."""
        super().close_connection(connection)
        self._sleeper.close()

    def drain_events(self, connection: Any, timeout: float | None = None) -> None:
        """Deliver what is there, or wait for it.

        :param timeout: seconds; 0: one look; None: for ever.
        :raises socket.timeout: if nothing came.
        """
        deadline = None if timeout is None else clock.monotonic() + timeout
        while not self._drain_once():
            left = _FOR_EVER if deadline is None else deadline - clock.monotonic()
            if left <= 0:
                raise TimeoutError
            self._sleeper.wait(left, None)

    def wait(self, connection: Any, timeout: float, wake: int | None = None) -> None:
        """Sleep until there is something to do; see :class:`.waiting.Sleeper`.

        Buffered settlements are written first. Returns at once if a message can be claimed.

        :param timeout: the longest sleep, in seconds.
        :param wake: a file descriptor that ends the sleep when readable; it is not read.
        """
        self._sleeper.wait(timeout, wake)

    def descriptors(self) -> list[int]:
        """The sockets of its connections to a database server."""
        held = [channel._held for channel in list(self.channels)]
        found = [one.database.dialect.socket_of(one.raw) for one in held if one is not None]
        return [descriptor for descriptor in found if descriptor is not None]

    def settlement_added(self, channel: SQLChannel) -> None:
        """A settlement came in, perhaps from another thread while ours sleeps."""
        self._sleeper.interrupt()

    def _drain_once(self) -> bool:
        delivered = False
        for channel in list(self.channels):
            try:
                channel.drain_events(timeout=0)
                delivered = True
                self._sleeper.busy()
            except Empty:
                channel.flush_if_due()
        return delivered

    def driver_version(self) -> str:
        import sqlalchemy

        return sqlalchemy.__version__

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        """The URL for people to read."""
        try:
            url = make_url(uri)
        except ArgumentError:
            return f"taskworker+{uri.partition('://')[0]}://{mask}"
        text = url.render_as_string(hide_password=not include_password)
        return "taskworker+" + text.replace(":***@", f":{mask}@")
