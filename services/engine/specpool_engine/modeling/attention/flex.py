"""Attention over the blocks where they lie, by `flex_attention`: nothing is gathered.

The whole cache is one long row of keys, and a block mask names the blocks that a tile of queries looks at. A block that
many branches share is named once per tile, so it is read once for all of them. Query heads that share a key/value head
are rows of one tile, so they share that read as well. On CUDA the kernel is compiled; on a CPU it runs as written,
over the whole cache: right, and slow.

Shapes, besides those of `interface`:
    R  H / Hkv                   Q  rows: T tokens x R, padded      P  rows of a tile
    G  segments (padded)         L  blocks of a segment (padded)    K  blocks of a tile (padded)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.utils.rnn import pad_sequence

from specpool_engine.modeling.attention.flex_blocks import TILE_ROWS, TileBlocks, list_blocks, padded_rows
from specpool_engine.modeling.attention.interface import KVStorage, PackedAttention, PackedSegment, unavailable
from specpool_engine.modeling.paged_kv import num_blocks_for

MAX_KERNELS = 64
"""Most kernels that are compiled; the compiler's own limit is too low for several kinds of layers."""
_MIN_KERNEL_SIZE = 16
"""Least size of a product on tensor cores: of the head dimension on CUDA."""
_SMALL_BLOCKS = (16, 32, 48)
_LARGE_BLOCK = 64
"""Block sizes that the compiler has kernels for on CUDA: it reads this many slots at once, or a whole smaller block."""


class FlexBackend:
    """Attention by `flex_attention` with block masks: reads blocks where they lie, a shared one once per tile."""

    name = "flex"
    has_static_attention = False
    write = staticmethod(KVStorage.write)

    def check(self, *, dtype: torch.dtype, device: torch.device, block_size: int, head_dim: int | None = None) -> None:
        """Raise `InvalidArgument` unless it runs here: any data type; on CUDA blocks and heads fit for tensor cores."""
        del dtype
        if device.type == "cpu":
            return
        if device.type != "cuda":
            raise unavailable(self.name, f"it runs on cuda and cpu, and the device is {device}", accepted="cuda, cpu")
        if block_size not in _SMALL_BLOCKS and block_size % _LARGE_BLOCK:
            accepted = f"{', '.join(map(str, _SMALL_BLOCKS))} and multiples of {_LARGE_BLOCK}"
            raise unavailable(
                self.name, f"on CUDA it needs a block size of {accepted}, got {block_size}", accepted=accepted
            )
        if head_dim is not None and head_dim < _MIN_KERNEL_SIZE:
            raise unavailable(
                self.name,
                f"on CUDA it needs heads of at least {_MIN_KERNEL_SIZE}, the model has {head_dim}",
                accepted=f"at least {_MIN_KERNEL_SIZE}",
            )

    def prepare(self, segments: Sequence[PackedSegment], storage: KVStorage) -> PackedAttention:
        """Make block tables on the device; lists of blocks follow when a layer tells its heads and its window."""
        return FlexAttention(segments, storage)

    def static_attention(self, storage: KVStorage, *, max_tokens: int, max_context: int) -> None:
        """Return None: indices have a new shape in every forward."""


class FlexAttention:
    """The block tables of one forward, and a block mask per sliding window."""

    def __init__(self, segments: Sequence[PackedSegment], storage: KVStorage) -> None:
        num_blocks, block_size = storage.keys.shape[1:3]
        if storage.keys.is_cuda:
            # One kernel per number of rows in _SMALL_TILES and one or two for more, for each kind of layer. The limit
            # is the thread's own, and kernels are compiled by whichever thread needs them first.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_KERNELS)
        self._segments = segments
        self._block_size = block_size
        self._keys, self._values = storage.keys, storage.values
        self._blocks = [segment.kv.block_ids[: num_blocks_for(segment.end, block_size)] for segment in segments]
        self._tables = _tables(segments, self._blocks, num_blocks, storage.keys.device)
        self._lists: dict[tuple[int, int | None], _BlockLists] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,  # [1, H, T, D]
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:  # [1, T, H, D]
        """Attend by one call over the layer's whole cache."""
        num_heads, num_tokens, head_dim = query.shape[1:]
        num_kv_heads = self._keys.shape[3]
        repeats = num_heads // num_kv_heads
        # [1, Hkv*R, T, D] -> [1, Hkv, T*R, D]
        rows = query.view(1, num_kv_heads, repeats, num_tokens, head_dim).transpose(2, 3).flatten(2, 3)
        num_rows = padded_rows(num_tokens * repeats)
        rows = F.pad(rows, (0, 0, 0, num_rows - num_tokens * repeats))
        attend = _attend_function(query.device.type, repeats, sliding_window, softcap is not None, self._block_size)
        factors = _factors(scaling, softcap, query.device)
        lists = self._block_lists(repeats, sliding_window)
        output = attend(rows, _as_row(self._keys[layer]), _as_row(self._values[layer]), self._tables, lists, factors)
        output = output[:, :, : num_tokens * repeats].view(1, num_kv_heads, num_tokens, repeats, head_dim)
        return output.permute(0, 2, 1, 3, 4).reshape(1, num_tokens, num_heads, head_dim)

    def _block_lists(self, repeats: int, sliding_window: int | None) -> _BlockLists:
        key = repeats, sliding_window
        if key not in self._lists:
            tiles = list_blocks(
                self._segments, self._blocks, self._block_size, repeats=repeats, sliding_window=sliding_window
            )
            self._lists[key] = _BlockLists.of(tiles, self._keys.device)
        return self._lists[key]


class _Tables(NamedTuple):
    """Who may see what: a row sees a block if its segment's block table names it at the block's own place."""

    segment_of: Tensor
    """Segment of each token, [T]."""
    position_of: Tensor
    """Position of each token in its sequence, [T]."""
    block_table: Tensor
    """Block ids of each segment, [G, L], -1 where there is none."""
    place_of: Tensor
    """Index of each block in its sequence, [N], the same in all that share it; 0 for blocks that nobody uses."""


def _tables(
    segments: Sequence[PackedSegment], blocks: Sequence[list[int]], num_blocks: int, device: torch.device
) -> _Tables:
    counts = torch.tensor([segment.num_tokens for segment in segments])
    positions = torch.cat([torch.arange(segment.kv.length, segment.end) for segment in segments])
    tables = [torch.tensor(table) for table in blocks]
    place_of = torch.zeros(num_blocks, dtype=torch.int32)
    for table in tables:
        place_of[table] = torch.arange(len(table), dtype=torch.int32)
    # A compiler treats sizes of one as special: at least two of everything.
    block_table = pad_sequence(tables, batch_first=True, padding_value=-1).int()
    block_table = F.pad(block_table, (0, 1, 0, 1), value=-1)
    return _Tables(
        torch.arange(len(segments), dtype=torch.int32).repeat_interleave(counts).to(device, non_blocking=True),
        positions.int().to(device, non_blocking=True),
        block_table.to(device, non_blocking=True),
        place_of.to(device, non_blocking=True),
    )


class _BlockLists(NamedTuple):
    """`TileBlocks` of all tiles as tensors."""

    num_partly: Tensor  # [1, 1, tiles]
    partly: Tensor  # [1, 1, tiles, K]
    num_wholly: Tensor
    wholly: Tensor

    @classmethod
    def of(cls, tiles: Sequence[TileBlocks], device: torch.device) -> _BlockLists:
        """The lists as tensors, padded with block 0 beyond the counts."""
        partly, wholly = [tile.partly for tile in tiles], [tile.wholly for tile in tiles]
        # Equally wide: the kernel for few rows finds its place in both by the width of the first.
        width = max(2, *map(len, partly), *map(len, wholly))
        return cls(*_counted(partly, width, device), *_counted(wholly, width, device))


def _counted(lists: Sequence[list[int]], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([len(one) for one in lists], dtype=torch.int32)
    ids = torch.tensor([one + [0] * (width - len(one)) for one in lists], dtype=torch.int32)
    return (
        counts.view(1, 1, -1).to(device, non_blocking=True),
        ids.view(1, 1, len(lists), width).to(device, non_blocking=True),
    )


def _as_row(cache: Tensor) -> Tensor:
    """The cache [N, S, Hkv, D] as [1, Hkv, N*S, D], a view."""
    return cache.flatten(0, 1).transpose(0, 1).unsqueeze(0)


@cache
def _factors(scaling: float, softcap: float | None, device: torch.device) -> Tensor:
    """A factor for scores and their cap, [2]. A kernel reads them, so that it is the same for all."""
    return torch.tensor([scaling, softcap or 0.0], device=device)


@cache
def _attend_function(
    device_type: str, repeats: int, sliding_window: int | None, has_softcap: bool, block_size: int
) -> Callable[..., Tensor]:
    """The kernel for one kind of layer, compiled on CUDA."""

    def attend(
        rows: Tensor,  # [1, Hkv, Q, D]
        keys: Tensor,  # [1, Hkv, N*S, D]
        values: Tensor,
        tables: _Tables,
        lists: _BlockLists,
        factors: Tensor,  # [2]
    ) -> Tensor:  # [1, Hkv, Q, D]
        last_token = tables.segment_of.shape[0] - 1

        def sees(batch: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
            token = torch.clamp(row // repeats, max=last_token)  # rows of padding see what the last token sees
            block = slot // block_size
            place = tables.place_of[block]
            key, position = place * block_size + slot % block_size, tables.position_of[token]
            seen = (tables.block_table[tables.segment_of[token], place] == block) & (key <= position)
            return seen if sliding_window is None else seen & (key > position - sliding_window)

        def scale(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
            scaled = score * factors[0]
            return factors[1] * torch.tanh(scaled / factors[1]) if has_softcap else scaled

        mask = BlockMask.from_kv_blocks(
            lists.num_partly,
            lists.partly,
            lists.num_wholly,
            lists.wholly,
            BLOCK_SIZE=(TILE_ROWS, block_size),
            mask_mod=sees,
            seq_lengths=(rows.shape[2], keys.shape[2]),
            compute_q_blocks=False,
        )
        options = _kernel_options(rows.shape[2], block_size)
        output = flex_attention(rows, keys, values, score_mod=scale, block_mask=mask, scale=1.0, kernel_options=options)
        assert isinstance(output, Tensor)
        return output

    if device_type == "cpu":
        return attend
    compiled: Callable[..., Tensor] = torch.compile(attend, fullgraph=True, dynamic=True)
    return compiled


def _kernel_options(num_rows: int, block_size: int) -> Any:
    """Sizes that divide tiles and blocks, which the compiler's own choice need not do. Literals: it takes no others."""
    if num_rows <= 16:
        rows = 16
    elif num_rows <= 32:
        rows = 32
    else:
        rows = 64
    if block_size % 64 == 0:
        keys = 64
    elif block_size % 32 == 0:
        keys = 32
    else:
        keys = 16
    return {"BLOCK_M": rows, "BLOCK_N": keys}
