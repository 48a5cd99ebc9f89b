"""Which cache blocks a tile of queries looks at, for `flex`: made once per forward and kind of layer, on the host.

A tile is `TILE_ROWS` rows of the packed queries; a token has as many rows as a key/value head has query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specpool_engine.modeling.attention.interface import PackedSegment

TILE_ROWS = 128
"""Number of rows for which one list of blocks is made."""
_SMALL_TILES = (16, 32, 64)
"""Row counts below a tile that get a kernel of their own."""


@dataclass(frozen=True, slots=True)
class TileBlocks:
    """Blocks that the rows of one tile look at."""

    partly: list[int]
    """Blocks of which some row may not see some slot."""
    wholly: list[int]
    """Blocks of which every row sees every slot: no mask is computed for these."""


def padded_rows(num_rows: int) -> int:
    """The number of rows after padding: a kernel is compiled for each small size; above, there are whole tiles."""
    return next((size for size in _SMALL_TILES if num_rows <= size), -(-num_rows // TILE_ROWS) * TILE_ROWS)


def list_blocks(
    segments: Sequence[PackedSegment],
    blocks: Sequence[Sequence[int]],  # per segment: those that hold tokens
    block_size: int,
    *,
    repeats: int,
    sliding_window: int | None,
) -> list[TileBlocks]:
    """The blocks that each tile of TILE_ROWS rows looks at, `repeats` rows per token."""
    num_rows = padded_rows(sum(segment.num_tokens for segment in segments) * repeats)
    tiles = []
    for start in range(0, num_rows, TILE_ROWS):
        first, last = start // repeats, (start + TILE_ROWS - 1) // repeats  # tokens that have rows here
        parts = [
            _seen_blocks(segment, table, block_size, (first, last), sliding_window)
            for segment, table in zip(segments, blocks, strict=True)
            if segment.offset <= last and first < segment.offset + segment.num_tokens
        ]
        seen = list(dict.fromkeys(block for part in parts for block in part))
        wholly = [block for block in seen if all(part.get(block, False) for part in parts)]
        by_all = set(wholly)
        tiles.append(TileBlocks([block for block in seen if block not in by_all], wholly))
    return tiles


def _seen_blocks(
    segment: PackedSegment,
    table: Sequence[int],
    block_size: int,
    tokens: tuple[int, int],  # first and last packed token of the tile
    sliding_window: int | None,
) -> dict[int, bool]:
    """Blocks that the segment's tokens in a tile look at, and whether each of these tokens sees all of the block."""
    first = segment.kv.length + max(0, tokens[0] - segment.offset)  # positions
    last = min(segment.end - 1, segment.kv.length + tokens[1] - segment.offset)
    oldest = 0 if sliding_window is None else max(0, first - sliding_window + 1)
    seen_by_last = 0 if sliding_window is None else last - sliding_window + 1
    return {
        table[index]: index * block_size >= seen_by_last and (index + 1) * block_size - 1 <= first
        for index in range(oldest // block_size, last // block_size + 1)
    }
