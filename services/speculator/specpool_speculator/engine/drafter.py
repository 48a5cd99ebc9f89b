"""The speculator without threads and streams: apply what targets say, plan rows, forward, extend, push tables.

One thread owns it. What targets say goes to `held`, and responses are collected in `held.outbox`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch

from specpool.algorithm.row_times import RowTimes
from specpool.algorithm.saguaro_tuning import SaguaroTuner
from specpool.algorithm.verification import VerificationMode
from specpool.errors import KVCacheFull
from specpool_engine.distributions.transport import BODY_TYPES
from specpool_engine.modeling.interface import CausalModel, Segment
from specpool_speculator.config import SpeculatorConfig
from specpool_speculator.dense.dense_rows import RowMemory
from specpool_speculator.engine.estimates import Estimates
from specpool_speculator.engine.held_sequences import HeldSequences
from specpool_speculator.engine.opened_sequence import DraftLimits
from specpool_speculator.engine.scheduler import PlannedWork, plan_step
from specpool_speculator.engine.step_stats import DraftStepStats
from specpool_speculator.tree.ranks import Ranker, RanksNodes
from specpool_speculator.tree.sequence import Request, SequenceKey, SequenceState

_MAX_FITTED_ROWS = 128
"""Steps with more rows are prefills: their time says nothing about a few rows more."""
_MAX_RANKS = 33
"""Ranks kept per node: more guesses after one accepted length are never worth a row."""


class Drafter:
    """All sequences of all targets over one draft model."""

    def __init__(
        self,
        model: CausalModel,
        config: SpeculatorConfig,
        *,
        end_tokens: frozenset[int] = frozenset(),
        on_draft: Callable[[str, int], None] = lambda tenant, num_tokens: None,
        ranker: RanksNodes | None = None,
        step_time: RowTimes | None = None,
    ) -> None:
        self.last_step = DraftStepStats()
        self._model = model
        self._config = config
        self._estimates = {mode: Estimates(config.fan_out_policy, config.fan_out_budget) for mode in VerificationMode}
        self.row_memory = RowMemory(config.distribution_memory_bytes)
        """Of dense distributions."""
        self._ranker = ranker or Ranker(
            num_ranks=min(config.fan_out_budget + 1, _MAX_RANKS),
            saguaro_constant=config.saguaro_constant,
            num_kept=config.distribution_top_m,
            calibrations={mode: estimates.calibration for mode, estimates in self._estimates.items()},
            dense_dtype=BODY_TYPES[config.distribution_dtype],
            row_memory=self.row_memory,
        )
        self._saguaro = SaguaroTuner() if config.tune_saguaro else None
        self.held = HeldSequences(
            model.pool,
            DraftLimits(
                vocab_size=model.vocab_size,
                max_context=model.max_context,
                max_lookahead=config.max_lookahead,
                end_tokens=end_tokens,
            ),
            self._estimates,
            max_sequences=config.max_sequences,
            on_outcome=self._tune,
        )
        """What targets told."""
        self.step_time = step_time or RowTimes()
        """Seconds of a step by its rows."""
        self._on_draft = on_draft
        self._roomless: Sequence[SequenceKey] = ()

    @property
    def estimates(self) -> Mapping[VerificationMode, Estimates]:
        """By verification mode."""
        return self._estimates

    def _tune(self, sequence: SequenceState, num_tokens: int, received_s: float) -> None:
        is_sampled = sequence.options.verification is VerificationMode.REJECTION
        if self._saguaro is not None and is_sampled:
            if sequence.outcome_s is not None:
                self._saguaro.observe(num_tokens, received_s - sequence.outcome_s)
                self._ranker.saguaro_constant = self._saguaro.constant  # type: ignore[attr-defined]
            sequence.outcome_s = received_s

    # ---- the step -------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One forward, if any row is worth it."""
        started_s = time.monotonic()
        for row_budget in (self._config.row_budget, 0):
            planned = self._plan(row_budget)
            if not planned:
                break
            try:
                forward_s = self._run(planned)
            except KVCacheFull:  # fewer blocks were free than the plan thought: then without branches
                continue
            self._account(planned, forward_s, time.monotonic() - started_s)
            return True
        return False

    def _plan(self, row_budget: int) -> list[PlannedWork]:
        plan = plan_step(
            list(self.held),
            self._model.pool,
            row_budget=row_budget,
            max_prefill_tokens=self._config.max_prefill_tokens,
            step_s=self.step_time if self._config.plan_rows else lambda num_rows: 0.0,
        )
        self._roomless = plan.roomless
        return plan.work

    def _run(self, planned: Sequence[PlannedWork]) -> float:
        """Forward, rank, extend; returns the forward's seconds."""
        segments = [Segment(kv=p.work.kv, tokens=p.work.tokens, num_logits=len(p.work.nodes)) for p in planned]
        started_s = time.monotonic()
        try:
            logits = self._model.forward(segments)
        except BaseException:
            for p in planned:
                p.work.cancel()
            raise
        if logits.is_cuda:  # or the time of a step without logits would count as the next one's
            torch.cuda.current_stream(logits.device).synchronize()
        forward_s = time.monotonic() - started_s
        ranks = iter(self._ranker.rank(logits, [(p.sequence, node) for p in planned for node in p.work.nodes]))
        for p in planned:
            p.work.finish([next(ranks) for _ in p.work.nodes])
            if not p.is_branch and p.sequence.tree.round == 0 and p.sequence.tree.root.is_computed:
                p.sequence.tree.publish()
        return forward_s

    def _account(self, planned: Sequence[PlannedWork], forward_s: float, step_s: float) -> None:
        num_rows = sum(len(p.work.tokens) for p in planned)
        if num_rows <= _MAX_FITTED_ROWS:
            self.step_time.observe(num_rows, step_s)
        drafted = Counter[str]()
        for p in planned:
            drafted[p.sequence.options.tenant] += len(p.work.nodes)
        for tenant, num_tokens in drafted.items():
            self._on_draft(tenant, num_tokens)
        self.held.counters.num_steps += 1
        self.held.counters.num_draft_tokens += drafted.total()
        pool = self._model.pool
        self.last_step = DraftStepStats(
            num_rows=num_rows,
            num_sequences=len(self.held),
            num_targets=self.held.num_targets,
            kv_cache_usage=pool.num_used / pool.num_blocks,
            forward_s=forward_s,
            step_s=step_s,
            num_draft_tokens=drafted.total(),
        )

    # ---- answers --------------------------------------------------------------------------------------------

    def answer(self, now_s: float) -> None:
        """Answer waiting targets whose tokens are there or whose deadline passed, then push what tables gained."""
        self.held.refuse_roomless(self._roomless, now_s)
        for sequence in self.held:
            if sequence.request is not None:
                self._answer_request(sequence, sequence.request, now_s)
            elif sequence.options.speculates_ahead and not sequence.awaits_start:
                self._push(sequence)

    def _answer_request(self, sequence: SequenceState, request: Request, now_s: float) -> None:
        tokens, is_complete = sequence.drafted_now(request.num_tokens)
        if is_complete or now_s >= request.deadline_s:
            self.held.outbox.speculation(*sequence.key, request.round, tokens)
            sequence.request = None

    def _push(self, sequence: SequenceState) -> None:
        entries = {}
        for guess in sequence.guesses():
            tokens, _ = guess.node.chain(sequence.options.lookahead)
            if len(tokens) > sequence.pushed.get(guess.outcome, -1):
                entries[guess.outcome] = tokens
                sequence.pushed[guess.outcome] = len(tokens)
        if entries:
            self.held.counters.num_table_entries += len(entries)
            self.held.outbox.table(sequence, entries)
