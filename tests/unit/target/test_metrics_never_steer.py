"""Metrics observe: with a null object in their place, every decision is the same.

The clock is the test's, and stands still but for forwards and waits, so that two runs measure the same times.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import create_autospec

import pytest
from one_speculator import LOOKAHEAD, OneSpeculator

from specpool.v1 import speculator_pb2
from specpool_engine.modeling.paged_kv import BlockPool
from specpool_engine.modeling.toy import ToyModel, ToyTable
from specpool_target.config import TargetConfig
from specpool_target.engine.engine import TargetEngine
from specpool_target.engine.sequence import SequenceRequest, SpeculationMode, TargetSequence
from specpool_target.metrics import TargetMetrics

VOCAB, NUM_TOKENS = 24, 160


class Clock:
    """Advances when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class TimedModel(ToyModel):
    """Forwards take 10 ms, and 4 ms per token."""

    clock: Clock

    def forward(self, segments):
        self.clock.now_s += 0.010 + 0.004 * sum(len(segment.tokens) for segment in segments)
        return super().forward(segments)


class Workload:
    """Sequences that leave K to the target, and a speculator that often guesses right."""

    def __init__(self, metrics: TargetMetrics, clock: Clock, request_for: Callable[..., SequenceRequest]) -> None:
        self.clock, self.random = clock, random.Random(1)
        self.table = ToyTable(VOCAB, seed=3, sharpness=2.0)
        model = TimedModel(self.table, BlockPool(256, 4), max_context=512)
        model.clock = clock
        config = TargetConfig(model="toy", block_size=4, max_lookahead=LOOKAHEAD)
        loop = asyncio.get_running_loop()
        self.engine = TargetEngine(model, config, loop=loop, metrics=metrics, make_pool=OneSpeculator)
        self.speculator = self.engine.pool.connection
        self.speculator.measured.draft_step_s = self.speculator.measured.round_trip_s = 0.001
        self.decisions: list[tuple[object, ...]] = []
        for index, mode in enumerate([SpeculationMode.SSD] * 3 + [SpeculationMode.SD]):
            request = request_for(f"s{index}", (1 + index, 2, 3), max_tokens=NUM_TOKENS - 40 * index)
            request = replace(request, mode=mode, max_lookahead=LOOKAHEAD, leaves_lookahead=True)
            self.engine.submit(request, lambda update: None)

    def run(self) -> list[tuple[object, ...]]:
        """Decisions until everything has its output."""
        self.engine.thread._receive(wait=False)
        while self.engine.num_sequences:
            for sequence in self.engine.scheduler.running:
                self._speculate(sequence)
            self.engine.thread._receive(wait=False)
            if not self.engine.loop.step():
                self.clock.now_s += 0.004
            self.decisions += [self._decision(sequence) for sequence in self.engine.scheduler.running]
        self.decisions.append((self.engine.lookahead.explain(),))
        return self.decisions

    def _decision(self, sequence: TargetSequence) -> tuple[object, ...]:
        draft = sequence.draft
        return (
            *(sequence.id, sequence.round, tuple(draft.tokens), draft.source, draft.lookup, draft.num_tail),
            *(sequence.lookahead, sequence.is_paused, sequence.await_deadline_s),
        )

    def _speculate(self, sequence: TargetSequence) -> None:
        """A table for the outcome that the running round will have, or an answer to who waits."""
        drafted = self._follow(sequence.tokens, 2 * LOOKAHEAD)
        depth = self.random.choice([0, 2, LOOKAHEAD])
        if sequence.await_deadline_s is not None:
            if depth:
                answer = {"sequence_id": sequence.id, "round": sequence.round - 1, "draft_tokens": drafted[:depth]}
                sequence.handle.take_speculation(self.speculator, speculator_pb2.Speculation(**answer))
            return
        accepted = 0
        while accepted < len(sequence.draft.tokens) and sequence.draft.tokens[accepted] == drafted[accepted]:
            accepted += 1
        if self.random.random() < 0.6 and sequence.handle is not None:
            table = speculator_pb2.Table(round=sequence.round)
            following = drafted[accepted + 1 : accepted + 1 + depth]
            bonus = (drafted[accepted] + (self.random.random() < 0.3)) % VOCAB
            table.entries.add(num_accepted=accepted, bonus_token=bonus, draft_tokens=following)
            sequence.handle.take_table(self.speculator, table)

    def _follow(self, tokens: list[int], count: int) -> list[int]:
        tokens = list(tokens)
        for _ in range(count):
            tokens.append(int(self.table.logits(tokens[-2], tokens[-1]).argmax()))
        return tokens[-count:]


async def test_without_metrics_every_decision_is_the_same(
    request_for: Callable[..., SequenceRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decisions(metrics: TargetMetrics) -> list[tuple[object, ...]]:
        clock = Clock()
        with monkeypatch.context() as patched:
            patched.setattr(time, "perf_counter", clock)
            return Workload(metrics, clock, request_for).run()

    real = decisions(TargetMetrics("toy"))
    assert decisions(create_autospec(TargetMetrics, instance=True)) == real
    sources = {decision[3] for decision in real[:-1]}
    lookups = {decision[4] for decision in real[:-1]}
    assert len(sources) == 3, "the workload has every kind of draft"
    assert {"late", "partial", "miss"} <= lookups
    assert len({decision[6] for decision in real[:-1]}) > 1, "and K was chosen anew"
