"""One module per task queue: ``systems`` says what there is to measure, ``build`` makes it.

A new one needs no other change than its file here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Protocol, cast

from ..system import Client, Place, System


class Adapter(Protocol):
    """What a module of this package holds."""

    def systems(self, store: str) -> Sequence[System]:
        """The configurations there are with this store."""

    def build(self, place: Place) -> Client: ...


def load(name: str) -> Adapter:
    """The adapter of this name."""
    return cast(Adapter, importlib.import_module(f"{__name__}.{name}"))


def all_systems(store: str) -> tuple[list[System], dict[str, str]]:
    """What can be measured here with a store, and the adapters that cannot with the reason."""
    found: list[System] = []
    missing: dict[str, str] = {}
    names = sorted((module.name for module in pkgutil.iter_modules(__path__)), key=_ours_first)
    for name in names:
        try:
            found.extend(load(name).systems(store))
        except ModuleNotFoundError as exc:
            missing[name] = f"{exc.name} is not installed"
    return found, missing


def _ours_first(name: str) -> tuple[bool, str]:
    return name != "ours", name
