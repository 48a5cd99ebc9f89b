"""What rounds and steps were like, for requests, metrics and status. Decisions are fed by `next_round.observer`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from specpool.algorithm.estimators import Average
from specpool.speculation import DraftSource
from specpool.v1 import types_pb2
from specpool_target.engine.scheduler import ScheduledStep, Scheduler
from specpool_target.engine.sequence import RoundInfo, TargetSequence
from specpool_target.engine.statistics import Phases, StepStats
from specpool_target.metrics import TargetMetrics
from specpool_target.next_round.observer import EndedRound


class StepRecorder:
    """Records rounds and steps. Used on the engine thread, but for `load`."""

    def __init__(
        self,
        metrics: TargetMetrics,
        scheduler: Scheduler,
        take_counts: Callable[[], tuple[Counter[str], Counter[str]]],
    ) -> None:
        """`take_counts` returns lookups by kind and fallbacks by reason since it was last called."""
        self._metrics = metrics
        self._scheduler = scheduler
        self._take_counts = take_counts
        self._rows_per_step = Average()
        self._step_s = Average()
        self._num_queried_tokens = 0
        self._num_hit_tokens = 0
        self._between_tokens: list[tuple[float, int]] = []
        """Seconds and tokens of the rounds since the last step was recorded: a histogram takes its time."""

    def load(self) -> types_pb2.Load:
        """The load of this target as status reports it."""
        pool = self._scheduler.pool
        return types_pb2.Load(
            num_sequences_running=len(self._scheduler.running),
            num_sequences_waiting=len(self._scheduler.waiting),
            num_kv_blocks=pool.num_blocks,
            num_free_kv_blocks=pool.num_free,
            rows_per_step=self._rows_per_step.value,
            step_ms=self._step_s.value * 1e3,
            num_prefix_cache_queried_tokens=self._num_queried_tokens,
            num_prefix_cache_hit_tokens=self._num_hit_tokens,
        )

    def admitted(self, num_tokens: int, num_cached: int) -> None:
        """Record the first admission of a sequence of `num_tokens` tokens, `num_cached` of them in the prefix cache."""
        self._num_queried_tokens += num_tokens
        self._num_hit_tokens += num_cached
        self._metrics.prefix_cache(num_tokens, num_cached)

    def round_ended(self, ended: EndedRound, step: Phases) -> Phases:
        """Record a verification, or the prefill; returns the phases of this round of this sequence."""
        sequence, now_s = ended.sequence, time.perf_counter()
        phases = Phases(
            total=now_s - sequence.round_ended_s,
            waiting=sequence.waited_s + step.waiting,
            forward=step.forward,
            verify=step.verify,
        )
        sequence.round_ended_s, sequence.waited_s = now_s, 0.0
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
            if not sequence.request.committed_tokens:  # else the client has had its first token for long
                self._metrics.first_token(now_s - sequence.arrived_s)
        else:
            self._between_tokens.append((phases.total, 1 + ended.num_accepted))
        if sequence.round > 0:
            _count_round(sequence, ended, phases)
        return phases

    def step_ended(self, step: ScheduledStep, rounds: Sequence[EndedRound], phases: Phases, *, idle_s: float) -> None:
        """Record a step with its `phases`. Before it, all of the batch had waited for speculations for `idle_s`."""
        for seconds, num_tokens in self._between_tokens:
            self._metrics.inter_token(seconds, num_tokens)
        self._between_tokens.clear()
        num_rows = sum(1 + len(ended.draft.tokens) for ended in rounds)
        self._step_s.observe(phases.total)
        self._rows_per_step.observe(num_rows)
        lookups, fallbacks = self._take_counts()
        self._metrics.observe_step(
            StepStats(
                num_running=len(self._scheduler.running),
                num_waiting=len(self._scheduler.waiting),
                kv_cache_usage=self._kv_cache_usage(),
                waiting_s=phases.waiting + idle_s,
                forward_s=phases.forward,
                verify_s=phases.verify,
                other_s=max(0.0, phases.total - phases.waiting - phases.forward - phases.verify),
                num_drafts=sum(bool(ended.draft.tokens) for ended in rounds),
                num_draft_tokens=sum(len(ended.draft.tokens) for ended in rounds),
                num_accepted_tokens=sum(ended.num_accepted for ended in rounds),
                num_generation_tokens=sum(ended.num_tokens for ended in rounds),
                num_prompt_tokens=sum(s.num_tokens for s in step.segments if s.is_prefill),
                num_preemptions=len(step.preempted),
                num_hits=lookups["hit"],
                num_partial=lookups["partial"],
                num_late=lookups["late"],
                num_misses=lookups["miss"],
                fallbacks=fallbacks,
            )
        )

    def request_finished(self, reason: str, seconds: float) -> None:
        """Record that a request has all of its output, after `seconds`."""
        self._metrics.request_finished(reason, seconds)

    def idle(self) -> None:
        """Record that there is nothing to compute."""
        self._metrics.set_queue(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            kv_cache_usage=self._kv_cache_usage(),
        )

    def _kv_cache_usage(self) -> float:
        pool = self._scheduler.pool
        return pool.num_used / pool.num_blocks


def round_info(ended: EndedRound, phases: Phases) -> RoundInfo | None:
    """What traces show of a round; None for the prefill."""
    if ended.sequence.round == 0:
        return None
    return RoundInfo(
        num_draft_tokens=len(ended.draft.tokens),
        num_accepted=ended.num_accepted,
        lookup=ended.draft.lookup,
        phases=phases,
    )


def _count_round(sequence: TargetSequence, ended: EndedRound, phases: Phases) -> None:
    draft, num_draft = ended.draft, len(ended.draft.tokens)
    stats = sequence.stats
    stats.round(num_draft, ended.num_accepted, phases, is_hit=draft.lookup == "hit")
    stats.num_backup_rounds += draft.source is DraftSource.BACKUP
    stats.num_tail_tokens += draft.num_tail
    stats.num_accepted_tail_tokens += max(0, ended.num_accepted - num_draft + draft.num_tail)
