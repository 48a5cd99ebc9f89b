"""The speculator without threads and streams: apply what targets say, plan rows, forward, extend, push tables.

One thread owns it. Time comes in as an argument; responses are collected in `outbox`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from specpool.algorithm.row_times import RowTimes
from specpool.algorithm.saguaro_tuning import SaguaroTuner
from specpool.algorithm.verification import VerificationMode
from specpool.errors import InvalidArgument, KVCacheFull
from specpool.v1 import speculator_pb2
from specpool_engine.distributions.transport import BODY_TYPES
from specpool_engine.modeling.interface import CausalModel, Segment
from specpool_speculator.config import SpeculatorConfig
from specpool_speculator.dense.dense_rows import RowMemory
from specpool_speculator.dense.sending_group import Channel
from specpool_speculator.engine.estimates import Estimates
from specpool_speculator.engine.opened_sequence import DraftLimits, sequence_options
from specpool_speculator.engine.outbox import Outbox
from specpool_speculator.engine.scheduler import PlannedWork, plan_step
from specpool_speculator.engine.spans import SequenceSpans
from specpool_speculator.engine.step_stats import DraftStepStats
from specpool_speculator.tree.draft_tree import DraftTree
from specpool_speculator.tree.ranks import Ranker, RanksNodes
from specpool_speculator.tree.sequence import Request, SequenceKey, SequenceState

_MAX_FITTED_ROWS = 128
"""Steps with more rows are prefills: their time says nothing about a few rows more."""
_MAX_RANKS = 33
"""Ranks kept per node: more guesses after one accepted length are never worth a row."""


@dataclass(slots=True)
class DraftCounters:
    """Totals since the start."""

    num_steps: int = 0
    num_draft_tokens: int = 0
    num_stale: int = 0
    num_resyncs: int = 0
    num_refused: int = 0
    """Sequences not taken."""
    num_table_entries: int = 0
    num_dropped_branches: int = 0


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
        self.outbox = Outbox()
        self.counters = DraftCounters()
        self.last_step = DraftStepStats()
        self._model = model
        self._config = config
        self._limits = DraftLimits(
            vocab_size=model.vocab_size,
            max_context=model.max_context,
            max_lookahead=config.max_lookahead,
            end_tokens=end_tokens,
        )
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
        self._vocab_sizes: dict[int, int] = {}
        self._channels: dict[int, Channel] = {}
        self._sequences: dict[SequenceKey, SequenceState] = {}
        self._refused: set[SequenceKey] = set()
        self._spans = SequenceSpans()
        self.step_time = step_time or RowTimes()
        """Seconds of a step by its rows."""
        self._on_draft = on_draft

    # ---- state ----------------------------------------------------------------------------------------------

    @property
    def num_sequences(self) -> int:
        """Sequences held."""
        return len(self._sequences)

    @property
    def num_targets(self) -> int:
        """Streams open."""
        return len(self._vocab_sizes)

    @property
    def estimates(self) -> Mapping[VerificationMode, Estimates]:
        """By verification mode."""
        return self._estimates

    def next_deadline_s(self) -> float | None:
        """When the next waiting target is to be answered at the latest."""
        return min((s.request.deadline_s for s in self._sequences.values() if s.request), default=None)

    # ---- what targets say -----------------------------------------------------------------------------------

    def connect(self, connection: int, vocab_size: int) -> None:
        """A stream was acknowledged."""
        self._vocab_sizes[connection] = vocab_size

    def set_channel(self, connection: int, channel: Channel) -> None:
        """Dense distributions can be sent to this target: from now on its draft tokens are sampled for that."""
        if connection in self._vocab_sizes:
            self._channels[connection] = channel
            self._update_dense(connection)

    def drop_channel(self, connection: int, channel: Channel) -> None:
        """It is gone; another one may have taken its place."""
        if self._channels.get(connection) is channel:
            del self._channels[connection]
            self._update_dense(connection)

    def _update_dense(self, connection: int) -> None:
        for sequence in self._sequences.values():
            if sequence.key[0] == connection:
                sequence.is_dense = self._is_dense(sequence)

    def _is_dense(self, sequence: SequenceState) -> bool:
        return sequence.options.verification is VerificationMode.REJECTION and sequence.key[0] in self._channels

    def disconnect(self, connection: int) -> None:
        """A stream ended, in whatever way: free everything of its target."""
        self._vocab_sizes.pop(connection, None)
        self._channels.pop(connection, None)
        for key in [key for key in self._sequences if key[0] == connection]:
            self._close(key)
        self._refused = {key for key in self._refused if key[0] != connection}
        self.outbox.drop(connection)

    def apply(self, connection: int, request: speculator_pb2.SpeculateRequest, received_s: float) -> None:
        """Take in one message of a connected target."""
        if connection not in self._vocab_sizes:
            self.counters.num_stale += 1
            return
        match request.WhichOneof("message"):
            case "open_sequence":
                self._open(connection, request.open_sequence)
            case "outcomes":
                for outcome in request.outcomes.outcomes:
                    self._apply_outcome(connection, outcome, received_s)
            case "speculate_now":
                self._speculate_now(connection, request.speculate_now, received_s)
            case "start_round":
                self._start_round(connection, request.start_round)
            case "close_sequence":
                self._close((connection, request.close_sequence.sequence_id))
            case _:
                self.counters.num_stale += 1

    def _open(self, connection: int, message: speculator_pb2.OpenSequence) -> None:
        key = (connection, message.sequence_id)
        self._close(key)
        try:
            if len(self._sequences) >= self._config.max_sequences:
                raise InvalidArgument("too many sequences")
            options = sequence_options(message, self._limits, self._vocab_sizes[connection])
            _check_tokens([*message.token_ids, *message.draft_tokens], self._model.vocab_size)
        except InvalidArgument:
            self._refused.add(key)
            self.counters.num_refused += 1
            return
        salt = message.cache_salt.hex()
        tree = DraftTree(self._model.pool, message.token_ids, round_=message.round, salt=salt)
        tree.set_path(message.draft_tokens)
        plan = self._estimates[options.verification].plan(len(message.draft_tokens))
        sequence = self._sequences[key] = SequenceState(key, options, tree, plan)
        sequence.is_dense = self._is_dense(sequence)
        self._spans.open(key, message.traceparent, options)

    def _apply_outcome(self, connection: int, outcome: speculator_pb2.Outcome, received_s: float) -> None:
        sequence = self._find(connection, outcome.sequence_id, outcome.round)
        if sequence is None:
            return
        tree = sequence.tree
        try:
            _check_tokens([outcome.bonus_token, *outcome.draft_tokens], self._model.vocab_size)
        except InvalidArgument:
            self._refuse(sequence)
            return
        if outcome.num_accepted >= len(tree.path):
            text = f"round {outcome.round}: {outcome.num_accepted} of {len(tree.path) - 1} draft tokens accepted"
            self._resync(connection, outcome.sequence_id, text)
            return
        self._observe(sequence, outcome)
        self._tune(sequence, outcome.num_accepted + 1, received_s)
        sequence.request = None
        self.counters.num_dropped_branches += max(0, len(sequence.pushed) - 1)
        tree.commit(outcome.num_accepted, outcome.bonus_token)
        sequence.awaits_start = outcome.awaits_speculation
        self._set_path(sequence, list(outcome.draft_tokens), outcome.draft_source)

    def _observe(self, sequence: SequenceState, outcome: speculator_pb2.Outcome) -> None:
        path, k = sequence.tree.path, outcome.num_accepted
        draft_token = path[k + 1].token if k + 1 < len(path) else None
        guesses = path[k].guesses(draft_token) if path[k].is_computed else None
        estimates = self._estimates[sequence.options.verification]
        num_drafted_here = sequence.tree.num_path_tokens_drafted()
        estimates.observe(k, len(path) - 1, guesses, outcome.bonus_token, num_drafted_here)
        targets_tokens = [*(node.token for node in path[1 : k + 1]), outcome.bonus_token]
        for node, token in zip(path, targets_tokens, strict=False):
            if node.ranks is not None and node.ranks.scores:
                rank = node.ranks.drafted.index(token) if token in node.ranks.drafted else None
                estimates.calibration.observe(node.ranks.scores, rank)
        num_drafted = sequence.pushed.get((k, outcome.bonus_token))
        self._spans.round(sequence, num_accepted=k, num_drafted=num_drafted)

    def _tune(self, sequence: SequenceState, num_tokens: int, received_s: float) -> None:
        is_sampled = sequence.options.verification is VerificationMode.REJECTION
        if self._saguaro is not None and is_sampled:
            if sequence.outcome_s is not None:
                self._saguaro.observe(num_tokens, received_s - sequence.outcome_s)
                self._ranker.saguaro_constant = self._saguaro.constant  # type: ignore[attr-defined]
            sequence.outcome_s = received_s

    def _start_round(self, connection: int, message: speculator_pb2.StartRound) -> None:
        sequence = self._find(connection, message.sequence_id, message.round)
        if sequence is None:
            return
        try:
            _check_tokens(message.draft_tokens, self._model.vocab_size)
        except InvalidArgument:
            self._refuse(sequence)
            return
        sequence.request = None
        sequence.awaits_start = False
        self._set_path(sequence, list(message.draft_tokens), message.draft_source)

    def _set_path(
        self, sequence: SequenceState, draft_tokens: list[int], source: speculator_pb2.DraftSource.ValueType
    ) -> None:
        sequence.start_round(draft_tokens, self._estimates[sequence.options.verification].plan(len(draft_tokens)))
        is_ours = source == speculator_pb2.DRAFT_SOURCE_SPECULATOR and bool(draft_tokens)
        if is_ours and sequence.options.sends_distributions:
            channel = self._channels.get(sequence.key[0])
            self.outbox.distributions(sequence, sequence.tree.distributions(), channel)

    def _speculate_now(self, connection: int, message: speculator_pb2.SpeculateNow, received_s: float) -> None:
        sequence = self._find(connection, message.sequence_id, message.round + 1)
        if sequence is None or len(sequence.tree.path) > 1:
            self.outbox.speculation(connection, message.sequence_id, message.round, ())
            return
        num_tokens = min(message.num_tokens, sequence.options.lookahead)
        sequence.request = Request(message.round, num_tokens, received_s + message.deadline_ms / 1e3)
        sequence.awaits_start = True

    def _find(self, connection: int, sequence_id: str, round_: int) -> SequenceState | None:
        """The sequence if it is in that round; else count, and ask for it again unless the message is merely late."""
        key = (connection, sequence_id)
        sequence = self._sequences.get(key)
        if sequence is not None and sequence.tree.round == round_:
            return sequence
        self.counters.num_stale += 1
        if sequence is None and key not in self._refused:
            self._resync(connection, sequence_id, "the sequence is not held here")
        elif sequence is not None and round_ > sequence.tree.round:
            self._resync(connection, sequence_id, f"round {round_} announced, {sequence.tree.round} is running here")
        return None

    def _resync(self, connection: int, sequence_id: str, reason: str) -> None:
        self._close((connection, sequence_id))
        self.counters.num_resyncs += 1
        self.outbox.resync(connection, sequence_id, reason)

    def _refuse(self, sequence: SequenceState) -> None:
        """Tokens that the draft model does not have: nothing can be drafted after them."""
        self._close(sequence.key)
        self._refused.add(sequence.key)
        self.counters.num_refused += 1

    def _close(self, key: SequenceKey) -> None:
        self._refused.discard(key)
        sequence = self._sequences.pop(key, None)
        if sequence is not None:
            sequence.tree.publish()
            sequence.tree.free()
            self._spans.close(key)

    # ---- the step -------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One forward, if any row is worth it."""
        started_s = time.monotonic()
        planned = self._plan(self._config.row_budget)
        if not planned:
            return False
        try:
            forward_s = self._run(planned)
        except KVCacheFull:
            planned = self._plan(row_budget=0)
            if not planned:
                return False
            forward_s = self._run(planned)
        self._account(planned, forward_s, time.monotonic() - started_s)
        return True

    def _plan(self, row_budget: int) -> list[PlannedWork]:
        return plan_step(
            list(self._sequences.values()),
            self._model.pool,
            row_budget=row_budget,
            max_prefill_tokens=self._config.max_prefill_tokens,
            step_s=self.step_time if self._config.plan_rows else lambda num_rows: 0.0,
        )

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
        self.counters.num_steps += 1
        self.counters.num_draft_tokens += drafted.total()
        pool = self._model.pool
        self.last_step = DraftStepStats(
            num_rows=num_rows,
            num_sequences=self.num_sequences,
            num_targets=self.num_targets,
            kv_cache_usage=pool.num_used / pool.num_blocks,
            forward_s=forward_s,
            step_s=step_s,
            num_draft_tokens=drafted.total(),
        )

    # ---- answers --------------------------------------------------------------------------------------------

    def answer(self, now_s: float) -> None:
        """Answer waiting targets whose tokens are there or whose deadline passed, then push what tables gained."""
        for sequence in self._sequences.values():
            if sequence.request is not None:
                self._answer_request(sequence, sequence.request, now_s)
            elif sequence.options.speculates_ahead and not sequence.awaits_start:
                self._push(sequence)

    def _answer_request(self, sequence: SequenceState, request: Request, now_s: float) -> None:
        tokens, is_complete = sequence.drafted_now(request.num_tokens)
        if is_complete or now_s >= request.deadline_s:
            self.outbox.speculation(*sequence.key, request.round, tokens)
            sequence.request = None

    def _push(self, sequence: SequenceState) -> None:
        entries = {}
        for guess in sequence.guesses():
            tokens, _ = guess.node.chain(sequence.options.lookahead)
            if len(tokens) > sequence.pushed.get(guess.outcome, -1):
                entries[guess.outcome] = tokens
                sequence.pushed[guess.outcome] = len(tokens)
        if entries:
            self.counters.num_table_entries += len(entries)
            self.outbox.table(sequence, entries)


def _check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    if tokens and max(tokens) >= vocab_size:
        raise InvalidArgument(f"token {max(tokens)} is beyond the draft's vocabulary of {vocab_size}")
