"""Attention of packed queries over paged keys, as kernels for GPUs offer it, and one in plain torch.

A kernel is given *entries*: runs of packed queries, each with a block table and a number of keys. It returns the log of
the sum of exponentials besides the output, so that attention over two sets of keys can be merged.

Shapes, besides those of `interface`:
    E  entries      W  blocks of an entry (padded)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A run of packed queries and the keys that it attends to."""

    num_queries: int
    """Number of queries, at least 1; the runs of all entries lie one after the other."""
    blocks: Sequence[int]
    """Blocks that hold the keys."""
    num_keys: int
    """Number of the blocks' slots that are keys; 0 to see nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VarlenBatch:
    """Entries as tensors (int32). Queries after those of the last entry have undefined results."""

    query_starts: Tensor
    """Place where each entry's queries start, [E+1]; the last one is where they end."""
    key_starts: Tensor
    """Place where each entry's keys would start, were they packed, [E+1]."""
    key_lengths: Tensor
    """Number of keys of each entry, [E]."""
    block_table: Tensor
    """Block ids of each entry, [E, W]."""
    max_queries: int
    """Most queries of an entry."""
    max_keys: int
    """Most keys of an entry."""
    causal: bool
    """Whether an entry's last query is at its last key, and each sees the keys up to its own. Else all see all."""
    same_queries: int | None = None
    """Number of queries, if it is known to be the same in all entries."""

    @classmethod
    def of(cls, entries: Sequence[Entry], *, causal: bool, device: torch.device) -> VarlenBatch:
        """Make tensors that are just large enough for `entries`."""
        counts = [entry.num_queries for entry in entries]
        lengths = [entry.num_keys for entry in entries]
        width = max(1, *(len(entry.blocks) for entry in entries), 1)
        table = [[*entry.blocks, *([0] * (width - len(entry.blocks)))] for entry in entries]
        return cls(
            query_starts=_int32(starts(counts), device),
            key_starts=_int32(starts(lengths), device),
            key_lengths=_int32(lengths, device),
            block_table=_int32(table, device),
            max_queries=max(counts),
            max_keys=max(lengths),
            causal=causal,
            same_queries=counts[0] if len(set(counts)) == 1 else None,
        )


def starts(counts: Sequence[int]) -> list[int]:
    """The running sums of `counts` [E], from 0 on: [E+1]."""
    return list(accumulate(counts, initial=0))


def _int32(values: Sequence[object], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)


class VarlenKernel(Protocol):
    """A kernel for runs of queries of different length over paged keys."""

    def check(self, *, dtype: torch.dtype, device: torch.device, block_size: int, head_dim: int | None) -> None:
        """Raise `InvalidArgument` unless it runs with these here, now."""
        ...

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
        """Output, and log-sum-exp of the scores: plus or minus infinity where a query sees no key, with output 0.

        `sliding_window` is for causal batches only.
        """
        ...


class TorchVarlenKernel:
    """Attention in plain torch, entry by entry: obviously right, slow, on any device. Others are tested against it."""

    def check(self, *, dtype: torch.dtype, device: torch.device, block_size: int, head_dim: int | None) -> None:
        """Accept everything: plain torch runs everywhere."""

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
        """Attend with one softmax per entry."""
        assert batch.causal or sliding_window is None
        output = torch.full_like(query, torch.nan)
        lse = query.new_full((query.shape[1], query.shape[0]), torch.nan, dtype=torch.float32)
        repeats = query.shape[1] // keys.shape[2]
        bounds = batch.query_starts.tolist()
        for entry, num_keys in enumerate(batch.key_lengths.tolist()):
            rows = slice(bounds[entry], bounds[entry + 1])
            num_queries = rows.stop - rows.start
            blocks = batch.block_table[entry, : -(-num_keys // keys.shape[1])].long()
            key, value = (
                cache[blocks].flatten(0, 1)[:num_keys].repeat_interleave(repeats, dim=1).transpose(0, 1).float()
                for cache in (keys, values)
            )  # [H, num_keys, D]
            scores = query[rows].transpose(0, 1).float() @ key.transpose(1, 2) * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if batch.causal:
                own = torch.arange(num_keys - num_queries, num_keys, device=query.device).unsqueeze(1)
                keys_at = torch.arange(num_keys, device=query.device)
                hidden = keys_at > own
                if sliding_window is not None:
                    hidden |= keys_at <= own - sliding_window
                scores = scores.masked_fill(hidden, -torch.inf)
            lse[:, rows] = scores.logsumexp(dim=-1)
            output[rows] = (scores.softmax(dim=-1).nan_to_num() @ value).transpose(0, 1).to(query.dtype)
        return output, lse


def merge(
    first: Tensor,  # [T, H, D]
    first_lse: Tensor,  # [H, T]
    second: Tensor,
    second_lse: Tensor,
) -> Tensor:  # [T, H, D]
    """Attention over two disjoint sets of keys, from that over each. A query may see nothing in one of them."""
    # Kernels mark a query that sees nothing by plus infinity, mathematics by minus infinity.
    first_lse, second_lse = (lse.masked_fill(lse == torch.inf, -torch.inf) for lse in (first_lse, second_lse))
    highest = torch.maximum(first_lse, second_lse).clamp_min(torch.finfo(torch.float32).min)
    first_weight, second_weight = ((lse - highest).exp() for lse in (first_lse, second_lse))
    total = (first_weight + second_weight).clamp_min(torch.finfo(torch.float32).tiny)
    shares = ((weight / total).transpose(0, 1).unsqueeze(-1) for weight in (first_weight, second_weight))
    first_share, second_share = shares
    return (first * first_share + second * second_share).to(first.dtype)
