"""What each sequence verifies next: from its speculation cache, a just-in-time speculation, or the backup.

Runs on the engine thread. Everything here only changes speed: whatever tokens come out of it are verified.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from specpool.algorithm.fallback import NO_WAIT, FallbackChoice
from specpool.algorithm.speculation_cache import LookupKind
from specpool.algorithm.verification import VerificationMode, VerificationOutcome
from specpool.rpc.convert import sampling_to_proto
from specpool.v1 import speculator_pb2, types_pb2
from specpool_target.engine.outbox import TargetOutbox
from specpool_target.engine.sequence import Draft, DraftSource, SpeculationMode, TargetSequence
from specpool_target.links.link import Request, SpeculatorLink, close_request
from specpool_target.links.live_links import LiveLinks
from specpool_target.next_round.fallback_policy import FallbackPolicy
from specpool_target.next_round.lookahead import LookaheadPlanner
from specpool_target.next_round.speculation_trials import Verdict
from specpool_target.verify.verify_step import effective_mode

_SLACK: Final = 1.5
"""A just-in-time speculation may take this many times what was measured."""
_MARGIN_S: Final = 0.01
"""For the way there and back, beyond the measured round trip."""
_TAIL_NGRAM: Final = 2
"""A single token that occurred before says too little to lengthen a speculation by what followed it."""
_SD_SHARE: Final = 0.8
"""Of our own deadline: what the speculator is given, so that its answer arrives before we give up."""

_MODES: Final = {
    SpeculationMode.SSD: types_pb2.SPECULATION_MODE_SSD,
    SpeculationMode.SD: types_pb2.SPECULATION_MODE_SD,
    SpeculationMode.OFF: types_pb2.SPECULATION_MODE_OFF,
}


class Speculation:
    """Decides after each outcome, and keeps the speculators informed."""

    def __init__(
        self,
        outbox: TargetOutbox,
        links: LiveLinks,
        policy: FallbackPolicy,
        planner: LookaheadPlanner,
        *,
        vocab_size: int,
        deadline_s: float,
    ) -> None:
        self._outbox = outbox
        self._links = links
        self._policy = policy
        self._planner = planner
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

    # ---- after each verification ------------------------------------------------------------------------------

    def next_round(self, sequence: TargetSequence, outcome: VerificationOutcome, *, batch_size: int) -> None:
        """Choose what the sequence verifies next, and report the outcome of the round that ended."""
        ended = sequence.round
        self._batch_size = batch_size
        sequence.round += 1
        sequence.draft = Draft()
        was_paused, sequence.is_paused = sequence.is_paused, self._is_paused(sequence)
        if was_paused or sequence.is_paused:
            self._choose_alone(sequence)
            self._pause_or_resume(sequence, was_paused)
            return
        choice = self._choose(sequence, ended, outcome)
        epoch = self._epoch(sequence)
        if epoch is None or sequence.link is None:
            return
        message = speculator_pb2.Outcome(
            sequence_id=sequence.id,
            round=ended,
            num_accepted=outcome.num_accepted,
            bonus_token=outcome.bonus_token,
            draft_tokens=sequence.draft.tokens,
            draft_source=sequence.draft.source.value,
            awaits_speculation=choice.depth > 0,
        )
        self._outbox.outcome(sequence.link, epoch, message)
        if choice.depth:
            self._await_speculation(sequence, sequence.link, epoch, ended, choice)

    def _is_paused(self, sequence: TargetSequence) -> bool:
        request = sequence.request
        if not request.plans_lookahead or request.mode is SpeculationMode.OFF:
            return False
        return self._planner.trials.verdict(request.mode, self._batch_size) is Verdict.PAUSE

    def _choose_alone(self, sequence: TargetSequence) -> None:
        """In a pause, and in the round after it: prompt lookup needs no speculator."""
        self._plan(sequence)
        if sequence.request.mode is SpeculationMode.SSD and (backup := self._backup(sequence, self._limit(sequence))):
            sequence.draft = Draft(backup, DraftSource.BACKUP)

    def _pause_or_resume(self, sequence: TargetSequence, was_paused: bool) -> None:
        """No speculator holds a sequence that is not speculated on."""
        if not was_paused:
            self.close(sequence)
            if sequence.inbox is not None:
                sequence.inbox.clear()
        elif not sequence.is_paused:
            self.open(sequence)  # which tells all that an outcome would

    def _choose(self, sequence: TargetSequence, ended: int, outcome: VerificationOutcome) -> FallbackChoice:
        """Set the draft, or return what to wait for."""
        self._plan(sequence)
        if sequence.lookahead == 0:
            return NO_WAIT
        limit = self._limit(sequence)
        if sequence.request.mode is SpeculationMode.SSD:
            return self._choose_ssd(sequence, ended, outcome, limit)
        if sequence.request.mode is SpeculationMode.SD and limit > 0:
            if self._knows(sequence) and self._links.may_wait(sequence.link):
                return FallbackChoice(limit, 0.0, self._deadline_s)
            self.fallbacks["no_draft" if self._knows(sequence) else "speculator_lost"] += 1
        return NO_WAIT

    def _choose_ssd(
        self, sequence: TargetSequence, ended: int, outcome: VerificationOutcome, limit: int
    ) -> FallbackChoice:
        kind, tokens, rank = LookupKind.MISS, [], None
        if sequence.inbox is not None and self._knows(sequence):
            # Near the end of the output the table is deeper than what can be used, or ends where the output would:
            # still a hit.
            lookup, rank = sequence.inbox.lookup(
                ended, outcome.num_accepted, outcome.bonus_token, lookahead=max(1, limit)
            )
            kind, tokens = lookup.kind, self._valid(lookup.tokens)[:limit]
            if kind is LookupKind.PARTIAL and _ends_output(sequence, tokens):
                kind = LookupKind.HIT
        sequence.stats.lookup(kind, outcome.num_accepted, rank)
        self._lookups[kind.value] += 1
        sequence.draft = Draft(lookup=kind.value)
        if limit == 0:
            return NO_WAIT
        if tokens:
            self._use(sequence, tokens)
            return NO_WAIT
        return self._after_miss(sequence, limit)

    def _after_miss(self, sequence: TargetSequence, limit: int) -> FallbackChoice:
        if sequence.link is not None and self._knows(sequence) and self._links.may_wait_after_miss(sequence.link):
            choice = self._policy.choose(
                sequence.link.measured.draft_times(),
                batch_size=self._batch_size,
                lookahead=limit,
                num_backup=len(self._backup(sequence, limit)),
            )
            if choice.depth:
                self.fallbacks["wait"] += 1
                return choice
        self._use_backup(sequence)
        return NO_WAIT

    def _use(self, sequence: TargetSequence, tokens: Sequence[int]) -> None:
        """Verify what the speculator drafted."""
        tail = self._tail(sequence, tokens, self._limit(sequence))
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
        return tokens[: self._planner.worthwhile_backup(len(after), len(tokens), self._batch_size)]

    def _limit(self, sequence: TargetSequence) -> int:
        lookahead = min(sequence.lookahead, sequence.request.max_lookahead)
        if sequence.link is not None and sequence.link.measured.max_lookahead:
            lookahead = min(lookahead, sequence.link.measured.max_lookahead)
        return min(lookahead, sequence.room_for_drafts)

    def _valid(self, tokens: Sequence[int]) -> list[int]:
        """Up to the first token the model does not have."""
        valid = list(tokens)
        for index, token in enumerate(valid):
            if token >= self._vocab_size:
                return valid[:index]
        return valid

    # ---- waiting for a speculation ----------------------------------------------------------------------------

    def _await_speculation(
        self, sequence: TargetSequence, link: SpeculatorLink, epoch: int, ended: int, choice: FallbackChoice
    ) -> None:
        if sequence.request.mode is SpeculationMode.SD:
            wait_s, speculator_s = self._deadline_s, self._deadline_s * _SD_SHARE
        else:
            speculator_s = _SLACK * choice.waiting_s
            wait_s = min(self._deadline_s, speculator_s + link.measured.round_trip_s + _MARGIN_S)
        message = speculator_pb2.SpeculateNow(
            sequence_id=sequence.id, round=ended, num_tokens=choice.depth, deadline_ms=speculator_s * 1e3
        )
        self._outbox.send(link, epoch, Request(speculate_now=message))
        sequence.await_started_s = time.perf_counter()
        sequence.await_deadline_s = sequence.await_started_s + wait_s

    def reply(self, sequence: TargetSequence, round_: int, tokens: Sequence[int]) -> bool:
        """A speculation arrived; False if nobody waits for it any more."""
        if sequence.await_deadline_s is None or round_ != sequence.round - 1:
            return False
        tokens = self._valid(tokens)[: self._limit(sequence)]
        if tokens:
            self._use(sequence, tokens)
            self._end_wait(sequence)
        else:
            self._note_wasted_wait(sequence)
            self._end_wait_without(sequence)
        return True

    def release_expired(self, sequences: Iterable[TargetSequence], now_s: float) -> None:
        """Waits end at their deadline."""
        for sequence in sequences:
            if sequence.await_deadline_s is not None and sequence.await_deadline_s <= now_s:
                self.fallbacks["deadline"] += 1
                self._links.timed_out(sequence.link)
                self._note_wasted_wait(sequence)
                self._end_wait_without(sequence)

    def _note_wasted_wait(self, sequence: TargetSequence) -> None:
        if sequence.request.mode is SpeculationMode.SSD:
            self._links.wasted(sequence.link, time.perf_counter() - sequence.await_started_s)

    def _end_wait_without(self, sequence: TargetSequence) -> None:
        if sequence.request.mode is SpeculationMode.SSD:
            self._use_backup(sequence)
        self._end_wait(sequence)

    def _end_wait(self, sequence: TargetSequence) -> None:
        sequence.waited_s += time.perf_counter() - sequence.await_started_s
        sequence.await_deadline_s = None
        epoch = self._epoch(sequence)
        if sequence.link is not None and epoch is not None:
            message = speculator_pb2.StartRound(
                sequence_id=sequence.id,
                round=sequence.round,
                draft_tokens=sequence.draft.tokens,
                draft_source=sequence.draft.source.value,
            )
            self._outbox.send(sequence.link, epoch, Request(start_round=message))

    # ---- the speculator's knowledge ---------------------------------------------------------------------------

    def _epoch(self, sequence: TargetSequence) -> int | None:
        """Of the live connection on which the speculator was told of this sequence."""
        epoch = self._links.epoch(sequence.link)
        return epoch if epoch == sequence.opened_epoch else None

    def _knows(self, sequence: TargetSequence) -> bool:
        return self._epoch(sequence) is not None

    def admit(self, sequence: TargetSequence, *, batch_size: int) -> None:
        """It is in the batch for the first time."""
        self._batch_size = batch_size
        self._plan(sequence)
        sequence.is_paused = self._is_paused(sequence)
        self.open(sequence)

    def is_served(self, sequence: TargetSequence) -> bool:
        """Whether a speculator knows it, or would if it were to."""
        return sequence.is_paused or self._knows(sequence)

    def _plan(self, sequence: TargetSequence) -> None:
        request = sequence.request
        if request.plans_lookahead and request.mode is not SpeculationMode.OFF:
            measured = None if sequence.link is None else sequence.link.measured
            sequence.lookahead = self._planner.lookahead(request.mode, measured, self._batch_size)

    def open(self, sequence: TargetSequence) -> None:
        """Hand the sequence over with every token it has."""
        link, request = sequence.link, sequence.request
        epoch = self._links.epoch(link)
        if link is None or epoch is None or request.mode is SpeculationMode.OFF or sequence.is_paused:
            return
        sequence.opened_epoch = epoch
        rejection = request.verification is VerificationMode.REJECTION
        message = speculator_pb2.OpenSequence(
            sequence_id=sequence.id,
            tenant=request.tenant,
            tenant_weight=request.tenant_weight,
            cache_salt=request.cache_salt,
            token_ids=sequence.tokens,
            num_prompt_tokens=sequence.num_prompt_tokens,
            sampling=sampling_to_proto(request.sampling),
            verification=(types_pb2.VERIFICATION_MODE_REJECTION if rejection else types_pb2.VERIFICATION_MODE_COUPLED),
            mode=_MODES[request.mode],
            max_lookahead=request.max_lookahead,
            round=sequence.round,
            draft_tokens=sequence.draft.tokens,
            traceparent=request.traceparent,
        )
        self._outbox.send(link, epoch, Request(open_sequence=message))

    def close(self, sequence: TargetSequence) -> None:
        """Also after the service has closed it: an open may have been on its way then."""
        epoch = self._epoch(sequence)
        if sequence.link is not None and epoch is not None:
            self._outbox.send(sequence.link, epoch, close_request(sequence.id))
        sequence.opened_epoch = None

    def resync(self, sequence: TargetSequence) -> None:
        """The speculator lost the sequence."""
        if not self._knows(sequence) or sequence.resynced_round == sequence.round:
            return
        sequence.resynced_round = sequence.round
        self._abandon(sequence)
        self.open(sequence)

    def link_up(self, link: SpeculatorLink, epoch: int, sequences: Iterable[TargetSequence]) -> None:
        """Open every sequence that has been in the batch."""
        self._links.up(link, epoch)
        self._planner.trials.forget()
        for sequence in sequences:
            if sequence.link is link and sequence.was_admitted:
                self._abandon(sequence)
                sequence.is_paused = False
                self.open(sequence)

    def link_down(self, link: SpeculatorLink, epoch: int, sequences: Iterable[TargetSequence]) -> None:
        """Go on alone."""
        self._links.down(link, epoch)
        for sequence in sequences:
            if sequence.link is link and sequence.opened_epoch == epoch:
                self.fallbacks["speculator_lost"] += 1
                self._abandon(sequence)

    def _abandon(self, sequence: TargetSequence) -> None:
        """Forget what this speculator knew and sent; nothing waits for it."""
        sequence.opened_epoch = None
        if sequence.inbox is not None:
            sequence.inbox.clear()
        if sequence.await_deadline_s is not None:
            self._end_wait_without(sequence)


def _ends_output(sequence: TargetSequence, tokens: Sequence[int]) -> bool:
    """Whether a draft goes as far as the output: nothing is ever committed after it."""
    return bool(tokens) and tokens[-1] in sequence.request.stop_token_ids
