"""What can go wrong with the database, in two classes kombu can tell apart."""

from __future__ import annotations

from ...exceptions import BrokerError, BrokerUnavailableError


class DatabaseUnavailableError(BrokerUnavailableError):
    """The database cannot be used now; the same operation may succeed later.

    It was locked for too long, the server is away, the disk is full. kombu sees it as a
    connection error: it reconnects and tries again as its retry policy says.
    """


class DeadlockError(DatabaseUnavailableError):
    """The database undid the transaction in favour of another one; run it again."""


class DatabaseUnusableError(BrokerError):
    """The database cannot be used until somebody mends it: corrupt, read-only, missing.

    kombu sees it as a channel error: trying again does not help.
    """


class QueueNameError(BrokerError, ValueError):
    """A queue, exchange or routing key that no database can keep."""
