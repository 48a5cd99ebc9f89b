"""What each speculator knows of each sequence: opened, told of outcomes, asked, closed. It decides nothing.

Runs on the engine thread. Everything that is said to a speculator is said here; what to verify is chosen elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from specpool.algorithm.speculation_cache import LookupKind
from specpool.algorithm.verification import VerificationMode, VerificationOutcome
from specpool.rpc.convert import sampling_to_proto
from specpool.v1 import speculator_pb2, types_pb2
from specpool_target.engine.outbox import TargetOutbox
from specpool_target.engine.sequence import SpeculationMode, TargetSequence
from specpool_target.links.link import LinkMeasurements, Request, SpeculatorLink, close_request
from specpool_target.links.live_links import LiveLinks

_MODES: Final = {
    SpeculationMode.SSD: types_pb2.SPECULATION_MODE_SSD,
    SpeculationMode.SD: types_pb2.SPECULATION_MODE_SD,
    SpeculationMode.OFF: types_pb2.SPECULATION_MODE_OFF,
}
_NOTHING: Final[tuple[LookupKind, tuple[int, ...], int | None]] = (LookupKind.MISS, (), None)


class SpeculatorKnowledge:
    """One for all sequences of a target."""

    def __init__(self, outbox: TargetOutbox, links: LiveLinks) -> None:
        self._outbox = outbox
        self._links = links
        self.on_lost: Callable[[TargetSequence], None] = lambda sequence: None
        """Called for a sequence that waits for a speculator which has lost it, or is lost."""

    # ---- what decisions ask -----------------------------------------------------------------------------------

    def knows(self, sequence: TargetSequence) -> bool:
        """Whether a connected speculator was told of the sequence."""
        return self._epoch(sequence) is not None

    def is_served(self, sequence: TargetSequence) -> bool:
        """Whether a speculator knows it, or would if it were to."""
        return sequence.is_paused or self.knows(sequence)

    def measured(self, sequence: TargetSequence) -> LinkMeasurements | None:
        """Of the speculator that the sequence has, connected or not."""
        return None if sequence.link is None else sequence.link.measured

    def may_wait(self, sequence: TargetSequence, *, after_miss: bool = False) -> bool:
        """Whether the speculator knows the sequence, and waits for it are not likely to be in vain."""
        if not self.knows(sequence):
            return False
        links = self._links
        return links.may_wait_after_miss(sequence.link) if after_miss else links.may_wait(sequence.link)

    def look_up(
        self, sequence: TargetSequence, ended: int, outcome: VerificationOutcome, *, lookahead: int
    ) -> tuple[LookupKind, tuple[int, ...], int | None]:
        """What the speculator drafted for this outcome of round `ended`, and the rank of the bonus token."""
        if sequence.inbox is None or not self.knows(sequence):
            return _NOTHING
        lookup, rank = sequence.inbox.lookup(ended, outcome.num_accepted, outcome.bonus_token, lookahead=lookahead)
        return lookup.kind, lookup.tokens, rank

    # ---- rounds -----------------------------------------------------------------------------------------------

    def report(self, sequence: TargetSequence, ended: int, outcome: VerificationOutcome, *, awaits: bool) -> None:
        """How round `ended` ended, and what the next one verifies; with `awaits` that is not decided yet."""
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
            awaits_speculation=awaits,
        )
        self._outbox.outcome(sequence.link, epoch, message)

    def request(self, sequence: TargetSequence, ended: int, num_tokens: int, deadline_s: float) -> None:
        """Have tokens drafted now, after round `ended`."""
        message = speculator_pb2.SpeculateNow(
            sequence_id=sequence.id, round=ended, num_tokens=num_tokens, deadline_ms=deadline_s * 1e3
        )
        self._send(sequence, Request(speculate_now=message))

    def started(self, sequence: TargetSequence) -> None:
        """The wait is over: this is what the running round verifies."""
        message = speculator_pb2.StartRound(
            sequence_id=sequence.id,
            round=sequence.round,
            draft_tokens=sequence.draft.tokens,
            draft_source=sequence.draft.source.value,
        )
        self._send(sequence, Request(start_round=message))

    def timed_out(self, sequence: TargetSequence) -> None:
        """Nothing came in time."""
        self._links.timed_out(sequence.link)

    def wasted(self, sequence: TargetSequence) -> None:
        """A wait after a miss brought nothing."""
        self._links.wasted(sequence.link, time.perf_counter() - sequence.await_started_s)

    # ---- in and out -------------------------------------------------------------------------------------------

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
        self._send(sequence, close_request(sequence.id))
        sequence.opened_epoch = None

    def pause(self, sequence: TargetSequence) -> None:
        """No speculator holds a sequence that is not speculated on."""
        self.close(sequence)
        if sequence.inbox is not None:
            sequence.inbox.clear()

    def resync(self, sequence: TargetSequence) -> None:
        """The speculator lost the sequence."""
        if not self.knows(sequence) or sequence.resynced_round == sequence.round:
            return
        sequence.resynced_round = sequence.round
        self.abandon(sequence)
        self.open(sequence)

    def link_up(self, link: SpeculatorLink, epoch: int) -> None:
        """There is a connection."""
        self._links.up(link, epoch)

    def reopen(self, sequence: TargetSequence) -> None:
        """On a new connection."""
        self.abandon(sequence)
        sequence.is_paused = False
        self.open(sequence)

    def link_down(self, link: SpeculatorLink, epoch: int) -> None:
        """The connection is lost."""
        self._links.down(link, epoch)

    def abandon(self, sequence: TargetSequence) -> None:
        """Forget what this speculator knew and sent; nothing waits for it."""
        sequence.opened_epoch = None
        if sequence.inbox is not None:
            sequence.inbox.clear()
        if sequence.await_deadline_s is not None:
            self.on_lost(sequence)

    def _epoch(self, sequence: TargetSequence) -> int | None:
        """Of the live connection on which the speculator was told of this sequence."""
        epoch = self._links.epoch(sequence.link)
        return epoch if epoch == sequence.opened_epoch else None

    def _send(self, sequence: TargetSequence, request: Request) -> None:
        epoch = self._epoch(sequence)
        if sequence.link is not None and epoch is not None:
            self._outbox.send(sequence.link, epoch, request)
