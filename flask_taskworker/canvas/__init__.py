"""Signatures, and what can be made of several of them: chains, groups and chords."""

from __future__ import annotations

from .primitives import Chain, Chord, Group, chain, chord, chunks, group, xmap, xstarmap
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
