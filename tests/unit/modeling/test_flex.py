"""The block lists of `flex`, which a kernel on a GPU skips by and the CPU does not look at, and that it compiles."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from specpool.errors import InvalidArgument
from specpool_engine.modeling.attention import KVStorage, PackedSegment, flex, get_backend
from specpool_engine.modeling.attention.flex_blocks import TILE_ROWS, list_blocks, padded_rows
from specpool_engine.modeling.paged_kv import BlockPool, SequenceKV, num_blocks_for

BLOCK_SIZE = 4
WINDOWS = (None, 1, 7, 40)


def pack(kvs: Sequence[SequenceKV], num_tokens: Sequence[int]) -> list[PackedSegment]:
    packed, offset = [], 0
    for kv, count in zip(kvs, num_tokens, strict=True):
        kv.reserve(count)
        packed.append(PackedSegment(kv=kv, offset=offset, num_tokens=count))
        offset += count
    return packed


def random_segments(seed: int) -> list[PackedSegment]:
    """Sequences of random lengths, and branches of them."""
    choose = random.Random(seed)
    pool = BlockPool(400, BLOCK_SIZE)
    kvs = []
    for _ in range(choose.randint(1, 3)):
        trunk = SequenceKV(pool)
        trunk.reserve(length := choose.randint(1, 90))
        trunk.advance(length)
        kvs += [trunk, *(trunk.fork(choose.randint(0, length)) for _ in range(choose.randint(0, 6)))]
    choose.shuffle(kvs)
    return pack(kvs, [choose.randint(1, 40) for _ in kvs])


def visible(segments: Sequence[PackedSegment], window: int | None) -> Iterator[tuple[int, int, set[int]]]:
    """For every token and every block of its sequence: the slots that the token sees."""
    for segment in segments:
        for token in range(segment.num_tokens):
            position = segment.kv.length + token
            oldest = 0 if window is None else max(0, position - window + 1)
            for index, block in enumerate(segment.kv.block_ids[: num_blocks_for(segment.end, BLOCK_SIZE)]):
                slots = range(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
                yield segment.offset + token, block, {slot for slot in slots if oldest <= slot <= position}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("repeats", [1, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_lists_name_what_each_tile_sees(seed: int, repeats: int, window: int | None) -> None:
    segments = random_segments(seed)
    blocks = [segment.kv.block_ids[: num_blocks_for(segment.end, BLOCK_SIZE)] for segment in segments]
    tiles = list_blocks(segments, blocks, BLOCK_SIZE, repeats=repeats, sliding_window=window)
    seen: list[dict[int, list[int]]] = [{} for _ in tiles]
    for token, block, slots in visible(segments, window):
        for tile in {row // TILE_ROWS for row in range(token * repeats, (token + 1) * repeats)}:
            seen[tile].setdefault(block, []).append(len(slots))
    num_tokens = sum(segment.num_tokens for segment in segments)
    for index, (tile, counts) in enumerate(zip(tiles, seen, strict=True)):
        rows = range(index * TILE_ROWS, min((index + 1) * TILE_ROWS, num_tokens * repeats))
        num_in_tile = len({row // repeats for row in rows})
        assert len(set(tile.partly) | set(tile.wholly)) == len(tile.partly) + len(tile.wholly)
        assert {*tile.partly, *tile.wholly} == {block for block, sizes in counts.items() if any(sizes)}
        for block in tile.wholly:
            assert counts[block] == [BLOCK_SIZE] * num_in_tile
        for block in tile.partly:
            assert counts[block] != [BLOCK_SIZE] * num_in_tile


def test_a_block_of_many_branches_is_listed_once() -> None:
    pool = BlockPool(100, BLOCK_SIZE)
    trunk = SequenceKV(pool)
    trunk.reserve(40)
    trunk.advance(40)
    segments = pack([trunk.fork() for _ in range(16)], [1] * 16)
    (tile,) = list_blocks(
        segments, [segment.kv.block_ids for segment in segments], BLOCK_SIZE, repeats=2, sliding_window=None
    )
    assert tile.wholly == trunk.block_ids
    assert len(tile.partly) == 16


def test_rows_are_padded_to_sizes_that_have_a_kernel() -> None:
    assert [padded_rows(n) for n in (1, 16, 17, 64, 65, 128, 129)] == [16, 16, 32, 64, 128, 128, 256]


@pytest.mark.parametrize("sliding_window", [None, 9])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_one_dynamic_graph_computes_the_same(sliding_window: int | None, softcap: float | None) -> None:
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("aot_eager")
    plain = flex._attend_function("cpu", 2, sliding_window, softcap is not None, BLOCK_SIZE)
    traced = torch.compile(plain, fullgraph=True, dynamic=True, backend=compiler)
    kernels = set()
    for seed in range(8):
        segments = random_segments(seed)
        storage = KVStorage.allocate(
            num_layers=1,
            num_blocks=400,
            block_size=BLOCK_SIZE,
            num_kv_heads=2,
            head_dim=8,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        torch.nn.init.normal_(storage.keys)
        attention = flex.FlexAttention(segments, storage)
        num_rows = padded_rows(2 * sum(segment.num_tokens for segment in segments))
        kernels.add(min(num_rows, TILE_ROWS + 1))
        arguments = (
            torch.randn(1, 2, num_rows, 8),
            *(flex._as_row(cache[0]) for cache in (storage.keys, storage.keys)),
            *(
                attention._tables,
                attention._block_lists(2, sliding_window),
                flex._factors(0.3, softcap, storage.keys.device),
            ),
        )
        with torch.inference_mode():
            torch.testing.assert_close(traced(*arguments), plain(*arguments))
    assert compiler.frame_count <= len(kernels) + 2


def test_both_lists_of_a_tile_are_equally_wide() -> None:
    """The kernel for few rows counts in both by the width of the first."""
    tiles = [flex.TileBlocks([7], [3, 1, 4, 1, 5]), flex.TileBlocks([2, 6, 5], [])]
    lists = flex._BlockLists.of(tiles, torch.device("cpu"))
    assert lists.partly.tolist() == [[[[7, 0, 0, 0, 0], [2, 6, 5, 0, 0]]]]
    assert lists.wholly.tolist() == [[[[3, 1, 4, 1, 5], [0, 0, 0, 0, 0]]]]
    assert (lists.num_partly.tolist(), lists.num_wholly.tolist()) == ([[[1, 3]]], [[[5, 0]]])


def test_what_cuda_cannot_run_is_refused() -> None:
    backend, cuda = get_backend("flex"), torch.device("cuda")
    backend.check(dtype=torch.float32, device=torch.device("cpu"), block_size=3, head_dim=4)
    backend.check(dtype=torch.bfloat16, device=cuda, block_size=48, head_dim=64)
    with pytest.raises(
        InvalidArgument, match=r"'flex' cannot be used: .* 16, 32, 48 and multiples of 64, got 96"
    ) as caught:
        backend.check(dtype=torch.bfloat16, device=cuda, block_size=96)
    assert caught.value.reason == "ATTENTION_BACKEND_UNAVAILABLE"
    with pytest.raises(InvalidArgument, match="heads of at least 16, the model has 8"):
        backend.check(dtype=torch.bfloat16, device=cuda, block_size=16, head_dim=8)
