"""What to do when the speculation cache misses, from measured times.

Draft just in time, and the target waits for it; or go on with a backup that costs nothing (prompt lookup,
or no tokens). The larger the batch, the more often some sequence of it misses and makes all wait: from
batch size b* on, the backup is better. b* is computed, never configured.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

TimeOfBatch = Callable[[int], float]
"""Seconds as a function of batch size."""


@dataclass(frozen=True, slots=True)
class TimeTable:
    """Measured seconds by batch size, linear in between, the nearest value outside."""

    seconds: Mapping[int, float]
    """At least one measured batch size."""

    def __call__(self, batch_size: int) -> float:
        sizes = sorted(self.seconds)
        right = bisect_right(sizes, batch_size)
        if right == 0 or right == len(sizes):
            return self.seconds[sizes[max(right - 1, 0)]]
        low, high = sizes[right - 1], sizes[right]
        share = (batch_size - low) / (high - low)
        return self.seconds[low] * (1 - share) + self.seconds[high] * share


@dataclass(frozen=True, kw_only=True, slots=True)
class MissCosts:
    """What is measured to choose between the two fallbacks."""

    hit_rate: float
    """Probability that one sequence's outcome is in the cache."""
    tokens_on_hit: float
    """Expected tokens of a round after a hit, the bonus included."""
    tokens_just_in_time: float
    """The same with tokens drafted just in time."""
    tokens_backup: float
    """The same with the backup's tokens; 1 for no tokens at all."""
    lookahead: int
    """Draft steps of a just-in-time speculation."""


def expected_tokens(num_draft: int, acceptance: float) -> float:
    """Expected tokens of a round that verifies ``num_draft`` tokens: 1 + a + ... + a^K."""
    return sum(acceptance**k for k in range(num_draft + 1))


def expected_speed(
    *,
    hit_rate: float,
    tokens_on_hit: float,
    tokens_on_miss: float,
    predict_time: float,
    backup_time: float,
    batch_size: int = 1,
) -> float:
    """Expected speed of SSD over plain decoding.

    Args:
        hit_rate: of one sequence; a batch goes on without waiting only if all of it hits.
        tokens_on_hit: expected tokens of a round after a hit.
        tokens_on_miss: expected tokens of a round after a miss.
        predict_time: of filling the cache, in units of one verification (hidden up to 1).
        backup_time: of the fallback, in units of one verification (never hidden).
        batch_size: sequences that share each round.
    """
    tokens = hit_rate * tokens_on_hit + (1 - hit_rate) * tokens_on_miss
    all_hit = hit_rate**batch_size
    return tokens / (all_hit * max(1.0, predict_time) + (1 - all_hit) * (1 + backup_time))


def batch_size_threshold(
    costs: MissCosts, *, verify_s: TimeOfBatch, draft_step_s: TimeOfBatch, max_batch_size: int
) -> int:
    """b*: the smallest batch size at which the backup is at least as fast as drafting just in time.

    ``max_batch_size + 1`` when there is none. Filling the cache is taken to take as long as drafting
    ``lookahead`` tokens, in both cases.
    """
    for batch_size in range(1, max_batch_size + 1):
        draft_time = costs.lookahead * draft_step_s(batch_size) / verify_s(batch_size)
        just_in_time, backup = (
            expected_speed(
                hit_rate=costs.hit_rate,
                tokens_on_hit=costs.tokens_on_hit,
                tokens_on_miss=tokens,
                predict_time=draft_time,
                backup_time=time,
                batch_size=batch_size,
            )
            for tokens, time in ((costs.tokens_just_in_time, draft_time), (costs.tokens_backup, 0.0))
        )
        if backup >= just_in_time:
            return batch_size
    return max_batch_size + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftTimes:
    """How fast further tokens would come."""

    first_s: float
    """Seconds until the first token."""
    step_s: float
    """Seconds per further token."""
    forward_s: float = 0.0
    """Of the others in the batch: they go on meanwhile, and whoever waited joins them between two forwards."""

    def waiting_s(self, num_tokens: int) -> float:
        """Seconds until `num_tokens` can be verified."""
        seconds = self.first_s + (num_tokens - 1) * self.step_s
        return math.ceil(seconds / self.forward_s) * self.forward_s if self.forward_s > 0 else seconds


@dataclass(frozen=True, slots=True)
class FallbackChoice:
    """What to verify after a miss."""

    depth: int
    """Tokens to draft just in time; 0 is the backup, at once."""
    gain: float
    """Expected tokens by which it beats the backup; 0 for the backup."""
    waiting_s: float
    """How long it will take."""


NO_WAIT: Final = FallbackChoice(0, 0.0, 0.0)


def choose_fallback(
    times: DraftTimes,
    *,
    lookahead: int,
    acceptance: float,
    steady_tokens_per_s: float,
    tokens_backup: float = 1.0,
) -> FallbackChoice:
    """How deep to draft just in time after a miss, or 0 for the backup.

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
