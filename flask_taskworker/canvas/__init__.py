"""Signatures, and what can be made of several of them: chains, groups and chords."""

from __future__ import annotations

from .chains import Chain, chain
from .chords import Chord, chord
from .groups import Group, group
from .maps import chunks, xmap, xstarmap
from .signature import Signature, maybe_signature, signature
from .stamping import StampingVisitor

__all__ = [
    "Chain",
    "Chord",
    "Group",
    "Signature",
    "StampingVisitor",
    "chain",
    "chord",
    "chunks",
    "group",
    "maybe_signature",
    "signature",
    "xmap",
    "xstarmap",
]
