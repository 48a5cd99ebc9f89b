"""The target engine: one thread owns the model, its KV cache and every sequence.

The loop: receive -> admit -> pick speculations -> forward -> verify -> commit -> report outcomes.
Commands come in as calls to make on that thread; what it finds out leaves through the outbox.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from specpool.algorithm.verification import VerificationOutcome
from specpool.errors import EngineFailed, SpecPoolError
from specpool.v1 import types_pb2
from specpool_engine.modeling.detokenizer import IncrementalDetokenizer
from specpool_engine.modeling.interface import CausalModel, Segment
from specpool_engine.modeling.paged_kv import SequenceKV
from specpool_engine.runtime.engine_thread import EngineThread
from specpool_target.config import TargetConfig
from specpool_target.engine.outbox import TargetOutbox
from specpool_target.engine.output_end import cut_at_end, push_text
from specpool_target.engine.scheduler import ScheduledSegment, Scheduler, StepPlan
from specpool_target.engine.sequence import (
    Finish,
    FinishReason,
    SequenceRequest,
    SequenceUpdate,
    TargetSequence,
)
from specpool_target.engine.statistics import Phases
from specpool_target.engine.step_recorder import StepRecorder
from specpool_target.engine.streams import Emit, Streams
from specpool_target.links.inbox import SpeculationInbox
from specpool_target.links.link import SpeculatorLink
from specpool_target.links.live_links import LiveLinks
from specpool_target.metrics import TargetMetrics
from specpool_target.next_round.fallback_policy import FallbackPolicy
from specpool_target.next_round.lookahead import LookaheadPlanner
from specpool_target.next_round.next_round import Speculation
from specpool_target.verify.draft_distributions import DraftDistributions
from specpool_target.verify.verify_step import VerifyItem, logprobs_of, verify_step


class TargetEngine:
    """Every public method may be called from any thread, unless it says otherwise."""

    def __init__(
        self,
        model: CausalModel,
        config: TargetConfig,
        *,
        loop: asyncio.AbstractEventLoop,
        metrics: TargetMetrics,
        on_failed: Callable[[], None] = lambda: None,
        before_start: Callable[[], None] = lambda: None,
    ) -> None:
        """Not started yet; `on_failed` is called on `loop`, after every stream was ended."""
        self.model = model
        self.metrics = metrics
        self._transports: dict[str, str] = {}  # of the connected links; touched by the event loop alone
        self.max_context = min(model.max_context, config.max_context or model.max_context)
        self.policy = FallbackPolicy(
            max_batch_size=config.max_batch_size, lookahead=config.max_lookahead, fallback=config.fallback
        )
        self.scheduler = Scheduler(
            model.pool,
            max_context=self.max_context,
            max_batch_size=config.max_batch_size,
            max_batch_tokens=config.max_batch_tokens,
            max_waiting=config.max_waiting,
        )
        self.thread = EngineThread(
            self, name="target engine", loop=loop, on_failed=self._failed, before_start=before_start
        )
        self._on_failed = on_failed
        self._config = config
        self._streams = Streams()
        self._outbox = TargetOutbox(loop, self._streams)
        self.lookahead_planner = LookaheadPlanner(self.policy, max_lookahead=config.max_lookahead)
        self._links = LiveLinks()
        self._speculation = Speculation(
            self._outbox,
            self._links,
            self.policy,
            self.lookahead_planner,
            vocab_size=model.vocab_size,
            deadline_s=config.speculation_deadline_ms / 1e3,
        )
        self._distributions = DraftDistributions(
            self._links,
            deadline_s=config.distribution_deadline_ms / 1e3,
            vocab_size=model.vocab_size,
            device=model.device,
            wait_for_news=self.thread.defer_a_command,
            on_late=self._count_late_distributions,
        )
        self._num_submitted = 0
        self._num_added = 0
        """Of the sequences submitted; the others are still in the queue of commands."""
        self._sequences: dict[str, TargetSequence] = {}
        self._recorder = StepRecorder(metrics, self.scheduler, self._speculation, self.policy, self.lookahead_planner)

    # ---- called by the wire -----------------------------------------------------------------------------------

    def submit(
        self,
        request: SequenceRequest,
        emit: Emit,
        *,
        detokenizer: IncrementalDetokenizer | None = None,
        link: SpeculatorLink | None = None,
        inbox: SpeculationInbox | None = None,
    ) -> None:
        """Run a sequence; `emit` is called on the event loop. Raises at once what can never run."""
        num_tokens = len(request.prompt_tokens) + len(request.committed_tokens)
        sequence = TargetSequence(
            request,
            detokenizer=detokenizer,
            link=link,
            inbox=inbox,
            max_length=self.scheduler.max_length,
            backup_ngram=self._config.backup_ngram,
            arrived_s=time.perf_counter(),
        )

        def accept() -> None:
            self.scheduler.check_admissible(
                num_tokens,
                num_submitted=self._num_submitted - self._num_added,
                is_continuation=bool(request.committed_tokens),
            )
            self._num_submitted += 1
            self._streams.open(request.id, emit)

        self.thread.submit(partial(self._add, sequence), accept)

    def cancel(self, sequence_id: str) -> None:
        """Free a sequence without another update. Unknown ids are ignored. Called on the event loop."""
        self._streams.close(sequence_id)
        self.thread.call(partial(self._cancel, sequence_id))

    def fail_all(self, error: SpecPoolError) -> None:
        """End every sequence with `error`."""
        self.thread.call(partial(self._fail_all, error))

    @property
    def failure(self) -> EngineFailed | None:
        """Why the engine cannot go on."""
        return self.thread.failure

    def load(self) -> types_pb2.Load:
        """For status."""
        return self._recorder.load()

    @property
    def num_sequences(self) -> int:
        """Running and waiting."""
        return len(self._sequences)

    # LinkListener

    def link_up(self, link: SpeculatorLink, epoch: int) -> None:
        """See `LinkListener`."""
        self._show_link(link, up=True)
        self.thread.call(lambda: self._speculation.link_up(link, epoch, self._sequences.values()))

    def link_down(self, link: SpeculatorLink, epoch: int) -> None:
        """See `LinkListener`."""
        self._show_link(link, up=False)
        self.thread.call(lambda: self._speculation.link_down(link, epoch, self._sequences.values()))

    def transport_changed(self, link: SpeculatorLink) -> None:
        """See `LinkListener`."""
        if link.endpoint in self._transports:
            self._show_link(link, up=True)

    def _show_link(self, link: SpeculatorLink, *, up: bool) -> None:
        if up:
            self._transports[link.endpoint] = link.transport
        else:
            self._transports.pop(link.endpoint, None)
        self.metrics.set_links(len(self._transports))
        self.metrics.set_transports(self._transports.values())

    def resync(self, sequence_id: str) -> None:
        """See `LinkListener`."""
        self.thread.call(lambda: self._with(sequence_id, self._speculation.resync))

    def speculation(self, sequence_id: str, round_: int, tokens: Sequence[int]) -> None:
        """See `LinkListener`."""
        self.thread.call(partial(self._reply, sequence_id, round_, tokens))

    def distributions_arrived(self) -> None:
        """See `LinkListener`."""
        self.thread.call(_nothing)

    def stale_message(self) -> None:
        """See `LinkListener`."""
        self.metrics.stale_message()

    # ---- the loop, see `Engine` -------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """One round and one token, as far as the context goes."""
        num_tokens = min(self._config.max_lookahead + 1, self.scheduler.max_length - 1)
        kv = SequenceKV(self.model.pool)
        for tokens in ([0] * num_tokens, [0]):
            if kv.length + len(tokens) <= self.scheduler.max_length:
                self.model.forward([Segment(kv=kv, tokens=tokens, num_logits=len(tokens))])
        kv.free()

    def step(self) -> bool:
        """One forward and the rounds that end with it."""
        self._speculation.release_expired(self.scheduler.running, time.perf_counter())
        started_s = time.perf_counter()
        plan = self._admit(self.scheduler.plan())
        self._outbox.flush()  # the speculators start while the forward runs
        if not plan.segments:
            self._recorder.idle()
            return False
        marks = [time.perf_counter()]
        logits = self._forward(plan)
        marks.append(time.perf_counter())
        items = self._verify_items(plan.segments)
        marks.append(time.perf_counter())
        outcomes = verify_step(logits, items) if items else []
        marks.append(time.perf_counter())
        forward_s, waiting_s, verify_s = (after - before for before, after in pairwise(marks))
        phases = Phases(waiting=waiting_s, forward=forward_s, verify=verify_s)
        batch_size = len(self.scheduler.running)
        for item, outcome in zip(items, outcomes, strict=True):
            self._commit(item, outcome, logits, phases, batch_size)
        self._outbox.flush()
        self._recorder.step_ended(plan, items, phases, batch_size, time.perf_counter() - started_s)
        return True

    def seconds_to_deadline(self) -> float | None:
        """Until the next wait for a speculation ends."""
        deadlines = [s.await_deadline_s for s in self.scheduler.running if s.await_deadline_s is not None]
        return max(0.0, min(deadlines) - time.perf_counter()) if deadlines else None

    def _admit(self, plan: StepPlan) -> StepPlan:
        for sequence in plan.admitted:
            if not sequence.was_admitted:
                assert sequence.kv is not None, "just admitted"
                sequence.was_admitted = True
                sequence.num_cached_prompt_tokens = min(sequence.kv.length, sequence.num_prompt_tokens)
                self._speculation.admit(sequence, batch_size=len(self.scheduler.running))
        return plan

    def _forward(self, plan: StepPlan) -> Tensor:
        logits = self.model.forward([scheduled.segment() for scheduled in plan.segments])
        if logits.is_cuda:
            # Not the device: on another stream of it, distributions may be on their way for as long as they like.
            torch.cuda.current_stream(logits.device).synchronize()
        return logits

    def _verify_items(self, segments: Sequence[ScheduledSegment]) -> list[VerifyItem]:
        """Rows of the sequences whose round ends; waits a little for distributions they need."""
        complete = [scheduled.sequence for scheduled in segments if scheduled.is_complete]
        items: list[VerifyItem] = []
        start = 0
        for sequence, distribution in zip(complete, self._distributions.take(complete), strict=True):
            stop = start + 1 + len(sequence.draft.tokens)
            items.append(VerifyItem(sequence, sequence.draft, slice(start, stop), distribution))
            start = stop
        return items

    def _count_late_distributions(self) -> None:
        self._speculation.fallbacks["late_distributions"] += 1

    # ---- the end of a round -----------------------------------------------------------------------------------

    def _commit(
        self, item: VerifyItem, outcome: VerificationOutcome, logits: Tensor, phases: Phases, batch_size: int
    ) -> None:
        sequence, draft = item.sequence, item.draft
        assert sequence.kv is not None, "it was just computed"
        sequence.kv.truncate(len(sequence.tokens) + outcome.num_accepted)
        tokens, reason = cut_at_end(sequence, outcome.committed(draft.tokens))
        text = None
        if sequence.detokenizer is not None:
            tokens, reason, text = push_text(sequence, sequence.detokenizer, tokens, reason)
        num_top = sequence.request.sampling.num_logprobs
        logprobs = [] if num_top is None else logprobs_of(logits[item.rows], tokens, num_top)
        sequence.tokens += tokens
        round_info = self._recorder.round_ended(sequence, outcome, len(tokens), phases)
        if sequence.round == 0:
            sequence.kv.publish_prefix(sequence.tokens, sequence.salt)
        finish = None
        if reason is None:
            self._speculation.next_round(sequence, outcome, batch_size=batch_size)
        else:
            finish = self._finish(sequence, reason)
        self._outbox.emit(
            sequence.id,
            SequenceUpdate(tokens=tokens, text=text, logprobs=logprobs, round=round_info, finish=finish),
        )

    def _finish(self, sequence: TargetSequence, reason: FinishReason) -> Finish:
        self._remove(sequence)
        assert sequence.first_token_s is not None, "it has a token"
        seconds = sequence.round_ended_s - sequence.arrived_s
        self.metrics.request_finished(reason.label, seconds)
        stats = sequence.stats.to_proto(
            seconds_to_first_token=sequence.first_token_s - sequence.arrived_s, seconds=seconds
        )
        return Finish(reason=reason, stats=stats, num_cached_prompt_tokens=sequence.num_cached_prompt_tokens)

    # ---- commands, on the engine thread -----------------------------------------------------------------------

    def _add(self, sequence: TargetSequence) -> None:
        self._num_added += 1
        self._sequences[sequence.id] = sequence
        self.scheduler.add(sequence)

    def _cancel(self, sequence_id: str) -> None:
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self._remove(sequence)
            self._speculation.close(sequence)
            self.metrics.request_finished("cancelled", time.perf_counter() - sequence.arrived_s)

    def _remove(self, sequence: TargetSequence) -> None:
        del self._sequences[sequence.id]
        self.scheduler.remove(sequence)

    def _fail_all(self, error: SpecPoolError) -> None:
        for sequence in list(self._sequences.values()):
            self._remove(sequence)
            self._speculation.close(sequence)
            self._outbox.emit(sequence.id, SequenceUpdate(error=error))
            self.metrics.request_finished("error", time.perf_counter() - sequence.arrived_s)

    def _reply(self, sequence_id: str, round_: int, tokens: Sequence[int]) -> None:
        sequence = self._sequences.get(sequence_id)
        if sequence is None or not self._speculation.reply(sequence, round_, tokens):
            self.metrics.stale_message()

    def _with(self, sequence_id: str, action: Callable[[TargetSequence], None]) -> None:
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            action(sequence)

    def _failed(self, error: EngineFailed) -> None:
        """On the event loop."""
        self._streams.fail(error)
        self._on_failed()


def _nothing() -> None:
    """Wakes the engine."""
