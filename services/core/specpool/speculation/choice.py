"""Which speculator a sequence gets, and when it moves: pure functions of what is known of the speculators."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_SLACK: Final = 4
"""Sequences more than the emptiest that an engine's own speculator may have while the engine keeps to it."""
_WORTH_MOVING: Final = 1.4
"""How many times as good as the present place another must be."""
_PER_LABEL: Final = 0.5
"""What a label that differs (another zone, another node) adds to the cost of a place, as a share."""
_FREE_ROUND_TRIP_S: Final = 0.005
"""Seconds of round trip below which the time is Python's, not the network's."""
_DOUBLING_ROUND_TRIP_S: Final = 0.020
"""Seconds of further round trip that make a place twice as costly."""
_FULL_KV: Final = 4.0
"""How many times as much a place without free memory costs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A speculator that could take a sequence."""

    address: str
    num_sequences: int
    """Number of sequences of all engines, ours as of now."""
    row_budget: int
    """Rows per draft step that all sequences there share."""
    max_sequences: int = 0
    """Number of sequences beyond which it refuses more; 0: not known."""
    num_labels_apart: int = 0
    """Number of labels (zone, node) in which it differs from us."""
    round_trip_s: float = 0.0
    """Shortest measured round trip in seconds; 0: none yet."""
    has_free_kv: bool = True
    """Whether another sequence finds room in its KV cache."""

    @property
    def is_full(self) -> bool:
        """Whether it would refuse another sequence."""
        return 0 < self.max_sequences <= self.num_sequences

    def cost(self, num_others: int) -> float:
        """Cost of a place beside `num_others` sequences: their number per row, more at a speculator far away."""
        far = 1 + _PER_LABEL * self.num_labels_apart
        late = 1 + max(0.0, self.round_trip_s - _FREE_ROUND_TRIP_S) / _DOUBLING_ROUND_TRIP_S
        return (num_others + 1) / max(1, self.row_budget) * far * late * (1 if self.has_free_kv else _FULL_KV)


def choose(candidates: Sequence[Candidate], key: str) -> Candidate | None:
    """The place for another sequence.

    Among those that are about as good as the best it is the one with the highest hash of (key, address): engines
    spread over idle speculators, each keeps to few of them, and one that comes or goes moves only its own.
    """
    with_room = [candidate for candidate in candidates if not candidate.is_full]
    if not with_room:
        return None
    best = min(with_room, key=lambda candidate: candidate.cost(candidate.num_sequences))
    good = [
        c
        for c in with_room
        if c.cost(max(0, c.num_sequences - (_SLACK if c.num_labels_apart <= best.num_labels_apart else 0)))
        <= best.cost(best.num_sequences)
    ]
    return max(good, key=lambda c: hashlib.sha256(f"{key}\0{c.address}".encode()).digest())


def is_worth_moving(current: Candidate, other: Candidate) -> bool:
    """Whether a sequence at `current` would be better off at `other`, by so much that it would not soon go back."""
    if other.num_labels_apart < current.num_labels_apart:
        num_others = current.num_sequences - 1
    else:
        num_others = max(0, current.num_sequences - 1 - _SLACK)
    return current.cost(num_others) > _WORTH_MOVING * other.cost(other.num_sequences)
