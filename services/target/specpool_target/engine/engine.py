"""The target engine: one thread owns the model, its KV cache and every sequence.

The loop: receive -> admit -> pick speculations -> forward -> verify -> commit -> report outcomes.
Commands come in through a queue as calls to make on this thread; results leave through the `Outbox`.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
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
from specpool_target.config import TargetConfig
from specpool_target.engine.outbox import Outbox
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
from specpool_target.links.inbox import SpeculationInbox
from specpool_target.links.link import SpeculatorLink
from specpool_target.links.live_links import LiveLinks
from specpool_target.metrics import TargetMetrics
from specpool_target.next_round.fallback_policy import FallbackPolicy
from specpool_target.next_round.lookahead import LookaheadPlanner
from specpool_target.next_round.next_round import Speculation
from specpool_target.verify.draft_distributions import DraftDistributions
from specpool_target.verify.verify_step import VerifyItem, logprobs_of, verify_step

_logger = logging.getLogger(__name__)

Command = Callable[[], None]


class EngineThread(threading.Thread):
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
        super().__init__(name="target engine", daemon=True)
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
        self._config = config
        self._outbox = Outbox(loop)
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
            wait_for_news=self._defer_a_command,
            on_late=self._count_late_distributions,
        )
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._submitting = threading.Lock()
        """Guards `failure` and the next: whatever was submitted before a failure hears of it."""
        self._num_submitted = 0
        """Sequences in the queue of commands."""
        self._deferred: list[Command] = []
        """Taken from the queue in the middle of a step; run after it."""
        self._sequences: dict[str, TargetSequence] = {}
        self._stopping = False
        self._is_idle = True
        self._on_failed = on_failed
        self._before_start = before_start
        self._recorder = StepRecorder(metrics, self.scheduler, self._speculation, self.policy, self.lookahead_planner)
        self._ready = threading.Event()
        self.failure: SpecPoolError | None = None

    # ---- called from other threads ----------------------------------------------------------------------------

    def submit(
        self,
        request: SequenceRequest,
        emit: Callable[[SequenceUpdate], None],
        *,
        detokenizer: IncrementalDetokenizer | None = None,
        link: SpeculatorLink | None = None,
        inbox: SpeculationInbox | None = None,
    ) -> None:
        """Run a sequence; `emit` is called on the event loop. Raises at once what can never run."""
        num_tokens = len(request.prompt_tokens) + len(request.committed_tokens)
        sequence = TargetSequence(
            request,
            emit=emit,
            detokenizer=detokenizer,
            link=link,
            inbox=inbox,
            max_length=self.scheduler.max_length,
            backup_ngram=self._config.backup_ngram,
            arrived_s=time.perf_counter(),
        )
        with self._submitting:
            if self.failure is not None:
                raise self.failure
            self.scheduler.check_admissible(num_tokens, num_submitted=self._num_submitted)
            self._num_submitted += 1
            self._commands.put(partial(self._add, sequence))

    def cancel(self, sequence_id: str) -> None:
        """Free a sequence without another update. Unknown ids are ignored."""
        self._commands.put(partial(self._cancel, sequence_id))

    def fail_all(self, error: SpecPoolError) -> None:
        """End every sequence with `error`."""
        self._commands.put(partial(self._fail_all, error))

    def abort(self, error: SpecPoolError) -> None:
        """End the thread as if a step had failed with `error`."""

        def command() -> None:
            raise error

        self._commands.put(command)

    def stop(self) -> None:
        """End the thread after the running step."""
        self._commands.put(self._stop)

    def wait_ready(self) -> None:
        """Until the warm-up is through; raises if it failed."""
        self._ready.wait()
        if self.failure is not None:
            raise self.failure

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
        self._commands.put(lambda: self._speculation.link_up(link, epoch, self._sequences.values()))

    def link_down(self, link: SpeculatorLink, epoch: int) -> None:
        """See `LinkListener`."""
        self._show_link(link, up=False)
        self._commands.put(lambda: self._speculation.link_down(link, epoch, self._sequences.values()))

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
        self._commands.put(lambda: self._with(sequence_id, self._speculation.resync))

    def speculation(self, sequence_id: str, round_: int, tokens: Sequence[int]) -> None:
        """See `LinkListener`."""
        self._commands.put(partial(self._reply, sequence_id, round_, tokens))

    def distributions_arrived(self) -> None:
        """See `LinkListener`."""
        self._commands.put(_nothing)

    def stale_message(self) -> None:
        """See `LinkListener`."""
        self.metrics.stale_message()

    # ---- the loop ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until `stop`; a failure ends every sequence with `EngineFailed`."""
        try:
            with torch.inference_mode():
                self._before_start()
                self._warm_up()
                self._ready.set()
                while not self._stopping:
                    self._receive()
                    self._step()
        except Exception as error:
            self._fail(error)
        finally:
            self._ready.set()

    def _step(self) -> None:
        started_s = time.perf_counter()
        plan = self._admit(self.scheduler.plan())
        self._outbox.flush()  # the speculators start while the forward runs
        self._is_idle = not plan.segments
        if self._is_idle:
            return self._recorder.idle()
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
        return None

    def _receive(self) -> None:
        """Run the commands that are there; when there is nothing to compute, wait for one or for a deadline."""
        deferred, self._deferred = self._deferred, []
        for command in deferred:
            command()
        may_block = self._is_idle and not deferred
        with suppress(queue.Empty):
            self._commands.get(may_block, self._seconds_to_deadline() if may_block else None)()
            while True:
                self._commands.get_nowait()()
        self._speculation.release_expired(self.scheduler.running, time.perf_counter())

    def _seconds_to_deadline(self) -> float | None:
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

    def _defer_a_command(self, timeout_s: float) -> None:
        """Wait for one, and keep it: in the middle of a step nothing may change."""
        with suppress(queue.Empty):
            self._deferred.append(self._commands.get(timeout=timeout_s))

    def _count_late_distributions(self) -> None:
        self._speculation.fallbacks["late_distributions"] += 1

    # ---- the end of a round -----------------------------------------------------------------------------------

    def _commit(
        self, item: VerifyItem, outcome: VerificationOutcome, logits: Tensor, phases: Phases, batch_size: int
    ) -> None:
        sequence, draft = item.sequence, item.draft
        assert sequence.kv is not None, "it was just computed"
        sequence.kv.truncate(len(sequence.tokens) + outcome.num_accepted)
        tokens, reason = self._cut(sequence, outcome.committed(draft.tokens))
        text = None
        if sequence.detokenizer is not None:
            tokens, reason, text = _push_text(sequence, tokens, reason)
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
            sequence,
            SequenceUpdate(tokens=tokens, text=text, logprobs=logprobs, round=round_info, finish=finish),
        )

    def _cut(self, sequence: TargetSequence, tokens: list[int]) -> tuple[list[int], FinishReason | None]:
        """End the output at the first stop token, or at the longest length."""
        tokens = tokens[: sequence.max_length - len(sequence.tokens)]
        for index, token in enumerate(tokens):
            if token in sequence.request.stop_token_ids:
                return tokens[: index + 1], FinishReason.STOP
        is_full = len(sequence.tokens) + len(tokens) >= sequence.max_length
        return tokens, FinishReason.LENGTH if is_full else None

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
        with self._submitting:
            self._num_submitted -= 1
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
            self._outbox.emit(sequence, SequenceUpdate(error=error))
            self.metrics.request_finished("error", time.perf_counter() - sequence.arrived_s)

    def _reply(self, sequence_id: str, round_: int, tokens: Sequence[int]) -> None:
        sequence = self._sequences.get(sequence_id)
        if sequence is None or not self._speculation.reply(sequence, round_, tokens):
            self.metrics.stale_message()

    def _with(self, sequence_id: str, action: Callable[[TargetSequence], None]) -> None:
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            action(sequence)

    def _stop(self) -> None:
        self._stopping = True

    def _fail(self, error: Exception) -> None:
        _logger.critical("the engine failed", exc_info=error)
        with self._submitting:
            self.failure = (
                error
                if isinstance(error, EngineFailed)
                else EngineFailed(f"the target engine failed: {type(error).__name__}: {error}")
            )
        self._take_in_the_last()
        for sequence in self._sequences.values():
            self._outbox.emit(sequence, SequenceUpdate(error=self.failure))
        self._outbox.flush()
        self._outbox.call(self._on_failed)

    def _take_in_the_last(self) -> None:
        """Commands that nobody will run any more, for the sequences among them."""
        commands = self._deferred
        with suppress(queue.Empty):
            while True:
                commands.append(self._commands.get_nowait())
        for command in commands:
            with suppress(Exception):
                command()

    # ---- around the loop --------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        """The first forwards allocate, compile and page in; nobody should wait for that."""
        num_tokens = min(self._config.max_lookahead + 1, self.scheduler.max_length - 1)
        kv = SequenceKV(self.model.pool)
        for tokens in ([0] * num_tokens, [0]):
            if kv.length + len(tokens) <= self.scheduler.max_length:
                self.model.forward([Segment(kv=kv, tokens=tokens, num_logits=len(tokens))])
        kv.free()


def _nothing() -> None:
    """Wakes the engine."""


def _push_text(
    sequence: TargetSequence, tokens: list[int], reason: FinishReason | None
) -> tuple[list[int], FinishReason | None, str]:
    """Detokenize; a stop string that is completed ends the output with the token that completed it."""
    detokenizer = sequence.detokenizer
    assert detokenizer is not None, "only sequences with stop strings"
    num_before = len(sequence.tokens) - sequence.num_prompt_tokens
    delta = detokenizer.push(tokens)
    text = delta.text
    if not delta.stopped and reason is not None:
        delta = detokenizer.finish()
        text += delta.text
    if delta.num_tokens is not None:
        tokens, reason = tokens[: delta.num_tokens - num_before], FinishReason.STOP
    return tokens, reason, text
