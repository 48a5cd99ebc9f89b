"""How `flash` splits attention between shared prefixes and tails, and what it refuses."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from specpool.errors import InvalidArgument
from specpool_engine.modeling.attention import KVStorage, PackedSegment, get_backend
from specpool_engine.modeling.attention.flash import FlashBackend
from specpool_engine.modeling.attention.prefix_sharing import group_by_prefix, shared_entries, whole_entries
from specpool_engine.modeling.attention.varlen import Entry, TorchVarlenKernel, VarlenBatch, merge
from specpool_engine.modeling.paged_kv import BlockPool, SequenceKV

BLOCK_SIZE = 4
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Sequences:
    """Sequences and branches over one cache of random contents."""

    def __init__(self) -> None:
        self.pool = BlockPool(200, BLOCK_SIZE)
        self.storage = KVStorage.allocate(
            num_layers=1,
            num_blocks=200,
            block_size=BLOCK_SIZE,
            num_kv_heads=2,
            head_dim=8,
            dtype=torch.float32,
            device=CPU,
        )
        for cache in (self.storage.keys, self.storage.values):
            torch.nn.init.normal_(cache)

    def sequence(self, length: int) -> SequenceKV:
        kv = SequenceKV(self.pool)
        kv.reserve(length)
        kv.advance(length)
        return kv

    def pack(self, parts: Sequence[tuple[SequenceKV, int]]) -> list[PackedSegment]:
        """The storage's contents are random: copies of blocks do not matter."""
        packed, offset = [], 0
        for kv, num_tokens in parts:
            kv.reserve(num_tokens)
            packed.append(PackedSegment(kv=kv, offset=offset, num_tokens=num_tokens))
            offset += num_tokens
        return packed


@pytest.fixture
def sequences() -> Sequences:
    torch.manual_seed(0)
    return Sequences()


class CountingKernel(TorchVarlenKernel):
    """Counts the blocks that a kernel would read."""

    def __init__(self) -> None:
        self.num_blocks = 0

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, batch: VarlenBatch, **options: Any
    ) -> tuple[Tensor, Tensor]:
        self.num_blocks += sum(-(-length // keys.shape[1]) for length in batch.key_lengths.tolist())
        return super().attend(query, keys, values, batch, **options)


def branches(sequences: Sequences) -> list[PackedSegment]:
    """Two families of branches, interleaved with sequences that share nothing."""
    first, second = sequences.sequence(42), sequences.sequence(23)
    parts = [(first.fork(), 1), (second.fork(21), 3), (sequences.sequence(0), 5), (first.fork(41), 2)]
    parts += [(first.fork(37), 1), (second.fork(), 2), (first.fork(6), 1), (sequences.sequence(17), 1), (first, 4)]
    return sequences.pack(parts)


def test_branches_of_one_trunk_form_a_group(sequences: Sequences) -> None:
    segments = branches(sequences)
    groups = sorted(group_by_prefix(segments, BLOCK_SIZE), key=lambda group: group.segments[0].offset)
    members = [[segments.index(segment) for segment in group.segments] for group in groups]
    assert members == [[0, 3, 4, 8], [1, 5], [2], [6], [7]]
    assert [len(group.prefix) for group in groups] == [9, 5, 0, 0, 0]
    for group in groups:
        for segment in group.segments:
            assert segment.kv.block_ids[: len(group.prefix)] == group.prefix
            assert len(group.prefix) * BLOCK_SIZE <= segment.kv.length


def test_entries_cover_every_key_of_every_token_once(sequences: Sequences) -> None:
    segments = branches(sequences)
    entries = shared_entries(segments, BLOCK_SIZE)
    num_tokens = sum(segment.num_tokens for segment in segments)
    assert sorted(entries.order) == list(range(num_tokens))
    assert entries.shares
    seen: dict[int, list[int]] = {token: [] for token in range(num_tokens)}
    for part in (entries.prefixes, entries.tails):
        place = 0
        for entry in part:
            for token in entries.order[place : place + entry.num_queries]:
                seen[token] += entry.blocks
            place += entry.num_queries
        assert place == num_tokens
    for segment, entry in zip(segments, whole_entries(segments, BLOCK_SIZE), strict=True):
        for token in range(segment.offset, segment.offset + segment.num_tokens):
            assert seen[token] == list(entry.blocks)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sliding_window", [None, 7])
def test_both_parts_together_equal_sdpa(
    sequences: Sequences, sliding_window: int | None, softcap: float | None
) -> None:
    segments = branches(sequences)
    query = torch.randn(1, 6, sum(segment.num_tokens for segment in segments), 8)
    options: dict[str, Any] = {"scaling": 0.4, "sliding_window": sliding_window, "softcap": softcap}
    expected = get_backend("sdpa").prepare(segments, sequences.storage).attend(0, query, **options)
    actual = FlashBackend(TorchVarlenKernel()).prepare(segments, sequences.storage).attend(0, query, **options)
    torch.testing.assert_close(actual, expected)


def test_a_shared_prefix_is_read_once(sequences: Sequences) -> None:
    trunk = sequences.sequence(100 * BLOCK_SIZE)
    segments = sequences.pack([(trunk.fork(), 1) for _ in range(16)])
    kernel = CountingKernel()
    attention = FlashBackend(kernel).prepare(segments, sequences.storage)
    attention.attend(0, torch.randn(1, 2, 16, 8), scaling=1.0, sliding_window=None, softcap=None)
    assert kernel.num_blocks == 100 + 16


def test_sequences_that_share_nothing_take_one_part(sequences: Sequences) -> None:
    segments = sequences.pack([(sequences.sequence(9), 2), (sequences.sequence(20), 1)])
    assert not shared_entries(segments, BLOCK_SIZE).shares
    kernel = CountingKernel()
    attention = FlashBackend(kernel).prepare(segments, sequences.storage)
    attention.attend(0, torch.randn(1, 2, 3, 8), scaling=1.0, sliding_window=None, softcap=None)
    assert kernel.num_blocks == 3 + 6


@pytest.mark.parametrize("nothing", [torch.inf, -torch.inf])
def test_merging_with_nothing_changes_nothing(nothing: float) -> None:
    output, lse = torch.randn(3, 2, 8), torch.randn(2, 3)
    empty, none = torch.zeros_like(output), torch.full_like(lse, nothing)
    torch.testing.assert_close(merge(output, lse, empty, none), output)
    torch.testing.assert_close(merge(empty, none, output, lse), output)
    assert merge(empty, none, empty, none).eq(0).all()


def test_merging_survives_scores_far_apart() -> None:
    first, second = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    merged = merge(first, torch.tensor([[900.0]]), second, torch.tensor([[-900.0]]))
    torch.testing.assert_close(merged, first)
    merged = merge(first, torch.tensor([[900.0]]), second, torch.tensor([[900.0]]))
    torch.testing.assert_close(merged, (first + second) / 2)


def test_a_batch_says_when_all_entries_have_one_size() -> None:
    entries = [Entry(num_queries=2, blocks=[5], num_keys=3), Entry(num_queries=2, blocks=[7, 8], num_keys=6)]
    batch = VarlenBatch.of(entries, causal=True, device=CPU)
    assert batch.same_queries == 2
    assert batch.query_starts.tolist() == [0, 2, 4]
    assert batch.key_starts.tolist() == [0, 3, 9]
    assert batch.block_table.tolist() == [[5, 0], [7, 8]]
    entries.append(Entry(num_queries=1, blocks=[], num_keys=0))
    assert VarlenBatch.of(entries, causal=True, device=CPU).same_queries is None


@pytest.mark.parametrize(
    ("settings", "message", "accepted"),
    [
        ({"device": CPU}, "it needs a CUDA device, and the device is cpu", "cuda, cuda:N"),
        ({"dtype": torch.float32}, "it needs bfloat16 or float16, got torch.float32", "bfloat16, float16"),
        ({"block_size": 16}, "it needs a block_size among the multiples of 256, got 16", "multiples of 256"),
        ({"head_dim": 512}, "heads of multiples of 8 up to 256, the model has 512", "multiples of 8 up to 256"),
        ({"head_dim": 60}, "heads of multiples of 8 up to 256, the model has 60", "multiples of 8 up to 256"),
        ({}, "the package flash-attn cannot be imported", "flash-attn 2.8 or newer"),
    ],
)
def test_what_is_missing_is_named(
    settings: dict[str, Any], message: str, accepted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without_flash(name: str, *arguments: Any) -> Any:
        if name == "flash_attn":
            raise ImportError("No module named 'flash_attn'")
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_flash)
    good: dict[str, Any] = {"dtype": torch.bfloat16, "device": CUDA, "block_size": 256, "head_dim": 128}
    with pytest.raises(InvalidArgument) as caught:
        get_backend("flash").check(**(good | settings))
    assert str(caught.value).startswith("attention backend 'flash' cannot be used: ")
    assert message in str(caught.value)
    assert caught.value.metadata["accepted"] == accepted
    assert caught.value.reason == "ATTENTION_BACKEND_UNAVAILABLE"
