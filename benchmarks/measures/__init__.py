"""What is measured, in this order."""

from __future__ import annotations

from .base import Measure
from .crash import CRASH
from .drain import DRAIN, DRAIN_STORED
from .enqueue import ENQUEUE
from .idle import IDLE
from .imports import IMPORTS
from .latency import LATENCY
from .sleeps import SLEEPS
from .startup import STARTUP

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        IMPORTS,
        ENQUEUE,
        DRAIN,
        DRAIN_STORED,
        LATENCY,
        STARTUP,
        IDLE,
        SLEEPS,
        CRASH,
    )
}
