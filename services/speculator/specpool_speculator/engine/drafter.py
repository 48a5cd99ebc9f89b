"""The speculator without threads and streams: apply what targets say, schedule rows, forward, extend, push tables.

One thread owns it. What targets say goes to `held`, and responses are collected in `held.outbox`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from specpool.algorithm.row_times import RowTimes
from specpool.algorithm.saguaro_tuning import SaguaroTuner
from specpool.algorithm.verification import VerificationMode
from specpool.errors import KVCacheFull, SpecPoolError
from specpool_engine.distributions.transport import BODY_TYPES
from specpool_engine.modeling.interface import CausalModel, Segment, check_segments, forward_of
from specpool_speculator.config import SpeculatorConfig
from specpool_speculator.dense.dense_rows import RowMemory
from specpool_speculator.engine.estimates import Estimates
from specpool_speculator.engine.held_sequences import HeldSequences
from specpool_speculator.engine.opened_sequence import DraftLimits
from specpool_speculator.engine.scheduler import ScheduledStep, ScheduledWork, cancel, schedule_step
from specpool_speculator.engine.step_stats import DraftStepStats
from specpool_speculator.tree.node import Node, NodeRanks
from specpool_speculator.tree.ranks import Ranker, RanksNodes
from specpool_speculator.tree.sequence import Request, SequenceKey, SequenceState

_MAX_FITTED_ROWS = 128
"""Steps with more rows are prefills: their time says nothing about a few rows more."""
_MAX_RANKS = 33
"""Ranks kept per node: more guesses after one accepted length are never worth a row."""


class _OthersCanRun(Exception):
    """Raised when a step was refused before anything changed, and the sequences that it was refused for have ended."""


class Drafter:
    """Drafts for all sequences of all targets with one draft model."""

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
        self._forward = forward_of(model)
        self._config = config
        self._estimates = {
            mode: Estimates(config.fan_out_policy, config.fan_out_budget, mode is not VerificationMode.REJECTION)
            for mode in VerificationMode
        }
        self.row_memory = RowMemory(config.distribution_memory_bytes)
        """Bounds the dense distributions of all branches."""
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
        """The sequences of all targets, as the targets told of them."""
        self.step_time = step_time or RowTimes()
        """Seconds of a step by its number of rows."""
        self._on_draft = on_draft
        self._roomless: Sequence[SequenceKey] = ()

    @property
    def estimates(self) -> Mapping[VerificationMode, Estimates]:
        """What outcomes taught about guessing, by verification mode."""
        return self._estimates

    def _tune(self, sequence: SequenceState, num_tokens: int, received_s: float) -> None:
        is_sampled = sequence.options.verification is VerificationMode.REJECTION
        if self._saguaro is not None and is_sampled:
            if sequence.outcome_s is not None:
                self._saguaro.observe(num_tokens, received_s - sequence.outcome_s)
                self._ranker.saguaro_constant = self._saguaro.constant  # type: ignore[attr-defined]
            sequence.outcome_s = received_s

    # ---- the step -------------------------------------------------------------------------------------------

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Run one forward, if any row is worth it; returns whether there was one.

        `meanwhile` is called once in that case, while the forward runs or before it. It may answer, and push tables.
        What outcomes teach is learned after that.
        """
        started_s = time.monotonic()
        for row_budget in (self._config.row_budget, 0):
            scheduled = self._schedule(row_budget)
            if not scheduled:
                break
            try:
                forward_s = self._run(scheduled, meanwhile)
            except KVCacheFull:  # fewer blocks were free than the schedule thought: then without branches
                continue
            except _OthersCanRun:
                return self.step(meanwhile)
            self._account(scheduled, forward_s, time.monotonic() - started_s)
            return True
        self.held.learn()
        return False

    def _schedule(self, row_budget: int) -> list[ScheduledWork]:
        sequences = list(self.held)
        try:
            step = self._schedule_for(sequences, row_budget)
        except Exception:
            for sequence in sequences:
                self._try(sequence, lambda one: cancel(self._schedule_for([one], row_budget).work))
            step = self._schedule_for(list(self.held), row_budget)
        self._roomless = step.roomless
        return step.work

    def _schedule_for(self, sequences: Sequence[SequenceState], row_budget: int) -> ScheduledStep:
        return schedule_step(
            sequences,
            self._model.pool,
            row_budget=row_budget,
            max_prefill_tokens=self._config.max_prefill_tokens,
            step_s=self.step_time if self._config.skip_costly_rows else lambda num_rows: 0.0,
        )

    def _try(self, sequence: SequenceState, action: Callable[[SequenceState], None]) -> bool:
        """Call `action`; an error ends this sequence alone. Returns False if there was one."""
        try:
            action(sequence)
        except Exception as error:
            self.held.fail(sequence.key, error)
            return False
        return True

    def _refused(self, scheduled: Sequence[ScheduledWork]) -> list[tuple[SequenceState, SpecPoolError]]:
        """The sequences whose work no model can run, each with the error that says why."""
        found: list[tuple[SequenceState, SpecPoolError]] = []
        for p in scheduled:
            try:
                check_segments([_segment(p)], max_context=self._model.max_context, vocab_size=self._model.vocab_size)
            except SpecPoolError as error:
                found.append((p.sequence, error))
        return found

    def _run(self, scheduled: Sequence[ScheduledWork], meanwhile: Callable[[], None]) -> float:
        """Run the forward, rank its logits, and extend the trees; returns the forward's seconds."""

        def and_learn() -> None:
            meanwhile()
            self.held.learn()

        started_s = time.monotonic()
        try:
            logits = self._forward([_segment(p) for p in scheduled], and_learn)
        except BaseException as error:
            refused = self._refused(scheduled) if isinstance(error, SpecPoolError) else []
            cancel(scheduled)
            for sequence, refusal in refused:
                self.held.fail(sequence.key, refusal)
            if refused:
                raise _OthersCanRun from error
            raise
        if logits.is_cuda:  # or the time of a step without logits would count as the next one's
            torch.cuda.current_stream(logits.device).synchronize()
        forward_s = time.monotonic() - started_s
        ranks = iter(self._ranks(logits, [(p.sequence, node) for p in scheduled for node in p.work.nodes]))
        for p in scheduled:
            self._finish(p, [next(ranks) for _ in p.work.nodes])
        return forward_s

    def _ranks(self, logits: Tensor, rows: Sequence[tuple[SequenceState, Node]]) -> list[NodeRanks | None]:
        """Ranks from logits [N, V] for N rows; None for those of a sequence that cannot be ranked, which has ended."""
        try:
            return [*self._ranker.rank(logits, rows)]
        except Exception:
            ranks: list[NodeRanks | None] = [None] * len(rows)
            for index, (sequence, node) in enumerate(rows):
                try:
                    (ranks[index],) = self._ranker.rank(logits[index : index + 1], [(sequence, node)])
                except Exception as error:
                    self.held.fail(sequence.key, error)
            return ranks

    def _finish(self, scheduled: ScheduledWork, ranks: Sequence[NodeRanks | None]) -> None:
        sequence, work = scheduled.sequence, scheduled.work
        found = [one for one in ranks if one is not None]
        if not self.held.holds(sequence) or len(found) < len(ranks):
            work.cancel()  # it has ended meanwhile
            return
        work.finish(found)
        if scheduled.is_branch:
            sequence.extend(work.nodes)
        if not scheduled.is_branch and sequence.tree.round == 0 and sequence.tree.root.is_computed:
            self._try(sequence, lambda one: one.tree.publish())

    def _account(self, scheduled: Sequence[ScheduledWork], forward_s: float, step_s: float) -> None:
        num_rows = sum(len(p.work.tokens) for p in scheduled)
        if num_rows <= _MAX_FITTED_ROWS:
            self.step_time.observe(num_rows, step_s)
        drafted = Counter[str]()
        for p in scheduled:
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
        self.answer_requests(now_s)
        self.push_tables()

    def answer_requests(self, now_s: float) -> None:
        """Answer waiting targets whose tokens are there or whose deadline passed, and refuse what has no memory."""
        self.held.refuse_roomless(self._roomless, now_s)
        for sequence in [one for one in self.held if one.request is not None]:
            self._try(sequence, lambda one: self._answer_request(one, one.request, now_s))

    def push_tables(self) -> None:
        """Push what the tables of running rounds gained."""
        for sequence in list(self.held):
            if sequence.request is None and sequence.options.speculates_ahead and not sequence.awaits_start:
                try:
                    self._push(sequence)
                except Exception as error:
                    self.held.fail(sequence.key, error)

    def _answer_request(self, sequence: SequenceState, request: Request | None, now_s: float) -> None:
        assert request is not None, "only targets that wait are answered"
        tokens, is_complete = sequence.drafted_now(request.num_tokens)
        if is_complete or now_s >= request.deadline_s:
            self.held.outbox.speculation(*sequence.key, request.round, tokens)
            sequence.request = None

    def _push(self, sequence: SequenceState) -> None:
        entries = {}
        for branch in sequence.take_grown():
            outcome, tokens = branch.outcome, branch.tokens[: sequence.options.lookahead]
            if len(tokens) > sequence.pushed.get(outcome, -1):
                entries[outcome] = tokens
                sequence.pushed[outcome] = len(tokens)
        if entries:
            self.held.counters.num_table_entries += len(entries)
            self.held.outbox.table(sequence, entries)


def _segment(scheduled: ScheduledWork) -> Segment:
    work = scheduled.work
    return Segment(kv=work.kv, tokens=work.tokens, num_logits=len(work.nodes))
