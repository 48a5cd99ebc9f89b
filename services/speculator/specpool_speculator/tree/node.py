"""One token of a draft tree, and what the draft says comes after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from specpool_engine.modeling.paged_kv import SequenceKV
from specpool_speculator.dense.dense_rows import DenseRow


@dataclass(frozen=True, slots=True)
class TokenDistribution:
    """The sparse distribution that one drafted token was sampled from."""

    token_ids: tuple[int, ...]
    """Tokens that could be drawn."""
    probabilities: tuple[float, ...]
    """Probabilities of these tokens; they sum to 1."""


@dataclass(slots=True)  # not frozen: one is made for every row, and that would take several times as long
class NodeRanks:
    """What the draft says comes after a node."""

    drafted: tuple[int, ...]
    """Rank 0 is drafted; the others guess what the target puts there when it rejects rank 0."""
    bonus: tuple[int, ...]
    """Guesses for the bonus token if the draft tokens end at this node."""
    distribution: TokenDistribution | DenseRow | None = None
    """What rank 0 was sampled from, for rejection verification."""
    scores: tuple[float, ...] = ()
    """Scores of the drafted ranks; empty for rejection verification."""
    probabilities: tuple[float, ...] = ()
    """Probabilities of the drafted ranks to be the target's token, by what was known when the node was computed; empty
    for rejection verification."""

    def probability(self, token: int) -> float:
        """Probability that `token` is the target's; only where there are `probabilities`."""
        if token in self.drafted:
            return self.probabilities[self.drafted.index(token)]
        return max(0.0, 1 - sum(self.probabilities))


@dataclass(eq=False, slots=True)
class Node:
    """One token in the tree."""

    token: int
    """Token id."""
    position: int
    """Index in the whole sequence."""
    parent: Node | None = None
    """The node before this one; None for the root."""
    children: dict[int, Node] = field(default_factory=dict)
    """Nodes after this one, by token; uncomputed ones may be created at will."""
    ranks: NodeRanks | None = None
    """What the draft says comes after this node; None until computed."""
    kv: SequenceKV | None = None
    """Block table that holds the path to this node and possibly more; None until computed."""

    @property
    def is_computed(self) -> bool:
        """Whether the model has run this token."""
        return self.ranks is not None

    def child(self, token: int) -> Node:
        """The child with that token, created when absent."""
        node = self.children.get(token)
        if node is None:
            node = self.children[token] = Node(token, self.position + 1, self)
        return node

    def subtree(self) -> Iterator[Node]:
        """This node and everything below it."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def guesses(self, draft_token: int | None) -> Sequence[int]:
        """Guesses for the target's own token after this node, best first, when it verifies `draft_token` there."""
        assert self.ranks is not None
        if draft_token is None:
            return self.ranks.bonus
        if self.ranks.drafted[0] == draft_token:
            return self.ranks.drafted[1:]
        return [token for token in self.ranks.bonus if token != draft_token]

    def chain(self, limit: int) -> tuple[list[int], Node]:
        """Up to `limit` tokens drafted after this node, and the last node reached (uncomputed if below `limit`)."""
        tokens: list[int] = []
        node = self
        while node.ranks is not None and len(tokens) < limit:
            tokens.append(node.ranks.drafted[0])
            node = node.child(tokens[-1])
        return tokens, node
