"""What producers and workers import: the client of the system that this run measures."""

from __future__ import annotations

import os

from .adapters import load
from .system import Place

client = load(os.environ["BENCH_ADAPTER"]).build(Place.from_environment())
app = client.app
