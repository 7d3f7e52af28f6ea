"""The part of a channel everything else stands on: its database and its books."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kombu.transport import virtual

from . import routing
from .connection import HeldConnection
from .consuming import Consumption
from .engine import Database, database_for
from .qos import QoS
from .settlements import SettlementBuffer


class ChannelBase(virtual.Channel):  # type: ignore[misc]
    """A channel with a database and nothing to do yet.

    It belongs to one thread, as does its connection; only settlements may come from others.
    """

    QoS = QoS
    do_restore = False
    supports_fanout = True
    body_encoding = None
    from_transport_options = ("deadletter_queue",)
    closed: bool

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self.options = connection.options
        self.settlements = SettlementBuffer()
        #: How many settlements were refused, because the message had been taken away.
        self.lost_leases = 0
        #: Called with the number of settlements refused at once.
        self.on_lost_lease: Callable[[int], object] | None = None
        self._database: Database | None = None
        self._held: HeldConnection | None = None
        self._consumption = Consumption(self)
        # Queues to delete with their last consumer here, and whether they are ours alone.
        self._auto_delete: dict[str, bool] = {}

    @property
    def database(self) -> Database:
        """The database; result statements for :meth:`settle_with` have to be of this one."""
        found = self._database
        if found is None or found.inherited:
            if found is not None:
                self._forget_parent()
            found = self._database = database_for(self.connection.url, self.options)
        return found

    def held(self) -> HeldConnection:
        """This channel's connection, opened if need be.

        :raises DatabaseUnavailableError: see :meth:`.engine.Database.connect`.
        """
        held = self._held
        if held is None or not held.usable:
            database = self.database
            broken = self._held is not None
            held = self._held = database.connect(False, self.options.busy_timeout)
            if broken:
                self._consumption.reconnected()
        return held

    def _forget_parent(self) -> None:
        """In a forked child: what the parent had in its hands is the parent's."""
        self._held = None
        self.settlements = SettlementBuffer()
        self.qos.clear()
        self._consumption.forget()

    def _exchange_type(self, held: HeldConnection, exchange: str) -> str:
        known = self.state.exchanges.get(exchange)
        if known is not None:
            return str(known["type"])
        return routing.exchange_type(held, exchange) or "direct"
