"""What to do after a miss, from what this target measures: wait for a just-in-time speculation, or use the backup."""

from __future__ import annotations

from typing import Final

from specpool.algorithm.estimators import AcceptanceEstimator
from specpool.algorithm.fallback import (
    FallbackChoice,
    MissCosts,
    TimeTable,
    batch_size_threshold,
    choose_fallback,
    expected_tokens,
)

_SMOOTHING: Final = 0.1
_STEPS_PER_THRESHOLD: Final = 32
_BACKUP_ACCEPTANCE_PRIOR: Final = 0.4


class Average:
    """Exponential average; its first value is the first observation."""

    def __init__(self, smoothing: float = _SMOOTHING) -> None:
        self._smoothing = smoothing
        self.value = 0.0
        self.is_empty = True

    def observe(self, value: float) -> None:
        """One more observation."""
        self.value = value if self.is_empty else self.value + self._smoothing * (value - self.value)
        self.is_empty = False


class FallbackPolicy:
    """Keeps the measurements and recomputes b* now and then."""

    def __init__(self, *, max_batch_size: int, lookahead: int) -> None:
        self._lookahead = lookahead
        self._max_batch_size = max_batch_size
        self._acceptance = AcceptanceEstimator()
        self._backup_acceptance = AcceptanceEstimator(_BACKUP_ACCEPTANCE_PRIOR)
        self._backup_length = Average()
        self._hit_rate = Average(0.02)
        self._round_s = Average()
        self._tokens_per_round = Average()
        self._verify_s: dict[int, Average] = {}
        self._draft_step_s = Average()
        self._num_steps = 0
        self.batch_size_threshold = 0
        """b*; 0: not measured yet."""

    def observe_step(self, batch_size: int, seconds: float) -> None:
        """One verification of so many sequences."""
        self._verify_s.setdefault(batch_size, Average()).observe(seconds)
        self._num_steps += 1
        if self._num_steps % _STEPS_PER_THRESHOLD == 1:
            self._update_threshold()

    def observe_round(
        self, num_draft: int, num_accepted: int, seconds: float, *, from_backup: bool, num_tail: int = 0
    ) -> None:
        """One round of one sequence; the last `num_tail` of the draft tokens were the backup's in any case."""
        num_first = num_draft - num_tail
        first = self._backup_acceptance if from_backup else self._acceptance
        first.observe(min(num_accepted, num_first), num_first)
        if num_accepted >= num_first:
            self._backup_acceptance.observe(num_accepted - num_first, num_tail)
        self._round_s.observe(seconds)
        self._tokens_per_round.observe(1 + num_accepted)

    def observe_lookup(self, *, found: bool) -> None:
        """One lookup in the speculation cache."""
        self._hit_rate.observe(float(found))

    def choose(
        self, *, batch_size: int, lookahead: int, draft_step_s: float, round_trip_s: float, num_backup: int
    ) -> FallbackChoice:
        """After a miss in a batch of `batch_size`, with `num_backup` tokens of the backup at hand."""
        self._draft_step_s.observe(draft_step_s)
        self._backup_length.observe(num_backup)
        if draft_step_s <= 0 or self._round_s.value <= 0:
            return FallbackChoice(0, 0.0)  # nothing measured: never wait on a guess
        if 0 < self.batch_size_threshold <= batch_size:
            return FallbackChoice(0, 0.0)
        return choose_fallback(
            lookahead=lookahead,
            acceptance=self._acceptance.value,
            draft_step_s=draft_step_s,
            steady_tokens_per_s=self._tokens_per_round.value / self._round_s.value,
            round_trip_s=round_trip_s,
            tokens_backup=expected_tokens(num_backup, self._backup_acceptance.value),
        )

    def _update_threshold(self) -> None:
        if self._draft_step_s.value <= 0 or not self._verify_s:
            return
        lookahead = self._lookahead
        costs = MissCosts(
            hit_rate=self._hit_rate.value,
            tokens_on_hit=expected_tokens(lookahead, self._acceptance.value),
            tokens_just_in_time=expected_tokens(lookahead, self._acceptance.value),
            tokens_backup=expected_tokens(round(self._backup_length.value), self._backup_acceptance.value),
            lookahead=lookahead,
        )
        self.batch_size_threshold = batch_size_threshold(
            costs,
            verify_s=TimeTable({size: average.value for size, average in self._verify_s.items()}),
            draft_step_s=lambda batch_size: self._draft_step_s.value,
            max_batch_size=self._max_batch_size,
        )
