"""A target of a simulation: the real speculation cache and policy of waiting; forwards that take virtual time."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from specpool.algorithm.fallback import DraftTimes
from specpool.algorithm.speculation_cache import LookupKind, SpeculationCache
from specpool.v1 import speculator_pb2, types_pb2
from specpool_target.next_round.fallback_policy import FallbackPolicy
from specpool_tools.planning.clock import Clock
from specpool_tools.planning.profile import Profile
from specpool_tools.planning.scenario import Scenario
from specpool_tools.planning.simulated_speculator import Request, SimulatedSpeculator
from specpool_tools.planning.text import SimulatedText

_MODE_VALUES = {"sd": types_pb2.SPECULATION_MODE_SD, "ssd": types_pb2.SPECULATION_MODE_SSD}
_PROMPT_LENGTH = 8


@dataclass(slots=True)
class _Sequence:
    """One sequence of a target."""

    id: str
    length: int
    """Number of tokens committed."""
    cache: SpeculationCache
    round: int = 0
    draft: list[int] = field(default_factory=list)
    waits_for: int = 0
    """Number of draft tokens that the sequence waits for; 0: it does not wait."""
    started_s: float = 0.0
    """Time in seconds at which the round began."""
    missed: bool = False
    """Whether the outcome was not in the cache."""
    waited: bool = False
    """Whether the draft was waited for after that miss."""
    missed_before: bool | None = None
    """Whether the round before had waited for its draft after a miss; None: it was a hit."""
    num_rounds: int = 0
    num_tokens: int = 0
    sum_of_squares: int = 0
    """Of the numbers of tokens of its rounds."""
    num_waits: int = 0
    lookups: dict[LookupKind, int] = field(default_factory=dict)


class SimulatedTarget:
    """Verifies all sequences that do not wait, as soon as the forward before is through."""

    def __init__(
        self,
        clock: Clock,
        profile: Profile,
        scenario: Scenario,
        text: SimulatedText,
        speculator: SimulatedSpeculator,
        connection: int,
    ) -> None:
        self._clock, self._profile, self._mode, self._text = clock, profile, scenario.mode, text
        self._speculator, self._connection = speculator, connection
        self._is_busy = False
        self._policy = FallbackPolicy(scenario.fallback)
        self.sequences = [
            _Sequence(f"{connection}.{index}", _PROMPT_LENGTH, SpeculationCache(profile.lookahead))
            for index in range(scenario.batch_size)
        ]
        self._by_id = {sequence.id: sequence for sequence in self.sequences}

    def reset(self) -> None:
        """Count from now on, so that the warm-up is left out."""
        for sequence in self.sequences:
            sequence.num_rounds = sequence.num_tokens = sequence.sum_of_squares = sequence.num_waits = 0
            sequence.lookups.clear()

    def start(self) -> None:
        """Open every sequence, then prefill, which takes the time of a round."""
        if self._mode != "off":
            self._speculator.connect(self._connection, self.receive)
            for sequence in self.sequences:
                opening = speculator_pb2.OpenSequence(
                    sequence_id=sequence.id,
                    token_ids=[self._text.token(sequence.id, position) for position in range(_PROMPT_LENGTH)],
                    num_prompt_tokens=_PROMPT_LENGTH,
                    sampling=types_pb2.SamplingParams(temperature=0.0, max_tokens=1 << 19, ignore_eos=True),
                    mode=_MODE_VALUES[self._mode],
                    max_lookahead=self._profile.lookahead,
                )
                self._send(Request(open_sequence=opening))
        self._begin()

    def _send(self, request: Request) -> None:
        self._clock.after(
            self._profile.round_trip_ms / 2e3, partial(self._speculator.receive, self._connection, request)
        )

    def _begin(self) -> None:
        ready = [sequence for sequence in self.sequences if not sequence.waits_for]
        if self._is_busy or not ready:
            return
        self._is_busy = True
        profile, num_rows = self._profile, sum(1 + len(sequence.draft) for sequence in ready)
        forward_s = (profile.verify_ms + profile.verify_row_ms * num_rows) / 1e3
        self._clock.after(forward_s, lambda: self._end(ready, forward_s))

    def _end(self, verified: list[_Sequence], forward_s: float) -> None:
        self._is_busy = False
        self._policy.observe_step(len(verified), forward_s)
        outcomes = [self._end_round(sequence) for sequence in verified]
        if self._mode != "off":
            self._send(Request(outcomes=speculator_pb2.Outcomes(outcomes=outcomes)))
        for sequence, outcome in zip(verified, outcomes, strict=True):
            if outcome.awaits_speculation:
                now = speculator_pb2.SpeculateNow(
                    sequence_id=sequence.id,
                    round=outcome.round,
                    num_tokens=sequence.waits_for,
                    deadline_ms=1e9,
                )
                self._send(Request(speculate_now=now))
        self._begin()

    def _end_round(self, sequence: _Sequence) -> speculator_pb2.Outcome:
        num_accepted = 0
        for token in sequence.draft:
            if token != self._text.token(sequence.id, sequence.length + num_accepted):
                break
            num_accepted += 1
        bonus = self._text.token(sequence.id, sequence.length + num_accepted)
        self._observe(sequence, num_accepted)
        sequence.length += num_accepted + 1
        sequence.num_rounds += 1
        sequence.num_tokens += num_accepted + 1
        sequence.sum_of_squares += (num_accepted + 1) ** 2
        ended, sequence.round = sequence.round, sequence.round + 1
        sequence.draft = self._choose(sequence, ended, num_accepted, bonus)
        return speculator_pb2.Outcome(
            sequence_id=sequence.id,
            round=ended,
            num_accepted=num_accepted,
            bonus_token=bonus,
            draft_tokens=sequence.draft,
            draft_source=speculator_pb2.DRAFT_SOURCE_SPECULATOR,
            awaits_speculation=sequence.waits_for > 0,
        )

    def _observe(self, sequence: _Sequence, num_accepted: int) -> None:
        seconds = self._clock.now_s - sequence.started_s
        self._policy.observe_round(
            len(sequence.draft), num_accepted, seconds, from_backup=False, waited=sequence.waited
        )
        if sequence.missed_before is not None:
            self._policy.observe_round_after_miss(num_accepted, waited=sequence.missed_before)
        sequence.missed_before = sequence.waited if sequence.missed else None
        sequence.started_s = self._clock.now_s

    def _choose(self, sequence: _Sequence, ended: int, num_accepted: int, bonus: int) -> list[int]:
        """The draft tokens at hand; or none, and the sequence may wait."""
        sequence.missed = sequence.waited = False
        if self._mode == "sd":
            sequence.waits_for = self._profile.lookahead
        if self._mode != "ssd":
            return []
        lookup = sequence.cache.lookup(ended, num_accepted, bonus)
        sequence.lookups[lookup.kind] = sequence.lookups.get(lookup.kind, 0) + 1
        if not lookup.tokens:
            sequence.waits_for = self._wait_after_miss()
            sequence.missed, sequence.waited = True, sequence.waits_for > 0
            sequence.num_waits += sequence.waited
        return list(lookup.tokens)

    def _wait_after_miss(self) -> int:
        """Number of draft tokens that are worth waiting for; 0: none."""
        step_s = self._speculator.usual_step_s
        times = DraftTimes(first_s=self._profile.round_trip_ms / 1e3 + 1.5 * step_s, step_s=step_s)
        choice = self._policy.choose(
            times, batch_size=len(self.sequences), lookahead=self._profile.lookahead, num_backup=0
        )
        return choice.depth

    def receive(self, responses: list[speculator_pb2.SpeculateResponse]) -> None:
        """Take in tables and answers of the speculator."""
        for response in responses:
            for table in response.tables.tables:
                entries = {(e.num_accepted, e.bonus_token): tuple(e.draft_tokens) for e in table.entries}
                self._by_id[table.sequence_id].cache.update(table.round, entries)
            if response.HasField("speculation"):
                self._resume(response.speculation)

    def _resume(self, answer: speculator_pb2.Speculation) -> None:
        sequence = self._by_id[answer.sequence_id]
        if not sequence.waits_for or answer.round != sequence.round - 1:
            return
        sequence.waits_for, sequence.draft = 0, list(answer.draft_tokens)
        start = speculator_pb2.StartRound(
            sequence_id=sequence.id,
            round=sequence.round,
            draft_tokens=sequence.draft,
            draft_source=speculator_pb2.DRAFT_SOURCE_SPECULATOR,
        )
        self._send(Request(start_round=start))
        self._begin()
