"""What to do when the speculation cache misses, from measured times.

Draft just in time, and the sequence waits for it; or go on with a backup that costs nothing (prompt lookup, or no
tokens). The larger the batch, the more is missed by waiting: whole forwards of the others.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class TimeTable:
    """Measured seconds by batch size, linear in between, the nearest value outside."""

    seconds: Mapping[int, float]
    """Seconds by batch size; at least one batch size was measured."""

    def __call__(self, batch_size: int) -> float:
        sizes = sorted(self.seconds)
        right = bisect_right(sizes, batch_size)
        if right == 0 or right == len(sizes):
            return self.seconds[sizes[max(right - 1, 0)]]
        low, high = sizes[right - 1], sizes[right]
        share = (batch_size - low) / (high - low)
        return self.seconds[low] * (1 - share) + self.seconds[high] * share


def expected_tokens(num_draft: int, acceptance: float) -> float:
    """Expected tokens of a round that verifies ``num_draft`` tokens: 1 + a + ... + a^K."""
    return sum(acceptance**k for k in range(num_draft + 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftTimes:
    """How fast the speculator would draft further tokens."""

    first_s: float
    """Seconds until the first token."""
    step_s: float
    """Seconds per further token."""
    forward_s: float = 0.0
    """Seconds of a forward of the batch's others: they go on meanwhile, and whoever waited joins them between two."""

    def waiting_s(self, num_tokens: int) -> float:
        """Seconds until `num_tokens` can be verified."""
        seconds = self.first_s + (num_tokens - 1) * self.step_s
        return math.ceil(seconds / self.forward_s) * self.forward_s if self.forward_s > 0 else seconds


@dataclass(frozen=True, slots=True)
class FallbackChoice:
    """What to verify after a miss: tokens drafted just in time, or the backup's."""

    depth: int
    """Number of tokens to draft just in time; 0 is the backup, at once."""
    gain: float
    """Expected tokens by which waiting beats the backup; 0 for the backup."""
    waiting_s: float
    """Seconds that the wait is expected to take."""


NO_WAIT: Final = FallbackChoice(0, 0.0, 0.0)


def choose_fallback(
    times: DraftTimes,
    *,
    lookahead: int,
    acceptance: float,
    steady_tokens_per_s: float,
    tokens_backup: float = 1.0,
) -> FallbackChoice:
    """Choose how deep to draft just in time after a miss; depth 0 is the backup.

    Waiting costs what would have been produced meanwhile: choose the depth with the largest expected tokens
    minus steady rate times waiting. Both choices are followed by one verification, whose time therefore
    drops out.

    Args:
        times: of tokens drafted now.
        lookahead: the largest depth.
        acceptance: per drafted token.
        steady_tokens_per_s: of this sequence over the recent rounds.
        tokens_backup: expected tokens of a round with the backup's tokens.
    """
    best = NO_WAIT
    for depth in range(1, lookahead + 1):
        waiting_s = times.waiting_s(depth)
        gain = expected_tokens(depth, acceptance) - tokens_backup - waiting_s * steady_tokens_per_s
        if gain > best.gain:
            best = FallbackChoice(depth, gain, waiting_s)
    return best
