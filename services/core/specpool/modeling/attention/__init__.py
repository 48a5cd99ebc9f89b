"""Attention backends by name."""

from __future__ import annotations

from collections.abc import Mapping

from specpool.errors import InvalidArgument
from specpool.modeling.attention.flex import FlexBackend
from specpool.modeling.attention.interface import AttentionBackend, AttentionPlan, KVStorage, PackedSegment
from specpool.modeling.attention.sdpa import SdpaBackend

__all__ = ["BACKENDS", "AttentionBackend", "AttentionPlan", "KVStorage", "PackedSegment", "get_backend"]

BACKENDS: Mapping[str, type[AttentionBackend]] = {kind.name: kind for kind in (SdpaBackend, FlexBackend)}


def get_backend(name: str) -> AttentionBackend:
    """The backend of that name; no other is silently used instead."""
    if name not in BACKENDS:
        raise InvalidArgument(
            f"unknown attention backend {name!r}; accepted: {', '.join(sorted(BACKENDS))}",
            metadata={"field": "attention_backend", "value": name, "accepted": ", ".join(sorted(BACKENDS))},
        )
    return BACKENDS[name]()
