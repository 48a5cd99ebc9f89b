"""What each speculator knows of each sequence, by the pool: opened, told of rounds, asked, closed. It decides nothing.

Runs on the engine thread. Everything that is said to a speculator is said here; what to verify is chosen elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from specpool.algorithm.verification import VerificationMode, VerificationOutcome
from specpool.speculation import Connection, Measurements, NextDraft, SequenceEvents, SpeculationPool, WaitTrust
from specpool.v1 import types_pb2
from specpool_engine.runtime.sampling_messages import sampling_to_proto
from specpool_target.engine.sequence import SpeculationMode, TargetSequence

_MODES: Final = {
    SpeculationMode.SSD: types_pb2.SPECULATION_MODE_SSD,
    SpeculationMode.SD: types_pb2.SPECULATION_MODE_SD,
    SpeculationMode.OFF: types_pb2.SPECULATION_MODE_OFF,
}
_NOTHING: Final = NextDraft()


@dataclass(frozen=True, kw_only=True, slots=True)
class KnowledgeEvents:
    """What the decisions are told of. Called on any thread; must return at once."""

    on_answer: Callable[[str, int, tuple[int, ...]], None] = lambda sequence_id, round_, tokens: None
    """Called when the tokens requested for a round have come, or never will (no tokens)."""
    on_distributions: Callable[[], None] = lambda: None
    """Called when some sequence has new draft distributions."""
    on_paired: Callable[[str, Connection | None], None] = lambda sequence_id, connection: None
    """Called when a sequence has another speculator, or none."""


class SpeculatorKnowledge:
    """What the speculators know; one for all sequences of a target."""

    def __init__(self, pool: SpeculationPool, events: KnowledgeEvents) -> None:
        self._pool = pool
        self._events = events

    # ---- what decisions ask -----------------------------------------------------------------------------------

    def knows(self, sequence: TargetSequence) -> bool:
        """Whether a connected speculator was told of the sequence."""
        return sequence.handle is not None and sequence.handle.speculator is not None

    def is_served(self, sequence: TargetSequence) -> bool:
        """Whether a speculator knows the sequence, or would if it did not pause."""
        return sequence.is_paused or self.knows(sequence)

    def measured(self, sequence: TargetSequence) -> Measurements | None:
        """What was measured of the speculator that knows the sequence; None if none does."""
        speculator = None if sequence.handle is None else sequence.handle.speculator
        return None if speculator is None else speculator.measured

    def trust(self, sequence: TargetSequence) -> WaitTrust | None:
        """How far the speculator that knows the sequence may be waited for; None if none does."""
        speculator = None if sequence.handle is None else sequence.handle.speculator
        return None if speculator is None else speculator.trust

    # ---- rounds -----------------------------------------------------------------------------------------------

    def next(self, sequence: TargetSequence, outcome: VerificationOutcome, *, lookahead: int) -> NextDraft:
        """Report how the round that ran has ended; returns what was drafted for that outcome."""
        if sequence.handle is None:
            return _NOTHING
        return sequence.handle.next(outcome.num_accepted, outcome.bonus_token, lookahead=lookahead)

    def request(self, sequence: TargetSequence, num_tokens: int, deadline_s: float) -> bool:
        """Have `num_tokens` tokens drafted now; False if nobody can."""
        on_answer = partial(self._events.on_answer, sequence.id, sequence.round - 1)
        return sequence.handle is not None and sequence.handle.request(num_tokens, deadline_s, on_answer)

    def started(self, sequence: TargetSequence) -> None:
        """Report what the running round verifies."""
        if sequence.handle is not None:
            sequence.handle.started(sequence.draft.tokens, sequence.draft.source)

    def timed_out(self, sequence: TargetSequence) -> None:
        """Report that a wait brought nothing in time."""
        if (trust := self.trust(sequence)) is not None:
            trust.timed_out()

    def wasted(self, sequence: TargetSequence) -> None:
        """Report that a wait after a miss brought nothing."""
        if (trust := self.trust(sequence)) is not None:
            trust.wasted(time.perf_counter() - sequence.await_started_s)

    # ---- in and out -------------------------------------------------------------------------------------------

    def open(self, sequence: TargetSequence) -> None:
        """Give the sequence to the pool."""
        request = sequence.request
        if request.mode is SpeculationMode.OFF:
            return
        rejection = request.verification is VerificationMode.REJECTION
        sequence.handle = self._pool.open(
            sequence.tokens,
            sampling_to_proto(request.sampling),
            sequence_id=sequence.id,
            num_prompt_tokens=sequence.num_prompt_tokens,
            mode=_MODES[request.mode],
            verification=types_pb2.VERIFICATION_MODE_REJECTION if rejection else types_pb2.VERIFICATION_MODE_COUPLED,
            max_lookahead=request.max_lookahead,
            tenant=request.tenant,
            tenant_weight=request.tenant_weight,
            cache_salt=request.cache_salt,
            traceparent=request.traceparent,
            events=SequenceEvents(
                on_paired=partial(self._events.on_paired, sequence.id), on_distributions=self._events.on_distributions
            ),
            is_paused=sequence.is_paused,
        )

    def close(self, sequence: TargetSequence) -> None:
        """Take the sequence from the pool: nobody speculates for it any more."""
        if sequence.handle is not None:
            sequence.handle.close()

    def pause(self, sequence: TargetSequence) -> None:
        """Take a sequence that is not speculated on from its speculator, for now."""
        if sequence.handle is not None:
            sequence.handle.pause()

    def resume(self, sequence: TargetSequence) -> None:
        """Give the sequence back to the pool after a pause."""
        sequence.is_paused = False
        if sequence.handle is not None:
            sequence.handle.resume()
