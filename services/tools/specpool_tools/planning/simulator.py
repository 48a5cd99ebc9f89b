"""Targets and one speculator in virtual time.

The speculator is the real one: draft trees, calibration-free ranking, row scheduling and tables of
`specpool_speculator.Drafter`; so are the targets' speculation cache and what decides whether they wait after
a miss. Forwards take the profile's times, messages half a round trip.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import cast

from specpool.algorithm.fallback import DraftTimes
from specpool.algorithm.row_times import RowTimes
from specpool.algorithm.speculation_cache import LookupKind, SpeculationCache
from specpool.v1 import speculator_pb2, types_pb2
from specpool_speculator.config import FanOutPolicy, SpeculatorConfig
from specpool_speculator.engine.drafter import Drafter
from specpool_target.config import Fallback
from specpool_target.next_round.fallback_policy import FallbackPolicy
from specpool_tools.planning.profile import Profile
from specpool_tools.planning.text import VOCAB_SIZE, SimulatedModel, SimulatedRanker, SimulatedText

MODES = ("off", "sd", "ssd")
_MODE_VALUES = {"sd": types_pb2.SPECULATION_MODE_SD, "ssd": types_pb2.SPECULATION_MODE_SSD}
_PROMPT_LENGTH = 8
_WARM_UP_SHARE = 0.2
"""Of the simulated time, left out of the figures."""
_STEP_SMOOTHING = 0.1
Request = speculator_pb2.SpeculateRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """What is simulated."""

    mode: str
    """off, sd or ssd."""
    num_targets: int = 1
    """On one speculator."""
    batch_size: int = 1
    """Sequences per target."""
    fallback: Fallback = "auto"
    """After a miss, in mode ssd."""
    seconds: float = 20.0
    """Simulated."""
    seed: int = 1


@dataclass(slots=True)
class Figures:
    """What came out."""

    tokens_per_second: float = 0.0
    """Of one sequence, mean."""
    tokens_per_round: float = 0.0
    hit_rate: float = 0.0
    """Full and partial hits over lookups."""
    full_hit_rate: float = 0.0
    wait_rate: float = 0.0
    """Of the misses, waits for a just-in-time speculation."""
    rows_per_step: float = 0.0
    utilisation: float = 0.0
    """Share of the time that the speculator computes."""


class _FixedTime(RowTimes):
    """The profile's, instead of one fitted to the time that the simulation takes."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self._profile = profile

    def observe(self, num_rows: int, seconds: float) -> None:
        """Nothing is learned."""

    def __call__(self, num_rows: int) -> float:
        profile = self._profile
        num_paid = max(0, num_rows - profile.draft_free_rows)
        return (profile.draft_step_ms + profile.draft_row_ms * num_paid) / 1e3


class Simulation:
    """A clock and what happens at which time."""

    def __init__(self, profile: Profile, scenario: Scenario) -> None:
        self.profile = profile
        self.scenario = scenario
        self.now_s = 0.0
        self.text = SimulatedText(profile, scenario.seed)
        self.speculator = _Speculator(self)
        self.targets = [_Target(self, index) for index in range(scenario.num_targets)]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run `action` then."""
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._order), action))

    @property
    def half_trip_s(self) -> float:
        """One way between target and speculator."""
        return self.profile.round_trip_ms / 2e3

    def run(self) -> Figures:
        """Everything, from the prefill on."""
        warm_up_s = self.scenario.seconds * _WARM_UP_SHARE
        for target in self.targets:
            self.after(0.0, target.start)
        is_warm = False
        while self._events and self._events[0][0] < self.scenario.seconds:
            self.now_s, _, action = heapq.heappop(self._events)
            if not is_warm and self.now_s >= warm_up_s:
                is_warm = True
                self.speculator.reset()
                for target in self.targets:
                    target.reset()
            action()
        return self._figures(self.scenario.seconds - warm_up_s)

    def _figures(self, seconds: float) -> Figures:
        sequences = [sequence for target in self.targets for sequence in target.sequences]
        rounds = max(1, sum(sequence.num_rounds for sequence in sequences))
        tokens = sum(sequence.num_tokens for sequence in sequences)
        lookups = max(1, sum(sum(sequence.lookups.values()) for sequence in sequences))
        full = sum(sequence.lookups.get(LookupKind.HIT, 0) for sequence in sequences)
        partial = sum(sequence.lookups.get(LookupKind.PARTIAL, 0) for sequence in sequences)
        waits = sum(sequence.num_waits for sequence in sequences)
        return Figures(
            tokens_per_second=tokens / seconds / len(sequences),
            tokens_per_round=tokens / rounds,
            hit_rate=(full + partial) / lookups,
            full_hit_rate=full / lookups,
            wait_rate=waits / max(1, lookups - full - partial),
            rows_per_step=self.speculator.num_rows / max(1, self.speculator.num_steps),
            utilisation=min(1.0, self.speculator.busy_s / seconds),
        )


def simulate(profile: Profile, scenario: Scenario) -> Figures:
    """Figures of one scenario."""
    return Simulation(profile, scenario).run()


class _Speculator:
    """The engine's loop, with steps that take virtual time."""

    def __init__(self, simulation: Simulation) -> None:
        profile = simulation.profile
        config = SpeculatorConfig(
            model="simulated",
            row_budget=profile.row_budget,
            fan_out_budget=profile.fan_out,
            fan_out_policy=cast(FanOutPolicy, profile.fan_out_policy),
            max_lookahead=profile.lookahead,
            max_sequences=1 << 20,
        )
        self._simulation = simulation
        self.drafter = Drafter(
            SimulatedModel(),
            config,
            ranker=SimulatedRanker(simulation.text, profile.fan_out + 1),
            step_time=_FixedTime(profile),
        )
        self._inbox: list[tuple[int, Request, float]] = []
        self._is_busy = False
        self.usual_step_s = self.drafter.step_time(1)
        """What targets hear of."""
        self.reset()

    def reset(self) -> None:
        """Count from now on."""
        self.num_rows = self.num_steps = 0
        self.busy_s = 0.0

    def receive(self, connection: int, request: Request) -> None:
        """A message arrived; a running step is not interrupted."""
        self._inbox.append((connection, request, self._simulation.now_s))
        if not self._is_busy:
            self._loop()

    def _loop(self) -> None:
        for connection, request, received_s in self._inbox:
            self.drafter.apply(connection, request, received_s)
        self._inbox.clear()
        self._answer()
        self._is_busy = self.drafter.step()
        if self._is_busy:
            num_rows = self.drafter.last_step.num_rows
            step_s = self.drafter.step_time(num_rows)
            self.num_steps += 1
            self.num_rows += num_rows
            self.busy_s += step_s
            self.usual_step_s += _STEP_SMOOTHING * (step_s - self.usual_step_s)
            self._simulation.after(step_s, self._end_step)

    def _end_step(self) -> None:
        self._answer()
        self._loop()

    def _answer(self) -> None:
        self.drafter.answer(self._simulation.now_s)
        for connection, responses in self.drafter.outbox.take().items():
            target = self._simulation.targets[connection]
            self._simulation.after(self._simulation.half_trip_s, _delivery(target, responses))


def _delivery(target: _Target, responses: list[speculator_pb2.SpeculateResponse]) -> Callable[[], None]:
    return lambda: target.receive(responses)


@dataclass(slots=True)
class _Sequence:
    """One sequence of a target."""

    id: str
    length: int
    """Tokens committed."""
    cache: SpeculationCache
    round: int = 0
    draft: list[int] = field(default_factory=list)
    waits_for: int = 0
    """Draft tokens that it waits for; 0: it does not wait."""
    started_s: float = 0.0
    """When the round began."""
    missed: bool = False
    """Its outcome was not in the cache."""
    waited: bool = False
    """Its draft was waited for, after that."""
    missed_before: bool | None = None
    """Whether the round before had waited for its draft after a miss; None: it was a hit."""
    num_rounds: int = 0
    num_tokens: int = 0
    num_waits: int = 0
    lookups: dict[LookupKind, int] = field(default_factory=dict)


class _Target:
    """Verifies all sequences that do not wait, as soon as the forward before is through."""

    def __init__(self, simulation: Simulation, connection: int) -> None:
        self._simulation = simulation
        self._connection = connection
        self._is_busy = False
        scenario = simulation.scenario
        self._policy = FallbackPolicy(
            max_batch_size=scenario.batch_size, lookahead=simulation.profile.lookahead, fallback=scenario.fallback
        )
        self.sequences = [
            _Sequence(f"{connection}.{index}", _PROMPT_LENGTH, SpeculationCache(simulation.profile.lookahead))
            for index in range(scenario.batch_size)
        ]
        self._by_id = {sequence.id: sequence for sequence in self.sequences}

    def reset(self) -> None:
        """Count from now on."""
        for sequence in self.sequences:
            sequence.num_rounds = sequence.num_tokens = sequence.num_waits = 0
            sequence.lookups.clear()

    def start(self) -> None:
        """Open every sequence, then prefill, whose time is that of a round."""
        mode, text = self._simulation.scenario.mode, self._simulation.text
        if mode != "off":
            self._simulation.speculator.drafter.connect(self._connection, VOCAB_SIZE)
            for sequence in self.sequences:
                opening = speculator_pb2.OpenSequence(
                    sequence_id=sequence.id,
                    token_ids=[text.token(sequence.id, position) for position in range(_PROMPT_LENGTH)],
                    num_prompt_tokens=_PROMPT_LENGTH,
                    sampling=types_pb2.SamplingParams(temperature=0.0, max_tokens=1 << 19, ignore_eos=True),
                    mode=_MODE_VALUES[mode],
                    max_lookahead=self._simulation.profile.lookahead,
                )
                self._send(Request(open_sequence=opening))
        self._begin()

    def _send(self, request: Request) -> None:
        simulation = self._simulation
        simulation.after(simulation.half_trip_s, lambda: simulation.speculator.receive(self._connection, request))

    def _begin(self) -> None:
        ready = [sequence for sequence in self.sequences if not sequence.waits_for]
        if self._is_busy or not ready:
            return
        self._is_busy = True
        profile, num_rows = self._simulation.profile, sum(1 + len(sequence.draft) for sequence in ready)
        forward_s = (profile.verify_ms + profile.verify_row_ms * num_rows) / 1e3
        self._simulation.after(forward_s, lambda: self._end(ready, forward_s))

    def _end(self, verified: list[_Sequence], forward_s: float) -> None:
        self._is_busy = False
        self._policy.observe_step(len(verified), forward_s)
        outcomes = [self._end_round(sequence) for sequence in verified]
        if self._simulation.scenario.mode != "off":
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
        text = self._simulation.text
        num_accepted = 0
        for token in sequence.draft:
            if token != text.token(sequence.id, sequence.length + num_accepted):
                break
            num_accepted += 1
        bonus = text.token(sequence.id, sequence.length + num_accepted)
        self._observe(sequence, num_accepted)
        sequence.length += num_accepted + 1
        sequence.num_rounds += 1
        sequence.num_tokens += num_accepted + 1
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
        seconds = self._simulation.now_s - sequence.started_s
        self._policy.observe_round(
            len(sequence.draft), num_accepted, seconds, from_backup=False, waited=sequence.waited
        )
        if sequence.missed_before is not None:
            self._policy.observe_round_after_miss(num_accepted, waited=sequence.missed_before)
        sequence.missed_before = sequence.waited if sequence.missed else None
        sequence.started_s = self._simulation.now_s

    def _choose(self, sequence: _Sequence, ended: int, num_accepted: int, bonus: int) -> list[int]:
        """Draft tokens at hand; or none, and the sequence may wait."""
        mode = self._simulation.scenario.mode
        sequence.missed = sequence.waited = False
        if mode == "sd":
            sequence.waits_for = self._simulation.profile.lookahead
        if mode != "ssd":
            return []
        lookup = sequence.cache.lookup(ended, num_accepted, bonus)
        sequence.lookups[lookup.kind] = sequence.lookups.get(lookup.kind, 0) + 1
        if not lookup.tokens:
            sequence.waits_for = self._wait_after_miss()
            sequence.missed, sequence.waited = True, sequence.waits_for > 0
            sequence.num_waits += sequence.waited
        return list(lookup.tokens)

    def _wait_after_miss(self) -> int:
        """Draft tokens that are worth waiting for."""
        profile = self._simulation.profile
        step_s = self._simulation.speculator.usual_step_s
        times = DraftTimes(first_s=profile.round_trip_ms / 1e3 + 1.5 * step_s, step_s=step_s)
        choice = self._policy.choose(times, batch_size=len(self.sequences), lookahead=profile.lookahead, num_backup=0)
        return choice.depth

    def receive(self, responses: list[speculator_pb2.SpeculateResponse]) -> None:
        """Tables and answers of the speculator."""
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
