"""K of requests that name none, from what this target measures; 0 while plain decoding is faster."""

from __future__ import annotations

from typing import Final

from specpool.algorithm.row_times import RowTimes, best_lookahead
from specpool.speculation import Measurements
from specpool_target.engine.sequence import SpeculationMode
from specpool_target.next_round.fallback_policy import FallbackPolicy
from specpool_target.next_round.speculation_trials import SpeculationTrials, Verdict

_STEPS_PER_CHOICE: Final = 16
_PLAIN_STEPS_PER_SAMPLE: Final = 16
"""While speculation pauses, one plain step in so many is sampled, so that the times of larger forwards are not
forgotten."""


class LookaheadPolicy:
    """Computes K anew every few steps, so that it follows what drifts."""

    def __init__(self, fallback: FallbackPolicy, *, max_lookahead: int) -> None:
        self._fallback = fallback
        self._max_lookahead = max_lookahead
        self._verify_time = RowTimes()
        self._num_steps = 0
        self._lookaheads: dict[tuple[SpeculationMode, int], int] = {}
        """K by mode and batch size, since the last time that all were forgotten."""
        self._worthwhile: dict[tuple[int, int, int], int] = {}
        """Tokens of the backup that are worth verifying in this step, by what it depends on besides measurements."""
        self.trials = SpeculationTrials(self._verify_time)
        """Trials that tell whether to speculate at all."""

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """One forward that verified `num_tokens`, those of all sequences and their bonus positions."""
        self._num_steps += 1
        self._worthwhile.clear()
        if not self.trials.is_pausing or self._num_steps % _PLAIN_STEPS_PER_SAMPLE == 0:
            self._verify_time.observe(num_tokens, seconds)
        if self._num_steps % _STEPS_PER_CHOICE == 0:
            self._lookaheads.clear()

    def lookahead(self, mode: SpeculationMode, measured: Measurements | None, batch_size: int) -> int:
        """Lookahead K in mode SD or SSD; 0: plain decoding. In a pause it is the most of the backup's tokens."""
        if self.trials.verdict(mode, batch_size) is Verdict.PLAIN:
            return 0
        if self._num_steps < _STEPS_PER_CHOICE or measured is None:
            return self._max_lookahead
        if (mode, batch_size) not in self._lookaheads:
            step_s = measured.draft_step_s if mode is SpeculationMode.SD else 0.0
            self._lookaheads[mode, batch_size] = best_lookahead(
                self._max_lookahead,
                acceptance=self._fallback.acceptance,
                verify_s=lambda k: self._verify_time(batch_size * (k + 1)),
                draft_s=lambda k: measured.round_trip_s + k * step_s if step_s else 0.0,
            )
        return self._lookaheads[mode, batch_size]

    def worthwhile_backup(self, num_draft: int, num_backup: int, batch_size: int) -> int:
        """How many of the backup's tokens behind `num_draft` others are worth the time that they add to the forward.

        Others in the batch have about as many tokens, and wait as long.
        """
        if self._num_steps < _STEPS_PER_CHOICE or not num_backup:
            return num_backup
        key = (num_draft, num_backup, batch_size)
        if key not in self._worthwhile:
            self._worthwhile[key] = self._worthwhile_now(num_draft, num_backup, batch_size)
        return self._worthwhile[key]

    def _worthwhile_now(self, num_draft: int, num_backup: int, batch_size: int) -> int:
        accepted = self._fallback.acceptance**num_draft
        tokens_per_s = batch_size * self._fallback.tokens_per_s
        for count in range(num_backup):
            accepted *= self._fallback.backup_acceptance
            num_tokens = batch_size * (1 + num_draft) + count
            added_s = self._verify_time(num_tokens + 1) - self._verify_time(num_tokens)
            if accepted < added_s * tokens_per_s:
                return count
        return num_backup

    def explain(self) -> str:
        """The K in use and why, in words, for status."""
        if self._num_steps < _STEPS_PER_CHOICE:
            return f"K={self._max_lookahead}: nothing measured yet"
        time = self._verify_time
        chosen = [
            f"K={k} for {mode.value} in batches of {size}" for (mode, size), k in sorted(self._lookaheads.items())
        ]
        return (
            f"{', '.join([*chosen, *self.trials.paused()]) or 'no K in use'}: "
            f"a forward takes {time.base_s * 1e3:.1f} ms and {time.per_row_s * 1e3:.2f} ms per token, "
            f"{self._fallback.acceptance:.1%} of draft tokens are accepted"
        )
