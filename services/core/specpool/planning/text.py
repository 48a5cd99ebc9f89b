"""Text without a model: at every position the target's token, and its rank in the draft, are drawn from given laws.

A draft whose context is the target's text has the target's token at the drawn rank, everything else at other ranks.
A draft that left the text drafts tokens that the target will never choose.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from specpool.modeling.interface import Segment
from specpool.modeling.paged_kv import BlockPool, reserve_all
from specpool.planning.profile import Profile
from specpool_speculator.draft_tree import Node, NodeRanks
from specpool_speculator.sequence import SequenceState

VOCAB_SIZE = 1 << 20
"""Large enough that two tokens drawn at random never meet."""
_MAX_CONTEXT = 1 << 20
_LEAST_EXPONENT = 1e-9
_LARGEST_POWER = 20.0


class SimulatedText:
    """The target's tokens of all sequences, and their ranks."""

    def __init__(self, profile: Profile, seed: int) -> None:
        self.profile = profile
        self._seed = seed
        self._drawn: dict[str, list[tuple[int, int]]] = {}
        self._generators: dict[str, random.Random] = {}

    def at(self, sequence_id: str, position: int) -> tuple[int, int]:
        """The target's own token there, and its rank in the draft: 0 with the acceptance rate, else by the miss law."""
        drawn = self._drawn.setdefault(sequence_id, [])
        if position >= len(drawn):
            rng = self._generators.setdefault(sequence_id, random.Random(f"{self._seed} {sequence_id}"))
            drawn.extend((rng.randrange(VOCAB_SIZE), self._draw_rank(rng)) for _ in range(len(drawn), position + 64))
        return drawn[position]

    def token(self, sequence_id: str, position: int) -> int:
        """The target's own."""
        return self.at(sequence_id, position)[0]

    def _draw_rank(self, rng: random.Random) -> int:
        if rng.random() < self.profile.acceptance:
            return 0
        profile, drawn = self.profile, 1 - rng.random()
        if profile.miss_constant <= drawn:
            return 1
        # P(rank > F) = c / F^r, inverted
        power = math.log(profile.miss_constant / drawn) / max(profile.miss_exponent, _LEAST_EXPONENT)
        return int(math.exp(min(power, _LARGEST_POWER))) + 1


class SimulatedModel:
    """Keeps block tables as a model does, and computes nothing."""

    def __init__(self, num_blocks: int = 1 << 16, block_size: int = 64) -> None:
        self.vocab_size = VOCAB_SIZE
        self.max_context = _MAX_CONTEXT
        self.pool = BlockPool(num_blocks, block_size)
        self.device = torch.device("cpu")

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """No logits: ranks come from `SimulatedRanker`."""
        reserve_all(self.pool, ((segment.kv, len(segment.tokens)) for segment in segments))
        self.pool.take_copies()
        for segment in segments:
            segment.kv.advance(len(segment.tokens))
        return torch.empty(0)


class SimulatedRanker:
    """Ranks of nodes from the drawn text."""

    def __init__(self, text: SimulatedText, num_ranks: int) -> None:
        self._text = text
        self._num_ranks = num_ranks
        profile = text.profile
        # What the draft would know of itself on average; it is equally sure everywhere.
        hits = [1 - min(1.0, profile.miss_constant / f**profile.miss_exponent) for f in range(1, num_ranks)]
        within = [after - before for before, after in zip([0.0, *hits], hits, strict=False)]
        self._probabilities = (profile.acceptance, *((1 - profile.acceptance) * share for share in within))

    def rank(self, logits: Tensor, rows: Sequence[tuple[SequenceState, Node]]) -> list[NodeRanks]:
        """See `Ranker.rank`."""
        return [self._ranks(sequence, node) for sequence, node in rows]

    def _ranks(self, sequence: SequenceState, node: Node) -> NodeRanks:
        sequence_id, position = sequence.key[1], node.position + 1
        first = (node.token * 2654435761 + position * 40503) % (VOCAB_SIZE - self._num_ranks)
        tokens = list(range(first, first + self._num_ranks))
        if self._is_text(sequence_id, node):
            token, rank = self._text.at(sequence_id, position)
            if rank < self._num_ranks:
                tokens[rank] = token
        return NodeRanks(tuple(tokens), tuple(tokens), None, (), self._probabilities)

    def _is_text(self, sequence_id: str, node: Node) -> bool:
        current: Node | None = node
        while current is not None and current.parent is not None:
            if current.token != self._text.token(sequence_id, current.position):
                return False
            current = current.parent
        return True
