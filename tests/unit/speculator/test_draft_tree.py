"""Re-rooting: what is kept, what is freed, and whose keys and values are whose."""

from __future__ import annotations

import pytest

from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.paged_kv import BlockPool
from specpool_engine.modeling.toy import ToyModel, ToyTable
from specpool_speculator.tree.draft_tree import DraftTree
from specpool_speculator.tree.node import Node, NodeRanks

PROMPT = [1, 2, 3, 4, 5, 6]


class Forest:
    """A tree and the model that computes it."""

    def __init__(self) -> None:
        self.pool = BlockPool(64, 4)
        self.model = ToyModel(ToyTable(16, 3), self.pool)
        self.tree = DraftTree(self.pool, PROMPT)

    def run(self, *works) -> None:
        logits = self.model.forward([Segment(kv=w.kv, tokens=w.tokens, num_logits=len(w.nodes)) for w in works])
        rows = iter(logits.argsort(dim=1, descending=True).tolist())
        for work in works:
            ranks = [tuple(next(rows)) for _ in work.nodes]
            work.finish([NodeRanks(row, row) for row in ranks])

    def compute_path(self) -> None:
        while (work := self.tree.work_on_path(set(), 100)) is not None:
            self.run(work)

    def compute(self, *nodes: Node) -> None:
        taken: set[int] = set()
        self.run(*[self.tree.work_on(node, taken) for node in nodes])

    def check(self) -> None:
        """Every computed node's block table holds exactly its path."""
        for node in self.tree.root.subtree():
            if node.kv is not None:
                path = []
                walk: Node | None = node
                while walk is not None:
                    path.append(walk.token)
                    walk = walk.parent
                assert self.model.tokens_of(node.kv, node.position + 1) == [*self.tree.tokens[:-1], *path[::-1]]


@pytest.fixture
def forest() -> Forest:
    built = Forest()
    built.tree.set_path([7, 8])
    built.compute_path()
    return built


def test_branches_of_one_tip_in_one_forward_are_isolated(forest: Forest) -> None:
    tip = forest.tree.path[-1]
    forest.compute(*[tip.child(token) for token in (1, 2, 3)])
    forest.compute(*[tip.child(token).child(9) for token in (1, 2, 3)])
    forest.check()


def test_outcome_keeps_the_branch_and_frees_the_rest(forest: Forest) -> None:
    root, v1, _ = forest.tree.path
    kept, other = v1.child(9), root.child(3)
    forest.compute(kept, other)
    deeper = kept.child(4)
    forest.compute(deeper)
    num_tokens = forest.model.num_tokens
    forest.tree.commit(1, 9)
    assert forest.tree.tokens == [*PROMPT, 7, 9]
    assert forest.tree.root is kept
    assert deeper.is_computed
    forest.tree.set_path([4])
    assert forest.tree.missing() == 0
    assert forest.model.num_tokens == num_tokens
    assert forest.pool.num_used == 3  # nine tokens
    forest.check()


def test_unguessed_outcome_continues_after_the_accepted_context(forest: Forest) -> None:
    forest.tree.commit(1, 15)
    assert forest.tree.missing() == 1
    forest.tree.set_path([3, 3])
    assert forest.tree.missing() == 3
    forest.compute_path()
    forest.check()
    assert forest.pool.num_used == 3


def test_outcome_before_anything_was_computed() -> None:
    forest = Forest()
    forest.tree.set_path([7])
    forest.tree.commit(1, 2)
    assert forest.tree.missing() == len(PROMPT) + 2
    forest.compute_path()
    forest.check()
    assert forest.tree.round == 1


def test_outcome_in_the_middle_of_the_prefill() -> None:
    forest = Forest()
    work = forest.tree.work_on_path(set(), 3)
    assert work is not None
    assert (work.tokens, work.nodes) == ([1, 2, 3], [])
    forest.run(work)
    forest.tree.commit(0, 9)
    assert forest.tree.missing() == 4
    forest.compute_path()
    forest.check()


def test_prune_and_evict_give_blocks_back(forest: Forest) -> None:
    forest.compute(*[forest.tree.path[-1].child(token) for token in (1, 2, 3)])
    forest.tree.prune()
    assert forest.pool.num_used == 2
    forest.check()
    forest.tree.evict()
    assert forest.pool.num_used == 0
    forest.compute_path()
    forest.check()
    assert forest.tree.draft_tokens == [7, 8]


def test_cancelled_work_leaves_nothing(forest: Forest) -> None:
    num_used = forest.pool.num_used
    taken: set[int] = set()
    works = [forest.tree.work_on(forest.tree.path[0].child(token), taken) for token in (1, 2)]
    for work in works:
        work.cancel()
    assert forest.pool.num_used == num_used
    forest.tree.free()
    assert forest.pool.num_used == 0
