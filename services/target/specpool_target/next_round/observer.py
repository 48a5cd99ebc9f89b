"""What rounds and steps were like, for the policies that decide from it. Metrics are kept elsewhere and never steer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from specpool.speculation import DraftSource
from specpool_target.engine.sequence import Draft, SpeculationMode, TargetSequence
from specpool_target.next_round.fallback_policy import FallbackPolicy
from specpool_target.next_round.lookahead_policy import LookaheadPolicy
from specpool_target.next_round.speculation_trials import Output


@dataclass(slots=True)
class EndedRound:
    """A verification of one sequence, or its prefill, that has ended."""

    sequence: TargetSequence
    draft: Draft
    """The draft tokens that were verified."""
    num_accepted: int
    num_tokens: int
    """Number of tokens committed."""
    seconds: float = 0.0
    """Seconds since the round of this sequence before."""


class Observer:
    """Feeds the policies. Used on the engine thread."""

    def __init__(
        self, fallback: FallbackPolicy, lookahead: LookaheadPolicy, is_served: Callable[[TargetSequence], bool]
    ) -> None:
        """`is_served` tells whether a speculator knows a sequence, or would if it did not pause."""
        self._fallback = fallback
        self._lookahead = lookahead
        self._is_served = is_served
        self._last_step_s: float | None = None
        """When the step before was observed; None if nothing ran since."""

    def round_ended(self, ended: EndedRound) -> None:
        """Take in a verification after the prefill."""
        sequence, draft = ended.sequence, ended.draft
        is_miss = draft.lookup in ("miss", "late")
        waited = is_miss and draft.source is DraftSource.SPECULATOR
        self._fallback.observe_round(
            len(draft.tokens),
            ended.num_accepted,
            ended.seconds,
            from_backup=draft.source is DraftSource.BACKUP,
            num_tail=draft.num_tail,
            waited=waited,
        )
        if sequence.missed_before is not None:
            self._fallback.observe_round_after_miss(ended.num_accepted, waited=sequence.missed_before)
        sequence.missed_before = waited if is_miss else None

    def step_ended(
        self,
        rounds: Sequence[EndedRound],
        running: Iterable[TargetSequence],
        *,
        batch_size: int,
        verify_s: float,
        has_prefill: bool,
        now_s: float,
    ) -> None:
        """Take in a step, before anything is chosen for the next one.

        Args:
            rounds: that ended.
            running: sequences in the batch now.
            batch_size: sequences that were in the batch.
            verify_s: forward and verification.
            has_prefill: whether the step computed more than rounds.
            now_s: `perf_counter`.
        """
        if not has_prefill:
            num_tokens = sum(1 + len(ended.draft.tokens) for ended in rounds)
            self._fallback.observe_step(len(rounds), verify_s)
            self._lookahead.observe_step(num_tokens, verify_s)
            if self._last_step_s is not None:
                self._observe_output(rounds, running, batch_size, now_s - self._last_step_s)
        self._lookahead.trials.end_step()
        self._last_step_s = now_s

    def idle(self) -> None:
        """Note that nothing runs: the time until the next step is not speculation's."""
        self._last_step_s = None

    def _observe_output(
        self, rounds: Sequence[EndedRound], running: Iterable[TargetSequence], batch_size: int, seconds: float
    ) -> None:
        """Feed the trials, which judge by batches in which speculation is the target's choice for everyone."""
        sequences = {id(s): s for s in (*(ended.sequence for ended in rounds), *running)}.values()
        modes = {
            s.request.mode if s.request.leaves_lookahead and self._is_served(s) else SpeculationMode.OFF
            for s in sequences
        }
        mode = modes.pop() if len(modes) == 1 else SpeculationMode.OFF
        if mode is SpeculationMode.OFF:
            return
        output = Output(
            batch_size=batch_size,
            num_rounds=len(rounds),
            num_drafted=sum(bool(r.draft.tokens) and r.draft.source is DraftSource.SPECULATOR for r in rounds),
            num_tokens=sum(ended.num_tokens for ended in rounds),
            seconds=seconds,
        )
        self._lookahead.trials.observe(mode, output)
