"""Stamps: headers that are put on all calls of a canvas, for instance to find or revoke them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from .chains import Chain
from .chords import Chord
from .groups import Group
from .signature import Signature, listed, maybe_signature

Stamps = Mapping[str, Any]


class StampingVisitor(ABC):
    """Chooses the stamps of each part of a canvas.

    Every method gets the part and the stamps that it has so far, and returns more. Where what it
    returns has a key ``stamped_headers``, only the names in that list are stamps.
    """

    @abstractmethod
    def on_signature(self, sig: Signature[Any], **headers: Any) -> Stamps:
        """Stamps of one call."""

    def on_group_start(self, sig: Signature[Any], **headers: Any) -> Stamps:
        """Stamps of every call in a group."""
        return {}

    def on_group_end(self, sig: Signature[Any], **headers: Any) -> None:  # noqa: B027
        """The calls of a group are stamped."""

    def on_chain_start(self, sig: Signature[Any], **headers: Any) -> Stamps:
        """Stamps of every call in a chain."""
        return {}

    def on_chain_end(self, sig: Signature[Any], **headers: Any) -> None:  # noqa: B027
        """The calls of a chain are stamped."""

    def on_chord_header_start(self, sig: Any, **headers: Any) -> Stamps:
        """Stamps of every call in the header of a chord."""
        return self.on_group_start(getattr(sig, "header", sig), **headers)

    def on_chord_header_end(self, sig: Any, **headers: Any) -> None:
        """The calls of a header are stamped."""
        self.on_group_end(getattr(sig, "header", sig), **headers)

    def on_chord_body(self, sig: Any, **headers: Any) -> Stamps:
        """Stamps of the body of a chord."""
        return {}

    def on_callback(self, callback: Signature[Any], **headers: Any) -> Stamps:
        """Stamps of a callback."""
        return {}

    def on_errback(self, errback: Signature[Any], **headers: Any) -> Stamps:
        """Stamps of an errback."""
        return {}


def stamp(
    signature: Signature[Any], visitor: StampingVisitor | None, append: bool, headers: Stamps
) -> None:
    """Stamp a signature, and all that is in it and linked to it.

    :param append: whether a stamp that is there already becomes a list, or is replaced.
    :param headers: stamps for all.
    """
    _stamp_links(signature, visitor, append, headers)
    if isinstance(signature, Chord):
        inner = _asked(visitor, "on_chord_header_start", signature, append, headers)
        for task in signature.tasks:
            stamp(task, visitor, append, inner)
        _tell(visitor, "on_chord_header_end", signature, inner)
        if signature.kwargs["body"] is not None:
            inner = _asked(visitor, "on_chord_body", signature, append, inner)
            stamp(signature.body, visitor, append, inner)
    elif isinstance(signature, (Chain, Group)):
        kind = "chain" if isinstance(signature, Chain) else "group"
        inner = _asked(visitor, f"on_{kind}_start", signature, append, headers)
        for task in signature.tasks:
            stamp(task, visitor, append, inner)
        _tell(visitor, f"on_{kind}_end", signature, inner)
    else:
        given = _asked(visitor, "on_signature", signature, append, headers)
        options = signature.options
        own = {name: options[name] for name in options.get("stamped_headers") or ()}
        options.update(_merged(own, given, append))


def _stamp_links(
    signature: Signature[Any], visitor: StampingVisitor | None, append: bool, headers: Stamps
) -> None:
    for option, hook in (("link", "on_callback"), ("link_error", "on_errback")):
        if not signature.options.get(option):
            continue
        linked = [maybe_signature(one, signature._app) for one in listed(signature.options[option])]
        for one in linked:
            stamp(one, visitor, append, _asked(visitor, hook, one, append, headers))
        signature.options[option] = linked


def _asked(
    visitor: StampingVisitor | None, hook: str, part: Any, append: bool, headers: Stamps
) -> Stamps:
    """The stamps so far with those that a hook adds."""
    more = getattr(visitor, hook)(part, **headers) if visitor is not None else None
    return _merged(headers, more or {}, append)


def _tell(visitor: StampingVisitor | None, hook: str, part: Any, headers: Stamps) -> None:
    if visitor is not None:
        getattr(visitor, hook)(part, **headers)


def _merged(first: Stamps, second: Stamps, append: bool) -> dict[str, Any]:
    """Two sets of stamps; of equal names the second's value, or both in a list."""
    merged = {name: value for name, value in first.items() if name != "stamped_headers"}
    for name, value in second.items():
        if name == "stamped_headers":
            continue
        if append and name in merged and merged[name] != value:
            value = [*_several(merged[name]), *_several(value)]
        merged[name] = value
    merged["stamped_headers"] = sorted({*_names(first), *_names(second)})
    return merged


def _names(stamps: Stamps) -> list[str]:
    named = stamps.get("stamped_headers")
    return [name for name in (stamps if named is None else named) if name != "stamped_headers"]


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
