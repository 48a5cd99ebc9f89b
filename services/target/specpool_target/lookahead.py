"""K of requests that name none, from what this target measures; 0 while plain decoding is faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from specpool.algorithm.planning import RowTimes, best_lookahead
from specpool_target.fallback_policy import FallbackPolicy
from specpool_target.link import LinkMeasurements
from specpool_target.sequence import SpeculationMode

_STEPS_PER_PLAN: Final = 16
_STEPS_TO_SETTLE: Final = 4
"""At the beginning of a trial: the speculator is behind."""
_STEPS_PER_TRIAL: Final = 8
_ROUNDS_PER_TRIAL: Final = 48
"""Of all sequences together."""
_STEPS_PER_PAUSE: Final = 512
"""Then it is tried again: it costs a share of the time that hardly shows."""
_TOLERANCE: Final = 0.97
"""Speculation goes on down to this share of the plain speed, which is known only about as well."""


@dataclass(slots=True)
class _Trial:
    """What speculation brings in batches of about one size."""

    num_steps: int = 0
    num_rounds: int = 0
    num_tokens: float = 0.0
    plain_tokens: float = 0.0
    """What plain decoding would have brought in the same time."""
    pause: int = 0
    """Steps until the next trial."""

    def observe(self, batch_size: int, num_tokens: int, plain_tokens: float) -> None:
        self.num_steps += 1
        if self.num_steps <= _STEPS_TO_SETTLE:
            return
        self.num_rounds += batch_size
        self.num_tokens += num_tokens
        self.plain_tokens += plain_tokens
        if self.num_steps < _STEPS_TO_SETTLE + _STEPS_PER_TRIAL or self.num_rounds < _ROUNDS_PER_TRIAL:
            return
        pays = self.num_tokens >= _TOLERANCE * self.plain_tokens
        self.num_steps, self.num_rounds = (_STEPS_TO_SETTLE, 0) if pays else (0, 0)
        self.num_tokens = self.plain_tokens = 0.0
        self.pause = 0 if pays else _STEPS_PER_PAUSE


class LookaheadPlanner:
    """Plans K anew every few steps, so that it follows what drifts."""

    def __init__(self, policy: FallbackPolicy, *, max_lookahead: int) -> None:
        self._policy = policy
        self._max_lookahead = max_lookahead
        self._verify_time = RowTimes()
        self._num_steps = 0
        self._plans: dict[tuple[SpeculationMode, int], int] = {}
        """By batch size."""
        self._trials: dict[tuple[SpeculationMode, int], _Trial] = {}

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """One forward that verified `num_tokens`, those of all sequences and their bonus positions."""
        self._verify_time.observe(num_tokens, seconds)
        self._num_steps += 1
        if self._num_steps % _STEPS_PER_PLAN == 0:
            self._plans.clear()

    def observe_output(self, mode: SpeculationMode, batch_size: int, num_tokens: int, seconds: float) -> None:
        """Tokens of a whole batch in the `seconds` since its last step, waits included; all its K are planned."""
        trial = self._trial(mode, batch_size)
        if trial.pause:
            trial.pause -= 1
        elif self._num_steps >= _STEPS_PER_PLAN and (plain_s := self._verify_time(batch_size)) > 0:
            trial.observe(batch_size, num_tokens, batch_size * seconds / plain_s)

    def _trial(self, mode: SpeculationMode, batch_size: int) -> _Trial:
        return self._trials.setdefault((mode, batch_size.bit_length()), _Trial())

    def lookahead(self, mode: SpeculationMode, measured: LinkMeasurements | None, batch_size: int) -> int:
        """K in mode SD or SSD; 0: speculation does not pay in batches of this size."""
        if self._trial(mode, batch_size).pause:
            return 0
        if self._num_steps < _STEPS_PER_PLAN or measured is None:
            return self._max_lookahead
        if (mode, batch_size) not in self._plans:
            step_s = measured.draft_step_s if mode is SpeculationMode.SD else 0.0
            self._plans[mode, batch_size] = best_lookahead(
                self._max_lookahead,
                acceptance=self._policy.acceptance,
                verify_s=lambda k: self._verify_time(batch_size * (k + 1)),
                draft_s=lambda k: measured.round_trip_s + k * step_s if step_s else 0.0,
            )
        return self._plans[mode, batch_size]

    def worthwhile_backup(self, num_draft: int, num_backup: int, batch_size: int) -> int:
        """How many of the backup's tokens behind `num_draft` others are worth the time that they add to the forward.

        Others in the batch have about as many tokens, and wait as long.
        """
        if self._num_steps < _STEPS_PER_PLAN:
            return num_backup
        accepted = self._policy.acceptance**num_draft
        tokens_per_s = batch_size * self._policy.tokens_per_s
        for count in range(num_backup):
            accepted *= self._policy.backup_acceptance
            num_tokens = batch_size * (1 + num_draft) + count
            added_s = self._verify_time(num_tokens + 1) - self._verify_time(num_tokens)
            if accepted < added_s * tokens_per_s:
                return count
        return num_backup

    def explain(self) -> str:
        """For status."""
        if self._num_steps < _STEPS_PER_PLAN:
            return f"K={self._max_lookahead}: nothing measured yet"
        time = self._verify_time
        parts = [f"K={k} for {mode.value} in batches of {size}" for (mode, size), k in sorted(self._plans.items())]
        for (mode, bits), trial in sorted(self._trials.items()):
            if trial.pause:
                parts.append(f"{mode.value} paused in batches of {1 << bits >> 1} to {(1 << bits) - 1}")
        return (
            f"{', '.join(parts) or 'no K in use'}: a forward takes {time.base_s * 1e3:.1f} ms and "
            f"{time.per_row_s * 1e3:.2f} ms per token, "
            f"{self._policy.acceptance:.1%} of draft tokens are accepted"
        )
