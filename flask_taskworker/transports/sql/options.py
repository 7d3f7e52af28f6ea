"""The transport options, read from kombu's ``transport_options``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from ...exceptions import ConfigurationError

#: The longest duration, in seconds. Drivers and poll() count in milliseconds of 32 bits.
_LONGEST = 7 * 24 * 3600
_PREFIX = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")


@dataclass(frozen=True)
class Options:
    """How this connection uses the database. Durations are seconds."""

    #: "full": a publish that returned survives a power cut. "normal": it survives the
    #: death of every process, but the last few may be lost with the power.
    durability: Literal["full", "normal"] = "full"
    #: A consumer that shows no sign of life for this long loses its messages to others.
    lease: float = 30.0
    #: How long a publish or a claim waits for a lock.
    busy_timeout: float = 15.0
    #: How long to wait for a database server to answer a connection.
    connect_timeout: float = 4.0
    #: How long a statement may take before the server counts as gone; waiting for a lock is extra.
    answer_timeout: float = 15.0
    #: Deliveries without a settlement after which a message becomes a dead letter; 0: never.
    max_deliveries: int = 5
    #: Create missing tables; False for roles that may not.
    create_tables: bool = True
    table_prefix: str = "taskworker_"
    #: PostgreSQL: the schema of the tables; None: the search path decides.
    schema: str | None = None
    #: A larger message is refused before anything is written.
    max_message_bytes: int = 16 * 1024 * 1024
    #: The longest sleep without a look, where a wake-up normally ends the sleep.
    fallback_interval: float = 5.0
    #: Whether sleeping consumers on this host are woken, instead of polling.
    doorbell: bool = True
    #: PostgreSQL: whether publishers wake sleeping consumers on every host by NOTIFY. Where
    #: that does not get through, consumers notice and poll.
    notify: bool = True
    #: This connection reads broadcasts and no tasks: only a publish to an exchange wakes it.
    broadcasts: bool = False
    #: How long acknowledgements may wait for the next claim to carry them.
    ack_delay: float = 0.02

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Options:
        """Options out of kombu's mapping; keys of other transports are ignored.

        :raises ConfigurationError: naming every option with an impossible value.
        """
        known = {field.name for field in fields(cls)}
        chosen = {key: value for key, value in given.items() if key in known and value is not None}
        problems = [problem for key, value in chosen.items() if (problem := _problem(key, value))]
        if problems:
            raise ConfigurationError(problems)
        return cls(**chosen)

    @property
    def durable(self) -> bool:
        return self.durability == "full"


def _problem(key: str, value: Any) -> str | None:
    if key == "durability":
        valid, expected = value in ("full", "normal"), '"full" or "normal"'
    elif key == "table_prefix":
        valid = isinstance(value, str) and _PREFIX.fullmatch(value) is not None
        expected = "letters, digits and underscores, at most 40, not starting with a digit"
    elif key == "schema":
        valid, expected = isinstance(value, str) and bool(value), "the name of a schema"
    elif key in ("create_tables", "doorbell", "notify", "broadcasts"):
        valid, expected = isinstance(value, bool), "True or False"
    elif key in ("max_deliveries", "max_message_bytes"):
        valid = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        expected = "a whole number, 0 or more"
    else:
        least = 0.1 if key == "lease" else 0
        valid = isinstance(value, (int, float)) and not isinstance(value, bool)
        valid = valid and least <= value <= _LONGEST
        expected = f"seconds, from {least:g} to {_LONGEST} (a week)"
    return None if valid else f"transport option {key}={value!r}: write {expected}"
