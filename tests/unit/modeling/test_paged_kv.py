"""Block tables: nothing leaks, nothing is freed twice, branches are isolated, cached prefixes are found and evicted."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from specpool.errors import ContextLengthExceeded, InvalidArgument, KVCacheFull
from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.paged_kv import BlockPool, SequenceKV, reserve_all
from specpool_engine.modeling.toy import ToyModel, ToyTable

VOCAB_SIZE = 5


def toy(num_blocks: int = 8, block_size: int = 4) -> ToyModel:
    return ToyModel(ToyTable(VOCAB_SIZE, seed=1), BlockPool(num_blocks, block_size))


def write(model: ToyModel, kv: SequenceKV, tokens: list[int]) -> None:
    model.forward([Segment(kv=kv, tokens=tokens, num_logits=1)])


def test_full_pool_raises_with_counts_and_changes_nothing() -> None:
    model = toy(num_blocks=3)
    kv = SequenceKV(model.pool)
    write(model, kv, [1] * 6)
    with pytest.raises(KVCacheFull, match="2 more blocks of 4 tokens wanted, 1 of 3 available") as caught:
        write(model, kv, [2] * 7)
    assert caught.value.metadata == {"wanted_blocks": "2", "available_blocks": "1", "total_blocks": "3"}
    assert (kv.length, len(kv.block_ids), model.pool.num_free) == (6, 2, 1)
    assert model.tokens_of(kv) == [1] * 6


def test_full_pool_in_a_batch_leaves_the_other_sequences_unchanged() -> None:
    model = toy(num_blocks=3)
    first, second = SequenceKV(model.pool), SequenceKV(model.pool)
    with pytest.raises(KVCacheFull):
        model.forward([Segment(kv=first, tokens=[1] * 4), Segment(kv=second, tokens=[1] * 12)])
    assert first.block_ids == second.block_ids == []
    assert model.pool.num_free == 3


def test_all_holders_of_a_shared_block_can_write_with_one_copy_less() -> None:
    model = toy(num_blocks=2)
    first = SequenceKV(model.pool)
    write(model, first, [1, 2])
    second = first.fork()
    reserve_all(model.pool, [(first, 1), (second, 1)])
    assert first.block_ids != second.block_ids
    assert model.pool.num_free == 0


def test_a_branch_writes_into_a_copy() -> None:
    model = toy()
    trunk = SequenceKV(model.pool)
    write(model, trunk, [1, 2, 3, 4, 1, 2])
    branch = trunk.fork(5)
    write(model, branch, [3])
    write(model, trunk, [4])
    assert model.tokens_of(trunk) == [1, 2, 3, 4, 1, 2, 4]
    assert model.tokens_of(branch) == [1, 2, 3, 4, 1, 3]
    assert trunk.block_ids[0] == branch.block_ids[0]


def test_a_copy_of_a_copy_that_was_never_executed_reads_the_original() -> None:
    model = toy()
    trunk = SequenceKV(model.pool)
    write(model, trunk, [1, 2])
    first = trunk.fork()
    first.reserve(1)
    second = first.fork()
    second.reserve(1)
    assert len({trunk.block_ids[0], first.block_ids[0], second.block_ids[0]}) == 3
    write(model, second, [3])
    assert model.tokens_of(second) == [1, 2, 3]


def test_the_source_of_a_queued_copy_may_be_freed_and_reused() -> None:
    model = toy(num_blocks=2)
    trunk = SequenceKV(model.pool)
    write(model, trunk, [1, 2])
    branch = trunk.fork()
    branch.reserve(1)
    trunk.free()
    other = SequenceKV(model.pool)
    model.forward([Segment(kv=other, tokens=[4, 4]), Segment(kv=branch, tokens=[3])])
    assert model.tokens_of(branch) == [1, 2, 3]


def test_prefix_is_found_in_full_blocks_and_never_whole() -> None:
    model = toy()
    tokens = [1, 2, 3, 4, 4, 3, 2, 1]
    kv = SequenceKV(model.pool)
    write(model, kv, tokens)
    kv.publish_prefix(tokens, "tenant")
    kv.free()
    assert SequenceKV.from_prefix(model.pool, tokens, "tenant").length == 4
    longer = SequenceKV.from_prefix(model.pool, [*tokens, 0], "tenant")
    assert model.tokens_of(longer) == tokens
    assert SequenceKV.from_prefix(model.pool, [1, 2, 3, 0, 4, 3, 2, 1, 0], "tenant").length == 0


def test_prefix_of_another_tenant_is_not_found() -> None:
    model = toy()
    kv = SequenceKV(model.pool)
    write(model, kv, [1, 2, 3, 4, 1])
    kv.publish_prefix([1, 2, 3, 4, 1], "tenant a")
    assert SequenceKV.from_prefix(model.pool, [1, 2, 3, 4, 1], "tenant b").length == 0
    assert SequenceKV.from_prefix(model.pool, [1, 2, 3, 4, 1], "tenant a").length == 4


def test_cached_blocks_are_evicted_tail_first_and_oldest_first() -> None:
    model = toy(num_blocks=4)
    old, new = [1] * 8, [2] * 8
    for tokens in (old, new):
        kv = SequenceKV(model.pool)
        write(model, kv, tokens)
        kv.publish_prefix(tokens)
        kv.free()
    assert model.pool.num_free == 4, "kept for their contents only"
    write(model, SequenceKV(model.pool), [3])
    assert SequenceKV.from_prefix(model.pool, [*old, 0]).length == 4
    assert SequenceKV.from_prefix(model.pool, [*new, 0]).length == 8


def test_rewriting_a_published_block_removes_it_from_the_index() -> None:
    model = toy()
    kv = SequenceKV(model.pool)
    write(model, kv, [1, 2, 3, 4])
    kv.publish_prefix([1, 2, 3, 4])
    kv.truncate(2)
    write(model, kv, [0, 0])
    assert SequenceKV.from_prefix(model.pool, [1, 2, 3, 4, 1]).length == 0
    kv.publish_prefix([1, 2, 0, 0])
    assert SequenceKV.from_prefix(model.pool, [1, 2, 0, 0, 1]).length == 4


def test_unusable_segments_are_refused() -> None:
    model = ToyModel(ToyTable(VOCAB_SIZE, seed=1), BlockPool(8, 4), max_context=6)
    kv = SequenceKV(model.pool)
    with pytest.raises(ContextLengthExceeded, match="7 tokens do not fit into the model's context of 6"):
        write(model, kv, [1] * 7)
    with pytest.raises(InvalidArgument, match=r"token ids must be in \[0, 5\)"):
        write(model, kv, [5])
    with pytest.raises(InvalidArgument, match="at least one token"):
        write(model, kv, [])
    with pytest.raises(InvalidArgument, match="only once"):
        model.forward([Segment(kv=kv, tokens=[1]), Segment(kv=kv, tokens=[1])])
    assert model.pool.num_used == 0


def test_one_forward_equals_many() -> None:
    tokens = [1, 2, 3, 4, 0, 1, 3]
    model = toy()
    whole = model.forward([Segment(kv=SequenceKV(model.pool), tokens=tokens, num_logits=7)])
    kv = SequenceKV(model.pool)
    parts = [model.forward([Segment(kv=kv, tokens=[token])]) for token in tokens]
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(whole[3], model.table.logits(3, 4))


class PagedKVMachine(RuleBasedStateMachine):
    """Random sequences, branches, truncations and prefixes against plain Python lists."""

    @initialize(num_blocks=st.integers(2, 10), block_size=st.integers(1, 4))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.model = ToyModel(ToyTable(VOCAB_SIZE, seed=1), BlockPool(num_blocks, block_size))
        self.tables: list[tuple[SequenceKV, list[int], str]] = []

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, len(self.tables) - 1))

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), salt=st.sampled_from(["a", "b"]))
    def open(self, tokens: list[int], salt: str) -> None:
        kv = SequenceKV.from_prefix(self.model.pool, tokens, salt)
        assert kv.length < len(tokens)
        self.tables.append((kv, tokens[: kv.length], salt))
        self.extend(len(self.tables) - 1, tokens[kv.length :])

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=6))
    def write(self, data: st.DataObject, tokens: list[int]) -> None:
        self.extend(self.pick(data), tokens)

    def extend(self, index: int, tokens: list[int]) -> None:
        kv, contents, _ = self.tables[index]
        before = (self.model.pool.num_free, kv.length, list(kv.block_ids))
        try:
            self.model.forward([Segment(kv=kv, tokens=tokens)])
        except KVCacheFull:
            assert (self.model.pool.num_free, kv.length, kv.block_ids) == before
        else:
            contents += tokens

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), num_tokens=st.integers(1, 5))
    def reserve_only(self, data: st.DataObject, num_tokens: int) -> None:
        with contextlib.suppress(KVCacheFull):
            self.tables[self.pick(data)][0].reserve(num_tokens)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        kv, contents, salt = self.tables[self.pick(data)]
        length = data.draw(st.integers(0, kv.length))
        self.tables.append((kv.fork(length), contents[:length], salt))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        kv, contents, _ = self.tables[self.pick(data)]
        length = data.draw(st.integers(0, kv.length))
        kv.truncate(length)
        del contents[length:]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        kv, contents, salt = self.tables[self.pick(data)]
        kv.publish_prefix(contents, salt)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        kv, _, _ = self.tables.pop(self.pick(data))
        kv.free()
        kv.free()

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        if not hasattr(self, "model"):
            return
        held = [block for kv, _, _ in self.tables for block in kv.block_ids]
        pool = self.model.pool
        assert all(pool.references(block) == held.count(block) for block in range(pool.num_blocks))
        assert pool.num_used == len(set(held))

    def settle(self) -> None:
        sources, destinations = self.model.pool.take_copies()
        self.model._slots[destinations] = self.model._slots[sources]

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        if not hasattr(self, "model"):
            return
        self.settle()
        for kv, contents, _ in self.tables:
            assert self.model.tokens_of(kv) == contents

    def teardown(self) -> None:
        for kv, _, _ in getattr(self, "tables", []):
            kv.free()
        if hasattr(self, "model"):
            assert self.model.pool.num_used == 0
            assert len(self.model.pool.allocate(self.model.pool.num_blocks)) == self.model.pool.num_blocks


class LazyCopiesMachine(PagedKVMachine):
    """The same with copies executed only by forwards, so that chains of queued copies build up."""

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        """Comparing contents would execute the copies: it is done at the end only."""

    def teardown(self) -> None:
        if hasattr(self, "model"):
            PagedKVMachine.every_sequence_reads_its_own_tokens(self)
        super().teardown()


TestPagedKV = PagedKVMachine.TestCase
TestPagedKV.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestLazyCopies = LazyCopiesMachine.TestCase
TestLazyCopies.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
