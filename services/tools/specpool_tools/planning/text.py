"""Text without a model: at every position the target's token, and its rank in the draft, are drawn from given laws.

A draft whose context is the target's text has the target's token at the drawn rank, everything else at other ranks.
A draft that left the text drafts tokens that the target will never choose. How sure it is of its first token is drawn
too, on the text and off it, and on the text it is right that often.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.paged_kv import BlockPool, reserve_all
from specpool_speculator.tree.node import Node, NodeRanks
from specpool_speculator.tree.sequence import SequenceState
from specpool_tools.planning.profile import Profile

VOCAB_SIZE = 1 << 20
"""Size of the vocabulary, so large that two tokens drawn at random never meet."""
_MAX_CONTEXT = 1 << 20
_LEAST_EXPONENT = 1e-9
_LARGEST_POWER = 20.0
_NUM_CONFIDENCES = 1 << 12
_LARGEST_SPREAD = 0.98
"""Largest spread that `betavariate` can draw: beyond it its results underflow, and nearly all of them are 0 or 1."""


class Place(NamedTuple):
    """A position of the text."""

    token: int
    """The target's own token."""
    rank: int
    """Rank of the target's token in the draft, from 0."""
    confidence: float
    """The draft's probability of its first token."""


def draw_confidence(profile: Profile, rng: random.Random) -> float:
    """Draw from the Beta distribution with the profile's mean and variance."""
    mean, spread = profile.acceptance, profile.confidence_spread
    if spread == 0 or mean in (0, 1):
        return mean
    if spread > _LARGEST_SPREAD:
        return float(rng.random() < mean)
    weight = 1 / spread - 1
    return rng.betavariate(mean * weight, (1 - mean) * weight)


class SimulatedText:
    """The target's tokens of all sequences, and their ranks."""

    def __init__(self, profile: Profile, seed: int) -> None:
        self.profile = profile
        self._seed = seed
        self._drawn: dict[str, list[Place]] = {}
        self._generators: dict[str, random.Random] = {}

    def at(self, sequence_id: str, position: int) -> Place:
        """What was drawn for a position of a sequence."""
        drawn = self._drawn.setdefault(sequence_id, [])
        if position >= len(drawn):
            rng = self._generators.setdefault(sequence_id, random.Random(f"{self._seed} {sequence_id}"))
            drawn.extend(self._draw(rng) for _ in range(len(drawn), position + 64))
        return drawn[position]

    def token(self, sequence_id: str, position: int) -> int:
        """The target's own token at a position of a sequence."""
        return self.at(sequence_id, position).token

    def _draw(self, rng: random.Random) -> Place:
        token, confidence = rng.randrange(VOCAB_SIZE), draw_confidence(self.profile, rng)
        return Place(token, self._draw_rank(rng, confidence), confidence)

    def _draw_rank(self, rng: random.Random, confidence: float) -> int:
        """Draw a rank: 0 as often as the draft expects, else by the miss law."""
        if rng.random() < confidence:
            return 0
        profile, drawn = self.profile, 1 - rng.random()
        if profile.miss_constant <= drawn:
            return 1
        # P(rank > F) = c / F^r, inverted
        power = math.log(profile.miss_constant / drawn) / max(profile.miss_exponent, _LEAST_EXPONENT)
        return int(math.exp(min(power, _LARGEST_POWER))) + 1


class SimulatedModel:
    """Keeps block tables as a model does, and computes nothing."""

    def __init__(self, num_blocks: int = 1 << 16, block_size: int = 1 << 12) -> None:
        self.vocab_size = VOCAB_SIZE
        self.max_context = _MAX_CONTEXT
        self.pool = BlockPool(num_blocks, block_size)
        self.device = torch.device("cpu")

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Write the segments to their block tables; there are no logits, since ranks come from `SimulatedRanker`."""
        reserve_all(self.pool, ((segment.kv, len(segment.tokens)) for segment in segments))
        self.pool.take_copies()
        for segment in segments:
            segment.kv.advance(len(segment.tokens))
        return torch.empty(0)


@dataclass(slots=True)
class _SimulatedRanks(NodeRanks):
    """What comes after a node, and whether the node is still the target's text."""

    is_text: bool = False


class SimulatedRanker:
    """Ranks nodes by the drawn text instead of by logits."""

    def __init__(self, text: SimulatedText, num_ranks: int) -> None:
        self._text = text
        self._num_ranks = num_ranks
        profile = text.profile
        hits = [1 - min(1.0, profile.miss_constant / f**profile.miss_exponent) for f in range(1, num_ranks)]
        self._within = [after - before for before, after in zip([0.0, *hits], hits, strict=False)]
        rng = random.Random("off the text")
        # How likely the ranks of a node off the text are, for some confidences: one of these is taken.
        self._off_text = [self._shares(draw_confidence(profile, rng)) for _ in range(_NUM_CONFIDENCES)]

    def rank(self, logits: Tensor, rows: Sequence[tuple[SequenceState, Node]]) -> list[NodeRanks]:
        return [self._ranks(sequence, node) for sequence, node in rows]

    def _ranks(self, sequence: SequenceState, node: Node) -> NodeRanks:
        sequence_id, position = sequence.key[1], node.position + 1
        first = (node.token * 2654435761 + position * 40503) % (VOCAB_SIZE - self._num_ranks)
        tokens = range(first, first + self._num_ranks)
        if not self._is_text(sequence_id, node):
            drafted = tuple(tokens)
            return _SimulatedRanks(drafted, drafted, None, (), self._off_text[first % _NUM_CONFIDENCES])
        place = self._text.at(sequence_id, position)
        drafted = tuple(tokens)
        if place.rank < self._num_ranks:
            drafted = (*drafted[: place.rank], place.token, *drafted[place.rank + 1 :])
        return _SimulatedRanks(drafted, drafted, None, (), self._shares(place.confidence), is_text=True)

    def _shares(self, confidence: float) -> tuple[float, ...]:
        """Probabilities of the ranks where the draft is that sure of its first token."""
        return (confidence, *[(1 - confidence) * share for share in self._within])

    def _is_text(self, sequence_id: str, node: Node) -> bool:
        """Whether a node and all before it are the target's text: committed tokens always are."""
        if node.parent is None:
            return True
        ranks = node.parent.ranks
        is_text = isinstance(ranks, _SimulatedRanks) and ranks.is_text if node.parent.parent is not None else True
        return is_text and node.token == self._text.token(sequence_id, node.position)
