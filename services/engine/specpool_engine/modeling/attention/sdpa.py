"""Attention by gathering blocks and calling `scaled_dot_product_attention` with a mask. Runs everywhere.

Branches of one sequence share most of their blocks, so segments are put into *groups* that share blocks: a group's
blocks are gathered once, all its queries see them, and a mask says which query may see which block. Groups of
similar size are computed as one batch. Query heads that share a key/value head are packed as more queries of that
head, so keys and values are never repeated.

Shapes, besides those of `interface`:
    G  groups in a batch     Q  queries of a group (padded)     K  slots of a group (padded)
    M  blocks of a group     R = H / Hkv
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specpool_engine.modeling.attention.interface import KVStorage, PackedAttention, PackedSegment
from specpool_engine.modeling.paged_kv import num_blocks_for

MIN_SHARED_FRACTION = 0.5
_UNSEEN = 1 << 40
"""Position of a padding slot: later than every query."""


class SdpaBackend:
    """Attention by torch's `scaled_dot_product_attention` over gathered keys, with masks: runs everywhere."""

    name = "sdpa"
    has_static_attention = False
    write = staticmethod(KVStorage.write)

    def check(self, *, dtype: torch.dtype, device: torch.device, block_size: int, head_dim: int | None = None) -> None:
        """Accept everything: torch's attention runs everywhere."""

    def prepare(self, segments: Sequence[PackedSegment], storage: KVStorage) -> PackedAttention:
        """Group the segments, put groups into buckets, and build indices and masks."""
        block_size = storage.keys.shape[2]
        buckets: dict[tuple[int, int], list[_Group]] = defaultdict(list)
        for group in _group_segments(segments, block_size):
            buckets[group.bucket].append(group)
        num_tokens = sum(segment.num_tokens for segment in segments)
        return SdpaAttention([_Batch(groups, storage, num_tokens) for groups in buckets.values()], storage)

    def static_attention(self, storage: KVStorage, *, max_tokens: int, max_context: int) -> None:
        """Return None: indices have a new shape in every forward."""


class SdpaAttention:
    """The batches of groups that one forward is computed in."""

    def __init__(self, batches: Sequence[_Batch], storage: KVStorage) -> None:
        self._batches = batches
        self._keys = storage.keys
        self._values = storage.values

    def attend(
        self,
        layer: int,
        query: Tensor,  # [1, H, T, D]
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:  # [1, T, H, D]
        """Attend with one batched call per bucket of groups."""
        keys, values = self._keys[layer], self._values[layer]
        if len(self._batches) == 1 and self._batches[0].is_whole:
            return self._batches[0].attend(query, keys, values, scaling, sliding_window, softcap)
        output = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        for batch in self._batches:
            part = batch.attend(query, keys, values, scaling, sliding_window, softcap)
            output.index_copy_(1, batch.tokens, part)
        return output


class _Group:
    """Segments that attend to mostly the same blocks."""

    def __init__(self) -> None:
        self.segments: list[PackedSegment] = []
        self.columns: dict[int, int] = {}  # block id -> column among the group's blocks
        self.block_positions: list[int] = []  # index of the block in its sequence, per column
        self.block_lengths: list[int] = []  # slots of the block that any segment uses, per column
        self.columns_of: list[list[int]] = []  # per segment

    def add(self, segment: PackedSegment, blocks: Sequence[int], block_size: int) -> None:
        columns = []
        for index, block in enumerate(blocks):
            if block not in self.columns:
                self.columns[block] = len(self.columns)
                self.block_positions.append(index)
                self.block_lengths.append(0)
            column = self.columns[block]
            used = min(block_size, segment.end - index * block_size)
            self.block_lengths[column] = max(self.block_lengths[column], used)
            columns.append(column)
        self.segments.append(segment)
        self.columns_of.append(columns)

    def takes(self, blocks: Sequence[int]) -> bool:
        """Whether sharing saves more gathering than the other segments' tails cost."""
        num_shared = sum(block in self.columns for block in blocks)
        return num_shared >= MIN_SHARED_FRACTION * max(len(blocks), len(self.columns_of[0]))

    @property
    def num_queries(self) -> int:
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def bucket(self) -> tuple[int, int]:
        """The sizes that groups are batched by: padding them to the largest at most doubles either size."""
        return self.num_queries.bit_length(), len(self.columns).bit_length()


def _group_segments(segments: Sequence[PackedSegment], block_size: int) -> list[_Group]:
    groups_of_root: dict[int, list[_Group]] = defaultdict(list)
    for segment in segments:
        blocks = segment.kv.block_ids[: num_blocks_for(segment.end, block_size)]
        groups = groups_of_root[blocks[0]]
        group = next((group for group in groups if group.takes(blocks)), None)
        if group is None:
            group = _Group()
            groups.append(group)
        group.add(segment, blocks, block_size)
    return [group for groups in groups_of_root.values() for group in groups]


class _Batch:
    """Groups of one bucket, padded to [G, Q] queries and [G, K] slots."""

    def __init__(self, groups: Sequence[_Group], storage: KVStorage, num_tokens: int) -> None:
        self._num_groups = len(groups)
        self._num_queries = max(group.num_queries for group in groups)
        self._dtype = storage.keys.dtype
        self._masks: dict[int | None, Tensor] = {}
        device = storage.keys.device
        self._place_keys(groups, storage.keys.shape[2], device)
        self._place_queries(groups, device)
        self.is_whole = self.tokens.tolist() == list(range(num_tokens)) == self._query_index.tolist()

    def _place_keys(self, groups: Sequence[_Group], block_size: int, device: torch.device) -> None:
        """Place the slots to gather; a slot of padding repeats slot 0 and is seen by nobody."""
        slots, positions, columns = [], [], []
        offsets = torch.arange(block_size)
        for group in groups:
            used = offsets < torch.tensor(group.block_lengths).unsqueeze(1)
            slots.append((torch.tensor(list(group.columns)).unsqueeze(1) * block_size + offsets)[used])
            positions.append((torch.tensor(group.block_positions).unsqueeze(1) * block_size + offsets)[used])
            columns.append(used.nonzero()[:, 0])
        self._slots = pad_sequence(slots, batch_first=True).flatten().to(device)
        self._key_positions = pad_sequence(positions, batch_first=True, padding_value=_UNSEEN).to(device)
        self._key_columns = pad_sequence(columns, batch_first=True).to(device)

    def _place_queries(self, groups: Sequence[_Group], device: torch.device) -> None:
        shape = (len(groups), self._num_queries)
        query_index = torch.zeros(shape, dtype=torch.long)
        query_positions = torch.full(shape, -1, dtype=torch.long)
        sees = torch.zeros(*shape, max(len(group.columns) for group in groups), dtype=torch.bool)
        for g, group in enumerate(groups):
            row = 0
            for segment, columns in zip(group.segments, group.columns_of, strict=True):
                rows = slice(row, row + segment.num_tokens)
                query_index[g, rows] = torch.arange(segment.offset, segment.offset + segment.num_tokens)
                query_positions[g, rows] = torch.arange(segment.kv.length, segment.end)
                sees[g, rows][:, columns] = True
                row += segment.num_tokens
        self._query_index = query_index.flatten().to(device)
        self._query_positions = query_positions.to(device)
        self._sees_column = sees.to(device)  # [G, Q, M]
        self._valid = (query_positions.flatten() >= 0).nonzero().flatten().to(device)
        self.tokens = self._query_index[self._valid]  # packed tokens this batch answers for

    def _mask(self, sliding_window: int | None, repeats: int) -> Tensor:
        """The additive mask [G, 1, R*Q, K], made once per window."""
        if sliding_window not in self._masks:
            query, key = self._query_positions.unsqueeze(-1), self._key_positions.unsqueeze(1)
            columns = self._key_columns.unsqueeze(1).expand(-1, self._num_queries, -1)
            seen = self._sees_column.gather(2, columns) & (key <= query)  # [G, Q, K]
            if sliding_window is not None:
                seen &= key > query - sliding_window
            seen[..., 0] |= query[..., 0] < 0  # queries of padding see something, to stay finite
            mask = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device)
            mask.masked_fill_(~seen, torch.finfo(self._dtype).min)
            self._masks[sliding_window] = mask.unsqueeze(1).repeat(1, 1, repeats, 1)
        return self._masks[sliding_window]

    def attend(
        self,
        query: Tensor,  # [1, H, T, D]
        keys: Tensor,  # [N, S, Hkv, D]
        values: Tensor,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:  # [1, tokens of this batch, H, D]
        """The output for this batch's queries, in the order of `tokens`."""
        num_heads, head_dim = query.shape[1], query.shape[3]
        num_kv_heads = keys.shape[2]
        repeats = num_heads // num_kv_heads
        key, value = self._gather(keys), self._gather(values)
        rows = query if self.is_whole else query.index_select(2, self._query_index)
        # [1, Hkv*R, G*Q, D] -> [G, Hkv, R*Q, D]
        rows = rows.view(num_kv_heads, repeats, self._num_groups, self._num_queries, head_dim)
        rows = rows.permute(2, 0, 1, 3, 4).reshape(self._num_groups, num_kv_heads, -1, head_dim)
        mask = self._mask(sliding_window, repeats)
        if softcap is None:
            output = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
        else:
            output = _softcapped(rows, key, value, mask, scaling, softcap)
        output = output.view(self._num_groups, num_kv_heads, repeats, self._num_queries, head_dim)
        output = output.permute(0, 3, 1, 2, 4).reshape(1, -1, num_heads, head_dim)
        return output if self.is_whole else output.index_select(1, self._valid)

    def _gather(self, cache: Tensor) -> Tensor:
        """The gathered slots of the cache [N, S, Hkv, D], [G, Hkv, K, D], as a strided view."""
        gathered = cache.flatten(0, 1).index_select(0, self._slots)
        return gathered.view(self._num_groups, -1, *cache.shape[2:]).transpose(1, 2)


def _softcapped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float) -> Tensor:
    """Attention whose scores are squashed into (-softcap, softcap) before the mask."""
    scores = torch.tanh(query @ key.transpose(-1, -2) * (scaling / softcap)) * softcap + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value
