"""Attention by flash-attn over the paged cache; a prefix that branches share is read once for all of them.

Layers with a sliding window read each branch's own window instead: a window is short, and most of it is no prefix.

Shapes: see `interface` and `varlen`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specpool_engine.modeling.attention.interface import (
    KVStorage,
    PackedAttention,
    PackedSegment,
    StaticAttention,
    unavailable,
)
from specpool_engine.modeling.attention.prefix_sharing import SharedEntries, shared_entries, whole_entries
from specpool_engine.modeling.attention.varlen import Entry, VarlenBatch, VarlenKernel, merge, starts
from specpool_engine.modeling.paged_kv import num_blocks_for
from specpool_engine.modeling.static_tensors import StaticTensors

NAME = "flash"
BLOCK_SIZE_MULTIPLE = 256
"""Pages are a multiple of this many slots: flash-attn 2 refuses other sizes."""
MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8
"""Heads are a multiple of this many numbers: flash-attn would copy the whole cache to pad others."""
MIN_CAPABILITY = (8, 0)
"""Least CUDA compute capability: Ampere."""


class FlashAttnKernel:
    """Attention by the kernels of flash-attn 2, on CUDA devices."""

    def check(self, *, dtype: torch.dtype, device: torch.device, block_size: int, head_dim: int | None) -> None:
        """Raise `InvalidArgument`, which names the first thing that is missing."""
        if device.type != "cuda":
            raise unavailable(NAME, f"it needs a CUDA device, and the device is {device}", accepted="cuda, cuda:N")
        if dtype not in (torch.bfloat16, torch.float16):
            raise unavailable(NAME, f"it needs bfloat16 or float16, got {dtype}", accepted="bfloat16, float16")
        if block_size % BLOCK_SIZE_MULTIPLE:
            multiples = f"multiples of {BLOCK_SIZE_MULTIPLE}"
            raise unavailable(
                NAME, f"it needs a block_size among the {multiples}, got {block_size}", accepted=multiples
            )
        if head_dim is not None and (head_dim > MAX_HEAD_DIM or head_dim % HEAD_DIM_MULTIPLE):
            sizes = f"multiples of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"
            raise unavailable(NAME, f"it needs heads of {sizes}, the model has {head_dim}", accepted=sizes)
        _functions()
        if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
            raise unavailable(
                NAME,
                f"it needs an Ampere GPU or newer, and {device} is {torch.cuda.get_device_name(device)}",
                accepted="compute capability 8.0 or higher",
            )

    def attend(
        self,
        query: Tensor,  # [T, H, D]
        keys: Tensor,  # [N, S, Hkv, D]
        values: Tensor,
        batch: VarlenBatch,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:  # [T, H, D], [H, T] float32
        """Attend by flash-attn; entries of one size take the kernel that splits long keys among processors."""
        varlen, with_kvcache = _functions()
        options = {
            "softmax_scale": scaling,
            "causal": batch.causal,
            "window_size": (-1, -1) if sliding_window is None else (sliding_window - 1, 0),
            "softcap": softcap or 0.0,
            "block_table": batch.block_table,
        }
        if batch.same_queries is not None:
            rows = query.view(-1, batch.same_queries, *query.shape[1:])  # [E, T/E, H, D]
            output, lse = with_kvcache(
                rows, keys, values, cache_seqlens=batch.key_lengths, return_softmax_lse=True, **options
            )  # [E, T/E, H, D], [E, H, T/E]
            return output.flatten(0, 1), lse.transpose(0, 1).flatten(1)
        output, lse, _ = varlen(
            query,
            keys,
            values,
            batch.query_starts,
            batch.key_starts,
            batch.max_queries,
            batch.max_keys,
            return_attn_probs=True,
            **options,
        )
        return output, lse


def _functions() -> tuple[Any, Any]:
    try:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
    except ImportError as error:
        raise unavailable(
            NAME,
            f"the package flash-attn cannot be imported ({error}): install specpool[flash], or use flex or sdpa",
            accepted="flash-attn 2.8 or newer",
        ) from error
    return flash_attn_varlen_func, flash_attn_with_kvcache


class FlashBackend:
    """Attention by paged kernels; another kernel than flash-attn's is for tests."""

    name = NAME
    has_static_attention = True
    write = staticmethod(KVStorage.write)

    def __init__(self, kernel: VarlenKernel | None = None) -> None:
        self._kernel: VarlenKernel = kernel or FlashAttnKernel()

    def check(self, *, dtype: torch.dtype, device: torch.device, block_size: int, head_dim: int | None = None) -> None:
        """Raise `InvalidArgument` unless the kernel runs with these, here and now."""
        self._kernel.check(dtype=dtype, device=device, block_size=block_size, head_dim=head_dim)

    def prepare(self, segments: Sequence[PackedSegment], storage: KVStorage) -> PackedAttention:
        """Make the block tables of the segments, and of shared prefixes and tails where there are any."""
        block_size, device = storage.keys.shape[2], storage.keys.device
        whole = VarlenBatch.of(whole_entries(segments, block_size), causal=True, device=device)
        entries = shared_entries(segments, block_size)
        shared = _Shared.of(entries, device) if entries.shares else None
        return FlashAttention(self._kernel, storage, whole, shared)

    def static_attention(self, storage: KVStorage, *, max_tokens: int, max_context: int) -> StaticAttention:
        """Make block tables that a CUDA graph can hold, for forwards of up to `max_tokens` tokens."""
        return StaticFlashAttention(self._kernel, storage, max_tokens=max_tokens, max_context=max_context)


@dataclass(frozen=True, slots=True)
class _Shared:
    """Entries for attention in two parts, prefixes that segments share and their tails, and where each token went."""

    order: Tensor
    """Packed token of each place in the groups' order, [T]."""
    prefixes: VarlenBatch
    tails: VarlenBatch

    @classmethod
    def of(cls, entries: SharedEntries, device: torch.device) -> _Shared:
        return cls(
            torch.tensor(entries.order).to(device, non_blocking=True),
            VarlenBatch.of(entries.prefixes, causal=False, device=device),
            VarlenBatch.of(entries.tails, causal=True, device=device),
        )


class FlashAttention:
    """Block tables of one forward, of whole segments and, where prefixes are shared, of prefixes and tails."""

    def __init__(self, kernel: VarlenKernel, storage: KVStorage, whole: VarlenBatch, shared: _Shared | None) -> None:
        self._kernel = kernel
        self._storage = storage
        self._whole = whole
        self._shared = shared

    def attend(
        self,
        layer: int,
        query: Tensor,  # [1, H, T, D]
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:  # [1, T, H, D]
        """Attend in one part, or in two that are merged by their log-sum-exp."""
        rows = query[0].transpose(0, 1)  # [T, H, D]
        if self._shared is None or sliding_window is not None:
            options = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
            return self._attend(layer, rows.contiguous(), self._whole, **options)[0].unsqueeze(0)
        options = {"scaling": scaling, "sliding_window": None, "softcap": softcap}
        rows = rows.index_select(0, self._shared.order)
        prefix = self._attend(layer, rows, self._shared.prefixes, **options)
        tail = self._attend(layer, rows, self._shared.tails, **options)
        output = torch.empty_like(rows)
        output.index_copy_(0, self._shared.order, merge(*prefix, *tail))
        return output.unsqueeze(0)

    def _attend(self, layer: int, rows: Tensor, batch: VarlenBatch, **options: Any) -> tuple[Tensor, Tensor]:
        return self._kernel.attend(rows, self._storage.keys[layer], self._storage.values[layer], batch, **options)


class StaticFlashAttention:
    """Block tables that stay where they are, for forwards of up to `max_tokens` tokens.

    Every token may be a segment, so there are as many entries. Entries that are not used have no queries.
    """

    def __init__(self, kernel: VarlenKernel, storage: KVStorage, *, max_tokens: int, max_context: int) -> None:
        self._kernel = kernel
        self._storage = storage
        self._max_tokens = max_tokens
        self._max_context = max_context
        self._block_size = storage.keys.shape[2]
        device = storage.keys.device
        width = num_blocks_for(max_context, self._block_size)
        shapes: dict[str, tuple[int, ...]] = {}
        for part in ("whole", "prefixes", "tails"):
            shapes |= {f"{part}.query_starts": (max_tokens + 1,), f"{part}.key_starts": (max_tokens + 1,)}
            shapes |= {f"{part}.key_lengths": (max_tokens,), f"{part}.block_table": (max_tokens, width)}
        self._tables = StaticTensors(shapes, dtype=torch.int32, device=device)
        self._order = StaticTensors({"order": (max_tokens,)}, dtype=torch.long, device=device)

    def fill(self, segments: Sequence[PackedSegment]) -> bool:
        """Put the segments' block tables into place; returns whether any prefix is shared."""
        shared = shared_entries(segments, self._block_size)
        self._tables.wait()
        self._order.wait()
        self._put("whole", whole_entries(segments, self._block_size))
        if shared.shares:
            self._put("prefixes", shared.prefixes)
            self._put("tails", shared.tails)
            unused = range(len(shared.order), self._max_tokens)
            self._order.put("order", [*shared.order, *unused])
            self._order.upload()
        self._tables.upload()
        return shared.shares

    def prepare(self, num_tokens: int, *, shares: bool) -> PackedAttention:
        """Attention of forwards of `num_tokens` tokens, padding included, with or without a shared prefix."""
        if not shares:
            return FlashAttention(self._kernel, self._storage, self._batch("whole", num_tokens, causal=True), None)
        return FlashAttention(
            self._kernel,
            self._storage,
            self._batch("whole", num_tokens, causal=True),
            _Shared(
                self._order["order"][:num_tokens],
                self._batch("prefixes", num_tokens, causal=False),
                self._batch("tails", num_tokens, causal=True),
            ),
        )

    def _put(self, part: str, entries: Sequence[Entry]) -> None:
        for name, counts in (
            ("query_starts", [entry.num_queries for entry in entries]),
            ("key_starts", [entry.num_keys for entry in entries]),
        ):
            self._tables.put(f"{part}.{name}", starts(counts), padding=sum(counts))
        self._tables.put(f"{part}.key_lengths", [entry.num_keys for entry in entries])
        self._tables.put_rows(f"{part}.block_table", [entry.blocks for entry in entries])

    def _batch(self, part: str, num_tokens: int, *, causal: bool) -> VarlenBatch:
        return VarlenBatch(
            query_starts=self._tables[f"{part}.query_starts"][: num_tokens + 1],
            key_starts=self._tables[f"{part}.key_starts"][: num_tokens + 1],
            key_lengths=self._tables[f"{part}.key_lengths"][:num_tokens],
            block_table=self._tables[f"{part}.block_table"][:num_tokens],
            max_queries=num_tokens,
            max_keys=self._max_context,
            causal=causal,
        )
