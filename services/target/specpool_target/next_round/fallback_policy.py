"""What to do after a miss, from what this target measures: wait for a just-in-time speculation, or use the backup."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

from specpool.algorithm.estimators import AcceptanceEstimator, Average
from specpool.algorithm.fallback import NO_WAIT, DraftTimes, FallbackChoice, TimeTable, choose_fallback, expected_tokens
from specpool_target.config import Fallback

_ROUNDS_AFTER_MISS: Final = 32
"""About so many of the rounds after misses are remembered, the latest."""
_PRIOR_WEIGHT: Final = 8.0
"""What is expected of the rounds after misses weighs as much as so many that were measured."""
_CHOICES_PER_TRIAL: Final = 16
"""Once in so many misses, what is usually not done is done, so that both are measured."""
_BACKUP_ACCEPTANCE_PRIOR: Final = 0.4


class _Recent:
    """Mean of the last few values, and of what was expected, which counts as `_PRIOR_WEIGHT` values."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0.0

    def observe(self, value: float) -> None:
        """Take in one more value."""
        keep = 1 - 1 / _ROUNDS_AFTER_MISS
        self._sum = self._sum * keep + value
        self._count = self._count * keep + 1

    def mean(self, expected: float) -> float:
        """The mean; `expected` where nothing was observed."""
        return (self._sum + _PRIOR_WEIGHT * expected) / (self._count + _PRIOR_WEIGHT)


class FallbackPolicy:
    """Keeps the measurements, and chooses by them whether a miss waits or uses the backup."""

    def __init__(self, fallback: Fallback = "auto") -> None:
        """`fallback` is the setting of that name."""
        self._fallback = fallback
        self._acceptance = AcceptanceEstimator()
        self._waited_acceptance = AcceptanceEstimator()
        """Acceptance of what was drafted just in time after a miss: what nobody guessed is followed by what is hard to
        guess."""
        self._backup_acceptance = AcceptanceEstimator(_BACKUP_ACCEPTANCE_PRIOR)
        self._round_s = Average()
        self._tokens_per_round = Average()
        self._tokens_after_backup = _Recent()
        self._tokens_after_wait = _Recent()
        self._num_choices = 0
        self._verify_s: dict[int, Average] = {}

    @property
    def acceptance(self) -> float:
        """Acceptance rate a of the speculator's draft tokens, each given those before it; 0 to 1."""
        return self._acceptance.value

    @property
    def backup_acceptance(self) -> float:
        """Acceptance rate of the backup's tokens, each given those before it; 0 to 1."""
        return self._backup_acceptance.value

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of one sequence; 0: not measured yet."""
        return self._tokens_per_round.value / self._round_s.value if self._round_s.value > 0 else 0.0

    def observe_step(self, batch_size: int, seconds: float) -> None:
        """Take in one verification of `batch_size` sequences."""
        self._verify_s.setdefault(batch_size, Average()).observe(seconds)

    def observe_round(
        self,
        num_draft: int,
        num_accepted: int,
        seconds: float,
        *,
        from_backup: bool,
        num_tail: int = 0,
        waited: bool = False,
    ) -> None:
        """Take in one round of one sequence.

        The last `num_tail` of the draft tokens were the backup's in any case; `waited`: the others were drafted just in
        time, after a miss.
        """
        num_first = num_draft - num_tail
        first = self._backup_acceptance if from_backup else self._acceptance
        first.observe(min(num_accepted, num_first), num_first)
        if waited:
            self._waited_acceptance.observe(min(num_accepted, num_first), num_first)
        if num_accepted >= num_first:
            self._backup_acceptance.observe(num_accepted - num_first, num_tail)
        self._round_s.observe(seconds)
        self._tokens_per_round.observe(1 + num_accepted)

    def observe_round_after_miss(self, num_accepted: int, *, waited: bool) -> None:
        """Take in the round that followed a round that began with a miss.

        After a backup the speculator has had a whole round for few outcomes, after a wait a round for many: the next
        hit comes more easily after the one than after the other, how much more is measured.
        """
        (self._tokens_after_wait if waited else self._tokens_after_backup).observe(1 + num_accepted)

    def choose(self, times: DraftTimes, *, batch_size: int, lookahead: int, num_backup: int) -> FallbackChoice:
        """Choose what to do after a miss: wait for so many tokens, or do not wait.

        Args:
            times: of tokens drafted now, for this sequence alone.
            batch_size: sequences in the batch. With others in it, whoever waits misses the forwards that start
                meanwhile.
            lookahead: K.
            num_backup: tokens of the backup at hand.
        """
        if not 0 < times.step_s < math.inf:
            return NO_WAIT  # nothing measured yet, or nonsense: the speculator reports it
        if self._fallback == "backup" or self._round_s.value <= 0:
            return NO_WAIT  # never wait on a guess
        if self._fallback == "wait":
            return FallbackChoice(lookahead, 0.0, times.waiting_s(lookahead))
        choice = self._choose(times, batch_size, lookahead, num_backup)
        self._num_choices += 1
        if self._num_choices % _CHOICES_PER_TRIAL == 0:
            return NO_WAIT if choice.depth else self._choose(times, batch_size, lookahead, num_backup, is_trial=True)
        return choice

    def _choose(
        self, times: DraftTimes, batch_size: int, lookahead: int, num_backup: int, *, is_trial: bool = False
    ) -> FallbackChoice:
        """Choose by what misses taught; `is_trial`: as if rounds after them were like all others."""
        lead = 0.0 if is_trial else self._lead_of_backup(times, batch_size, lookahead)
        if batch_size > 1:
            times = replace(times, forward_s=self._verify_time(batch_size - 1))
        return choose_fallback(
            times,
            lookahead=lookahead,
            acceptance=self._acceptance.value if is_trial else self._acceptance_after_miss(),
            steady_tokens_per_s=self.tokens_per_s,
            tokens_backup=expected_tokens(num_backup, self._backup_acceptance.value) + lead,
        )

    def _acceptance_after_miss(self) -> float:
        return min(self._acceptance.value, self._waited_acceptance.value)

    def _lead_of_backup(self, times: DraftTimes, batch_size: int, lookahead: int) -> float:
        """Tokens by which the round after a backup beats the one after a wait.

        Before misses have taught it: after a backup the speculator drafts for a whole forward what follows one known
        token, the first of which is that round's own; after a wait it has many outcomes to draft for, as usual. The
        backup is not expected to do worse than that.
        """
        drafting_s = self._verify_time(batch_size) - times.first_s
        depth = min(lookahead, int(max(0.0, drafting_s) / times.step_s))
        usual = self._tokens_per_round.value
        after_backup = max(usual, expected_tokens(depth, self._acceptance_after_miss()))
        return self._tokens_after_backup.mean(after_backup) - self._tokens_after_wait.mean(usual)

    def _verify_time(self, batch_size: int) -> float:
        if not self._verify_s:
            return 0.0
        return TimeTable({size: average.value for size, average in self._verify_s.items()})(batch_size)
