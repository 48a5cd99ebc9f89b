"""The one decision: how many tokens a sequence verifies next, whose they are, and whether to wait for them.

Runs on the engine thread. Everything here only changes speed: whatever tokens come out of it are verified. It reads
what `observer` has measured, and what `knowledge` has of speculators; it never reads a metric.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

from specpool.algorithm.fallback import NO_WAIT, FallbackChoice
from specpool.algorithm.speculation_cache import LookupKind
from specpool.algorithm.verification import VerificationMode, VerificationOutcome
from specpool.speculation import DraftSource, NextDraft
from specpool_target.engine.sequence import Draft, SpeculationMode, TargetSequence
from specpool_target.next_round.fallback_policy import FallbackPolicy
from specpool_target.next_round.knowledge import SpeculatorKnowledge
from specpool_target.next_round.lookahead_policy import LookaheadPolicy
from specpool_target.next_round.speculation_trials import Verdict
from specpool_target.verify.verify_step import effective_mode

_SLACK: Final = 1.5
"""A just-in-time speculation may take this many times what was measured."""
_MARGIN_S: Final = 0.01
"""Seconds for the way there and back, beyond the measured round trip."""
_TAIL_NGRAM: Final = 2
"""Length of the n-gram behind which a speculation is lengthened; what followed a single token says too little."""
_SD_SHARE: Final = 0.8
"""Share of our own deadline that the speculator is given, so that its answer arrives before we give up."""


class NextRound:
    """Chooses after each outcome, and has the speculators told."""

    def __init__(
        self,
        knowledge: SpeculatorKnowledge,
        fallback: FallbackPolicy,
        lookahead: LookaheadPolicy,
        *,
        vocab_size: int,
        deadline_s: float,
    ) -> None:
        """`deadline_s` is the longest wait for a speculation."""
        self._knowledge = knowledge
        self._fallback = fallback
        self._lookahead = lookahead
        self._vocab_size = vocab_size
        self._deadline_s = deadline_s
        self._batch_size = 1
        self._lookups: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        """Rounds that fell back since `take_counts`, by reason."""

    def take_counts(self) -> tuple[Counter[str], Counter[str]]:
        """Lookups by kind and fallbacks by reason since the last call."""
        taken = self._lookups, self.fallbacks
        self._lookups, self.fallbacks = Counter(), Counter()
        return taken

    def note_lost_speculator(self) -> None:
        """Count a sequence that lost the speculator that it had."""
        self.fallbacks["speculator_lost"] += 1

    def note_late_distributions(self) -> None:
        """Count a round that is verified without the distributions it was drafted from."""
        self.fallbacks["late_distributions"] += 1

    # ---- the decision -----------------------------------------------------------------------------------------

    def admit(self, sequence: TargetSequence, *, batch_size: int) -> None:
        """Prepare a sequence that is in the batch for the first time."""
        self._batch_size = batch_size
        self._set_lookahead(sequence)
        sequence.is_paused = self._is_paused(sequence)
        self._knowledge.open(sequence)

    def choose(self, sequence: TargetSequence, outcome: VerificationOutcome, *, batch_size: int) -> None:
        """Choose what the sequence verifies next, and report the outcome of the round that ended."""
        self._batch_size = batch_size
        sequence.round += 1
        sequence.draft = Draft()
        was_paused, sequence.is_paused = sequence.is_paused, self._is_paused(sequence)
        self._set_lookahead(sequence)
        limit = self._limit(sequence)
        found = self._knowledge.next(sequence, outcome, lookahead=limit)
        if was_paused or sequence.is_paused:
            self._choose_alone(sequence)
            self._pause_or_resume(sequence, was_paused)
        else:
            wait = self._draft_or_wait(sequence, found, outcome, limit)
            if wait.depth and self._request(sequence, wait):
                return
        self._knowledge.started(sequence)

    def _is_paused(self, sequence: TargetSequence) -> bool:
        request = sequence.request
        if not request.leaves_lookahead or request.mode is SpeculationMode.OFF:
            return False
        return self._lookahead.trials.verdict(request.mode, self._batch_size) is Verdict.PAUSE

    def _set_lookahead(self, sequence: TargetSequence) -> None:
        request = sequence.request
        if request.leaves_lookahead and request.mode is not SpeculationMode.OFF:
            measured = self._knowledge.measured(sequence)
            sequence.lookahead = self._lookahead.lookahead(request.mode, measured, self._batch_size)

    def _choose_alone(self, sequence: TargetSequence) -> None:
        """Use prompt lookup, which needs no speculator, in a pause and in the round after it."""
        if sequence.request.mode is SpeculationMode.SSD and (backup := self._backup(sequence, self._limit(sequence))):
            sequence.draft = Draft(backup, DraftSource.BACKUP)

    def _pause_or_resume(self, sequence: TargetSequence, was_paused: bool) -> None:
        if not was_paused:
            self._knowledge.pause(sequence)
        elif not sequence.is_paused:
            self._knowledge.resume(sequence)  # which tells all that an outcome would

    def _draft_or_wait(
        self, sequence: TargetSequence, found: NextDraft, outcome: VerificationOutcome, limit: int
    ) -> FallbackChoice:
        """Set the draft, or return what to wait for."""
        if sequence.lookahead == 0:
            return NO_WAIT
        if sequence.request.mode is SpeculationMode.SSD:
            return self._draft_or_wait_ssd(sequence, found, outcome, limit)
        if sequence.request.mode is SpeculationMode.SD and limit > 0:
            trust = self._knowledge.trust(sequence)
            if trust is not None and trust.may_wait():
                return FallbackChoice(limit, 0.0, self._deadline_s)
            self.fallbacks["no_draft" if self._knowledge.knows(sequence) else "speculator_lost"] += 1
        return NO_WAIT

    def _draft_or_wait_ssd(
        self, sequence: TargetSequence, found: NextDraft, outcome: VerificationOutcome, limit: int
    ) -> FallbackChoice:
        kind, tokens = found.kind or LookupKind.MISS, found.tokens
        # Near the end of the output the table ends where the output would: still a hit.
        if kind is LookupKind.PARTIAL and _ends_output(sequence, tokens):
            kind = LookupKind.HIT
        sequence.stats.lookup(kind, outcome.num_accepted, found.rank)
        self._lookups[kind.value] += 1
        sequence.draft = Draft(lookup=kind.value)
        if limit == 0:
            return NO_WAIT
        if tokens:
            self._use(sequence, tokens, limit)
            return NO_WAIT
        return self._after_miss(sequence, limit)

    def _after_miss(self, sequence: TargetSequence, limit: int) -> FallbackChoice:
        measured = self._knowledge.measured(sequence)
        trust = self._knowledge.trust(sequence)
        if measured is not None and trust is not None and trust.may_wait_after_miss():
            choice = self._fallback.choose(
                measured.draft_times(),
                batch_size=self._batch_size,
                lookahead=limit,
                num_backup=len(self._backup(sequence, limit)),
            )
            if choice.depth:
                self.fallbacks["wait"] += 1
                return choice
        self._use_backup(sequence)
        return NO_WAIT

    # ---- drafts -----------------------------------------------------------------------------------------------

    def _use(self, sequence: TargetSequence, tokens: Sequence[int], limit: int) -> None:
        """Verify what the speculator drafted."""
        tail = self._tail(sequence, tokens, limit)
        sequence.draft = Draft([*tokens, *tail], DraftSource.SPECULATOR, sequence.draft.lookup, len(tail))

    def _tail(self, sequence: TargetSequence, tokens: Sequence[int], limit: int) -> list[int]:
        """Tokens of the backup after a speculation that is not deep enough: a few more may cost the forward nothing.

        Not for rejection verification, which needs the distribution that every draft token was sampled from, and not
        after a token that ends the output.
        """
        request = sequence.request
        is_rejection = effective_mode(request.sampling, request.verification) is VerificationMode.REJECTION
        if is_rejection or request.mode is not SpeculationMode.SSD or _ends_output(sequence, tokens):
            return []
        return self._backup(sequence, limit - len(tokens), after=tokens, min_ngram=_TAIL_NGRAM)

    def _use_backup(self, sequence: TargetSequence) -> None:
        backup = self._backup(sequence, self._limit(sequence))
        self.fallbacks["backup" if backup else "no_draft"] += 1
        source = DraftSource.BACKUP if backup else DraftSource.NONE
        sequence.draft = Draft(backup, source, sequence.draft.lookup)

    def _backup(
        self, sequence: TargetSequence, limit: int, *, after: Sequence[int] = (), min_ngram: int = 1
    ) -> list[int]:
        """What prompt lookup proposes, as far as it is worth verifying."""
        tokens = self._valid(sequence.backup(limit, after=after, min_ngram=min_ngram))
        return tokens[: self._lookahead.worthwhile_backup(len(after), len(tokens), self._batch_size)]

    def _limit(self, sequence: TargetSequence) -> int:
        lookahead = min(sequence.lookahead, sequence.request.max_lookahead)
        measured = self._knowledge.measured(sequence)
        if measured is not None and measured.max_lookahead:
            lookahead = min(lookahead, measured.max_lookahead)
        return min(lookahead, sequence.room_for_drafts)

    def _valid(self, tokens: Sequence[int]) -> list[int]:
        """The tokens up to the first that the model does not have."""
        valid = list(tokens)
        for index, token in enumerate(valid):
            if token >= self._vocab_size:
                return valid[:index]
        return valid

    # ---- waiting for a speculation ----------------------------------------------------------------------------

    def _request(self, sequence: TargetSequence, choice: FallbackChoice) -> bool:
        """Wait for what was chosen; False: nobody can draft it any more, and the sequence goes on without."""
        if sequence.request.mode is SpeculationMode.SD:
            wait_s, speculator_s = self._deadline_s, self._deadline_s * _SD_SHARE
        else:
            measured = self._knowledge.measured(sequence)
            speculator_s = _SLACK * choice.waiting_s
            round_trip_s = 0.0 if measured is None else measured.round_trip_s
            wait_s = min(self._deadline_s, speculator_s + round_trip_s + _MARGIN_S)
        if not self._knowledge.request(sequence, choice.depth, speculator_s):
            if sequence.request.mode is SpeculationMode.SSD:
                self._use_backup(sequence)
            return False
        sequence.await_started_s = time.perf_counter()
        sequence.await_deadline_s = sequence.await_started_s + wait_s
        return True

    def answer(self, sequence: TargetSequence, round_: int, tokens: Sequence[int]) -> bool:
        """Take in a speculation, or that none comes (no tokens); False if nobody waits for it any more."""
        if sequence.await_deadline_s is None or round_ != sequence.round - 1:
            return False
        limit = self._limit(sequence)
        tokens = tokens[:limit]
        if tokens:
            self._use(sequence, tokens, limit)
            self._end_wait(sequence)
        else:
            self._note_wasted_wait(sequence)
            self._end_wait_without(sequence)
        return True

    def expire(self, sequence: TargetSequence) -> None:
        """End the wait of a sequence whose deadline has passed."""
        self.fallbacks["deadline"] += 1
        self._knowledge.timed_out(sequence)
        self._note_wasted_wait(sequence)
        self._end_wait_without(sequence)

    def _note_wasted_wait(self, sequence: TargetSequence) -> None:
        if sequence.request.mode is SpeculationMode.SSD:
            self._knowledge.wasted(sequence)

    def _end_wait_without(self, sequence: TargetSequence) -> None:
        if sequence.request.mode is SpeculationMode.SSD:
            self._use_backup(sequence)
        self._end_wait(sequence)

    def _end_wait(self, sequence: TargetSequence) -> None:
        sequence.waited_s += time.perf_counter() - sequence.await_started_s
        sequence.await_deadline_s = None
        self._knowledge.started(sequence)


def _ends_output(sequence: TargetSequence, tokens: Sequence[int]) -> bool:
    """Whether a draft goes as far as the output: nothing is ever committed after it."""
    return bool(tokens) and tokens[-1] in sequence.request.stop_token_ids
