"""Being woken by the database, from whichever host a message comes.

A listener has a connection of its own. Whether notifications reach it is tried first, because
a proxy that lends out connections per transaction swallows them: until the token that another
connection sent has come back, and for good if it does not, its owner has to poll.
"""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING

from ... import clock
from .errors import DatabaseUnavailableError, DatabaseUnusableError

if TYPE_CHECKING:
    from .connection import HeldConnection
    from .engine import Database

log = logging.getLogger(__name__)

#: How long the token may take, in seconds.
PATIENCE = 5.0
#: How long to leave it be after a lost connection, and after a token that did not come back.
_RECONNECT, _TRY_AGAIN = 1.0, 600.0
#: How long arming waits for publishers that are about to commit, in seconds.
_ARMING = 2.0
#: A consumer that has been awake for so long spares publishers the notifying, in seconds. Less
#: would be a round trip more for each message of a slow stream.
_AWAKE = 0.05


class Listener:
    """Hears of messages. Only for the thread that drains its transport.

    :param broadcasts: hear of what goes through an exchange, and of nothing else. That is
        told to everybody who listens, asleep or not.
    """

    def __init__(self, broadcasts: bool = False) -> None:
        self._broadcasts = broadcasts
        self._connection: HeldConnection | None = None
        self._token = ""
        self._armed = False
        self._woken_at = 0.0
        self._deadline = 0.0
        self._next_try = 0.0
        self._complained = False

    def arm(self, database: Database, witness: HeldConnection) -> bool:
        """Ask to be woken. Look at the database once more after this.

        It stays armed until :meth:`awake` or :meth:`disarm`, so that it costs nothing to go
        back to sleep soon.

        :param witness: another connection, to try whether notifications get through.
        :returns: whether a publish from now on makes :meth:`fileno` readable.
        """
        if not database.dialect.notifies or clock.monotonic() < self._next_try:
            return False
        try:
            return self._arm(database, witness)
        except (DatabaseUnavailableError, DatabaseUnusableError) as exc:
            log.debug("no notifications from %s for now: %s", database.label, exc)
            self.close()
            self._next_try = clock.monotonic() + _RECONNECT
            return False

    def fileno(self) -> int | None:
        """Readable when something came in, until the next :meth:`arm`."""
        connection = self._connection
        if connection is None or not connection.usable:
            return None
        return connection.database.dialect.socket_of(connection.raw)

    def woken(self) -> None:
        """The sleep is over."""
        self._woken_at = clock.monotonic()

    def awake(self) -> None:
        """The owner is busy; after a while it need not be woken."""
        if self._armed and clock.monotonic() - self._woken_at > _AWAKE:
            self.disarm()

    def disarm(self) -> None:
        """Spare publishers the notifying."""
        connection, was_armed = self._connection, self._armed
        self._armed = False
        # In a forked child the connection is the parent's, and unusable.
        if was_armed and connection is not None and connection.usable:
            try:
                connection.database.dialect.disarm(connection)
            except (DatabaseUnavailableError, DatabaseUnusableError) as exc:
                log.debug("the listening connection is gone: %s", exc)
                self.close()

    def close(self) -> None:
        """Hear nothing more. The next :meth:`arm` begins anew."""
        self._armed = False
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _arm(self, database: Database, witness: HeldConnection) -> bool:
        connection = self._connection
        if connection is None or not connection.usable:
            self.close()
            connection = self._open(database, witness)
        heard = connection.heard()  # what came in so far, the coming look will see
        if self._token:
            if self._token not in heard:
                if clock.monotonic() >= self._deadline:
                    self._give_up(database)
                return False
            self._token = ""
        if not self._armed and not self._broadcasts:
            database.dialect.arm(connection)
            self._armed = True
        return True

    def _open(self, database: Database, witness: HeldConnection) -> HeldConnection:
        connection = self._connection = database.connect(False, _ARMING)
        self._token = secrets.token_hex(8)
        self._deadline = clock.monotonic() + PATIENCE
        database.dialect.listen(connection, witness, self._token, self._broadcasts)
        return connection

    def _give_up(self, database: Database) -> None:
        if not self._complained:
            self._complained = True
            log.warning(
                "notifications from %s do not arrive, perhaps because of a proxy that pools "
                "connections per transaction: messages of other hosts are looked for every "
                "%g s. Set notify=False in the transport options of all processes, or connect "
                "to the server directly.",
                database.label,
                database.dialect.remote_poll or 0,
            )
        self.close()
        self._next_try = clock.monotonic() + _TRY_AGAIN
