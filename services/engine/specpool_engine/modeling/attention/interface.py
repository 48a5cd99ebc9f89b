"""The small interface behind which attention over the paged KV cache is implemented.

Shapes (packed layout: the tokens of all segments of a forward lie one after the other):
    T   tokens in this forward            H   query heads        Hkv  key/value heads
    N   blocks in the cache               S   block size         D    head dimension
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specpool.errors import InvalidArgument
from specpool_engine.modeling.paged_kv import SequenceKV


@dataclass(frozen=True, kw_only=True, slots=True)
class KVStorage:
    """Keys and values of all layers."""

    keys: Tensor
    """Keys of all layers, [layers, N, S, Hkv, D]."""
    values: Tensor
    """Values of all layers, [layers, N, S, Hkv, D]."""

    @classmethod
    def allocate(
        cls,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVStorage:
        """Zeroed storage: a masked slot is multiplied by 0, which only a finite number survives."""
        shape = (num_layers, num_blocks, block_size, num_kv_heads, head_dim)
        return cls(
            keys=torch.zeros(shape, dtype=dtype, device=device),
            values=torch.zeros(shape, dtype=dtype, device=device),
        )

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Put keys and values [1, Hkv, T, D] into `slots` [T] of the flattened cache."""
        for cache, states in ((self.keys[layer], key), (self.values[layer], value)):
            rows = states.squeeze(0).transpose(0, 1)  # [T, Hkv, D]
            cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, rows.to(cache.dtype))

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copy blocks of every layer; all sources are read before any destination is written."""
        source = torch.tensor(sources, device=self.keys.device)
        destination = torch.tensor(destinations, device=self.keys.device)
        self.keys.index_copy_(1, destination, self.keys.index_select(1, source))
        self.values.index_copy_(1, destination, self.values.index_select(1, source))


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSegment:
    """Where one segment's queries lie in the packed tokens, and which sequence they attend to."""

    kv: SequenceKV
    """Block table of the sequence, with room for the segment's tokens; `kv.length` does not count them yet."""
    offset: int
    """Index of the segment's first token among the T packed tokens."""
    num_tokens: int
    """Length of the segment."""

    @property
    def end(self) -> int:
        """Length of the sequence after this forward."""
        return self.kv.length + self.num_tokens


class PackedAttention(Protocol):
    """Masks and indices of one forward, made once and used by every layer."""

    def attend(
        self,
        layer: int,
        query: Tensor,  # [1, H, T, D]
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:  # [1, T, H, D]
        """Attention of the packed queries over the cache, which already holds their own keys and values."""
        ...


class StaticAttention(Protocol):
    """Attention over tensors that stay where they are and get new contents, so that a CUDA graph can hold it."""

    def fill(self, segments: Sequence[PackedSegment]) -> bool:
        """Put the segments' block tables into place; returns whether any of them share a prefix."""
        ...

    def prepare(self, num_tokens: int, *, shares: bool) -> PackedAttention:
        """The attention for `num_tokens` tokens, those after the segments' being padding whose results are undefined.

        With `shares`, for segments of which `fill` returned true.
        """
        ...


class AttentionBackend(Protocol):
    """Prepares the attention of each forward; keeps nothing from one to the next."""

    name: str
    has_static_attention: bool
    """Whether `static_attention` returns any."""

    def check(self, *, dtype: torch.dtype, device: torch.device, block_size: int, head_dim: int | None = None) -> None:
        """Raise `InvalidArgument` unless it runs with these here, now; a `head_dim` of None is not known yet."""
        ...

    def prepare(self, segments: Sequence[PackedSegment], storage: KVStorage) -> PackedAttention:
        """Make everything about this forward that does not depend on the layer."""
        ...

    def write(self, storage: KVStorage, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Put keys and values [1, Hkv, T, D] of a layer into `slots` [T] of the flattened cache."""
        ...

    def static_attention(self, storage: KVStorage, *, max_tokens: int, max_context: int) -> StaticAttention | None:
        """What CUDA graphs need of forwards of up to `max_tokens` tokens; None where the backend has none."""
        ...


def unavailable(backend: str, why: str, *, accepted: str) -> InvalidArgument:
    """The error for a backend that cannot run here or with these settings; no other one is used instead."""
    return InvalidArgument(
        f"attention backend {backend!r} cannot be used: {why}",
        reason="ATTENTION_BACKEND_UNAVAILABLE",
        metadata={"field": "attention_backend", "value": backend, "accepted": accepted},
    )
