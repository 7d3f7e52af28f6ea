"""What our Redis transport reads of kombu's ``transport_options``, besides kombu's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...exceptions import ConfigurationError


@dataclass(frozen=True)
class Options:
    """Durations are seconds."""

    #: A consumer that shows no sign of life for this long loses its messages to others.
    lease: float = 30.0
    #: Deliveries without a settlement after which a message becomes a dead letter.
    max_deliveries: int = 5
    #: The longest sleep without a look, where a wake-up normally ends the sleep.
    fallback_interval: float = 5.0
    #: How long acknowledgements may wait for the next claim to carry them.
    ack_delay: float = 0.005

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Options:
        """Options out of kombu's mapping; other keys are ignored.

        :raises ConfigurationError: naming every option with an impossible value.
        """
        known = {field.name for field in fields(cls)}
        chosen = {key: value for key, value in given.items() if key in known and value is not None}
        problems = [
            f"transport option {key!r} must be a number greater than 0, not {value!r}"
            for key, value in chosen.items()
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0
        ]
        if problems:
            raise ConfigurationError(problems)
        return cls(**chosen)
