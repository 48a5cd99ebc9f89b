"""Attention backends by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from specpool.errors import InvalidArgument
from specpool_engine.modeling.attention.flash import FlashBackend
from specpool_engine.modeling.attention.flex import FlexBackend
from specpool_engine.modeling.attention.interface import (
    AttentionBackend,
    KVStorage,
    PackedAttention,
    PackedSegment,
    StaticAttention,
)
from specpool_engine.modeling.attention.native import NativeBackend
from specpool_engine.modeling.attention.sdpa import SdpaBackend

__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "KVStorage",
    "PackedAttention",
    "PackedSegment",
    "StaticAttention",
    "get_backend",
]

BACKENDS: Mapping[str, Callable[[], AttentionBackend]] = {
    kind.name: kind for kind in (SdpaBackend, NativeBackend, FlexBackend, FlashBackend)
}


def get_backend(name: str) -> AttentionBackend:
    """The backend of that name; no other is silently used instead."""
    if name not in BACKENDS:
        raise InvalidArgument(
            f"unknown attention backend {name!r}; accepted: {', '.join(sorted(BACKENDS))}",
            metadata={"field": "attention_backend", "value": name, "accepted": ", ".join(sorted(BACKENDS))},
        )
    return BACKENDS[name]()
