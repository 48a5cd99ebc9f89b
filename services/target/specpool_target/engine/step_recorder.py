"""What the engine's rounds and steps were like: for requests, metrics and status, and for what plans from it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from specpool.algorithm.verification import VerificationOutcome
from specpool.v1 import types_pb2
from specpool_target.engine.scheduler import Scheduler, StepPlan
from specpool_target.engine.sequence import DraftSource, RoundInfo, SpeculationMode, TargetSequence
from specpool_target.engine.statistics import Phases
from specpool_target.engine.step_stats import StepStats
from specpool_target.metrics import TargetMetrics
from specpool_target.next_round.fallback_policy import Average, FallbackPolicy
from specpool_target.next_round.lookahead import LookaheadPlanner
from specpool_target.next_round.next_round import Speculation
from specpool_target.next_round.speculation_trials import Output
from specpool_target.verify.verify_step import VerifyItem


class StepRecorder:
    """Used on the engine thread, but for `load`."""

    def __init__(
        self,
        metrics: TargetMetrics,
        scheduler: Scheduler,
        speculation: Speculation,
        policy: FallbackPolicy,
        planner: LookaheadPlanner,
    ) -> None:
        self._metrics = metrics
        self._scheduler = scheduler
        self._speculation = speculation
        self._policy = policy
        self._planner = planner
        self._stats = StepStats()
        self._last_step_s: float | None = None
        self._rows_per_step = Average()
        self._step_s = Average()

    def load(self) -> types_pb2.Load:
        """For status."""
        pool = self._scheduler.pool
        return types_pb2.Load(
            num_sequences_running=len(self._scheduler.running),
            num_sequences_waiting=len(self._scheduler.waiting),
            num_kv_blocks=pool.num_blocks,
            num_free_kv_blocks=pool.num_free,
            rows_per_step=self._rows_per_step.value,
            step_ms=self._step_s.value * 1e3,
        )

    def round_ended(
        self, sequence: TargetSequence, outcome: VerificationOutcome, num_tokens: int, step: Phases
    ) -> RoundInfo | None:
        """A verification, or the prefill, brought `num_tokens`; None for the prefill."""
        self._stats.num_generation_tokens += num_tokens
        self._stats.num_accepted_tokens += outcome.num_accepted
        now_s = time.perf_counter()
        phases = Phases(
            total=now_s - sequence.round_ended_s,
            waiting=sequence.waited_s + step.waiting,
            forward=step.forward,
            verify=step.verify,
        )
        self._stats.waiting_s += sequence.waited_s
        sequence.round_ended_s, sequence.waited_s = now_s, 0.0
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
            self._metrics.first_token(now_s - sequence.arrived_s)
        else:
            self._metrics.inter_token(phases.total, 1 + outcome.num_accepted)
        if sequence.round == 0:
            return None
        self._observe_round(sequence, outcome.num_accepted, phases)
        return RoundInfo(
            num_draft_tokens=len(sequence.draft.tokens),
            num_accepted=outcome.num_accepted,
            lookup=sequence.draft.lookup,
            phases=phases,
        )

    def _observe_round(self, sequence: TargetSequence, num_accepted: int, phases: Phases) -> None:
        draft, num_draft = sequence.draft, len(sequence.draft.tokens)
        is_backup = draft.source is DraftSource.BACKUP
        stats = sequence.stats
        stats.round(num_draft, num_accepted, phases, is_hit=draft.lookup == "hit")
        stats.num_backup_rounds += is_backup
        stats.num_tail_tokens += draft.num_tail
        stats.num_accepted_tail_tokens += max(0, num_accepted - num_draft + draft.num_tail)
        is_miss = draft.lookup in ("miss", "late")
        waited = is_miss and draft.source is DraftSource.SPECULATOR
        self._policy.observe_round(
            num_draft, num_accepted, phases.total, from_backup=is_backup, num_tail=draft.num_tail, waited=waited
        )
        if sequence.missed_before is not None:
            self._policy.observe_round_after_miss(num_accepted, waited=sequence.missed_before)
        sequence.missed_before = waited if is_miss else None

    def step_ended(
        self, plan: StepPlan, items: Sequence[VerifyItem], phases: Phases, batch_size: int, seconds: float
    ) -> None:
        """`seconds` is the whole step, `phases` its parts, `batch_size` the sequences running before its outcomes."""
        stats, self._stats = self._stats, StepStats()
        num_rows = sum(1 + item.num_draft for item in items)
        self._step_s.observe(seconds)
        self._rows_per_step.observe(num_rows)
        self._export(stats, plan, items, phases, seconds)
        if not any(s.is_prefill for s in plan.segments):
            verify_s = phases.forward + phases.verify
            self._policy.observe_step(len(items), verify_s)
            self._planner.observe_step(num_rows, verify_s)
            self._observe_output(items, stats.num_generation_tokens, batch_size)
        self._planner.trials.end_step()
        self._last_step_s = time.perf_counter() if self._scheduler.running else None

    def _export(
        self, stats: StepStats, plan: StepPlan, items: Sequence[VerifyItem], phases: Phases, seconds: float
    ) -> None:
        stats.num_running, stats.num_waiting = len(self._scheduler.running), len(self._scheduler.waiting)
        stats.kv_cache_usage = self._kv_cache_usage()
        stats.waiting_s += phases.waiting
        stats.forward_s, stats.verify_s = phases.forward, phases.verify
        stats.other_s = max(0.0, seconds - phases.waiting - phases.forward - phases.verify)
        stats.num_drafts = sum(item.num_draft > 0 for item in items)
        stats.num_draft_tokens = sum(item.num_draft for item in items)
        stats.num_prompt_tokens = sum(s.num_tokens for s in plan.segments if s.is_prefill)
        stats.num_preemptions = len(plan.preempted)
        lookups, stats.fallbacks = self._speculation.take_counts()
        stats.num_hits, stats.num_partial = lookups["hit"], lookups["partial"]
        stats.num_late, stats.num_misses = lookups["late"], lookups["miss"]
        self._metrics.observe_step(stats)
        self._metrics.set_fallback_batch_size(self._policy.batch_size_threshold)

    def _observe_output(self, items: Sequence[VerifyItem], num_tokens: int, batch_size: int) -> None:
        """Whether speculation pays is judged by batches in which it is the planner's choice for everyone."""
        sequences = {id(s): s for s in (*(item.sequence for item in items), *self._scheduler.running)}.values()
        is_served = self._speculation.is_served
        modes = {
            s.request.mode if s.request.plans_lookahead and is_served(s) else SpeculationMode.OFF for s in sequences
        }
        mode = modes.pop() if len(modes) == 1 else SpeculationMode.OFF
        if mode is SpeculationMode.OFF or self._last_step_s is None:
            return
        output = Output(
            batch_size=batch_size,
            num_rounds=len(items),
            num_drafted=sum(bool(i.num_draft) and i.draft.source is DraftSource.SPECULATOR for i in items),
            num_tokens=num_tokens,
            seconds=time.perf_counter() - self._last_step_s,
        )
        self._planner.trials.observe(mode, output)

    def idle(self) -> None:
        """There was nothing to compute."""
        if not self._scheduler.running:
            self._last_step_s = None
        self._metrics.set_queue(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            kv_cache_usage=self._kv_cache_usage(),
        )

    def _kv_cache_usage(self) -> float:
        pool = self._scheduler.pool
        return pool.num_used / pool.num_blocks
