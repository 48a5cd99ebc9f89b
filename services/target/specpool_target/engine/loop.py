"""The loop of a target: what happens in one step, one forward and the rounds that end with it.

receive -> admit -> forward -> verify -> commit -> observe -> choose the next round. What a step brought is handed over
and recorded while the next forward runs. What goes wrong with one sequence ends that sequence, with a typed error; the
others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from specpool.algorithm.verification import VerificationOutcome
from specpool.errors import EngineFailed, SpecPoolError
from specpool_engine.modeling.interface import CausalModel, Segment, forward_of
from specpool_engine.modeling.paged_kv import SequenceKV
from specpool_target.engine.commit import commit
from specpool_target.engine.draft_distributions import DraftDistributions
from specpool_target.engine.live_sequences import LiveSequences
from specpool_target.engine.outbox import TargetOutbox
from specpool_target.engine.scheduler import ScheduledStep, Scheduler, Unschedulable
from specpool_target.engine.sequence import Finish, FinishReason, SequenceUpdate, TargetSequence
from specpool_target.engine.statistics import Phases
from specpool_target.engine.step_recorder import StepRecorder, round_info
from specpool_target.next_round.next_round import NextRound
from specpool_target.next_round.observer import EndedRound, Observer
from specpool_target.verify.verify_step import VerifyItem, verify_isolated

Verified = tuple[TargetSequence, VerifyItem, VerificationOutcome]


class TargetLoop:
    """The target's engine as its thread sees it: what each step does, and in which order."""

    def __init__(
        self,
        model: CausalModel,
        *,
        scheduler: Scheduler,
        sequences: LiveSequences,
        distributions: DraftDistributions,
        observer: Observer,
        next_round: NextRound,
        recorder: StepRecorder,
        outbox: TargetOutbox,
        num_warm_up_tokens: int,
    ) -> None:
        self._model = model
        self._forward_of = forward_of(model)
        self._scheduler = scheduler
        self._sequences = sequences
        self._distributions = distributions
        self._observer = observer
        self._next_round = next_round
        self._recorder = recorder
        self._outbox = outbox
        self._num_warm_up_tokens = num_warm_up_tokens
        self._report: Callable[[], None] | None = None
        """Records the last step, if that is still to be done."""
        self._idle_since_s: float | None = None
        """Since when all of the batch has been waiting for speculations."""

    def warm_up(self) -> None:
        """Run one round and one token, as far as the context goes, before the first request has to wait for that."""
        num_tokens = min(self._num_warm_up_tokens, self._scheduler.max_length - 1)
        kv = SequenceKV(self._model.pool)
        for tokens in ([0] * num_tokens, [0]):
            if kv.length + len(tokens) <= self._scheduler.max_length:
                self._model.forward([Segment(kv=kv, tokens=tokens, num_logits=len(tokens))])
        kv.free()

    def seconds_to_deadline(self) -> float | None:
        """Seconds until the next wait for a speculation ends; None if nobody waits."""
        deadlines = [s.await_deadline_s for s in self._scheduler.running if s.await_deadline_s is not None]
        return max(0.0, min(deadlines) - time.perf_counter()) if deadlines else None

    def step(self) -> bool:
        """Run one forward and end the rounds that end with it."""
        started_s = time.perf_counter()
        self._expire(started_s)
        step = self._admit(self._schedule())
        if not step.segments:
            self._tell()
            self._idle(started_s)
            return False
        idle_s = 0.0 if self._idle_since_s is None else started_s - self._idle_since_s
        self._idle_since_s = None
        forward_at_s = time.perf_counter()
        logits = self._forward(step)
        if logits is None:
            return True
        arrived_at_s = time.perf_counter()
        self._scheduler.observe(step, arrived_at_s - forward_at_s)
        items = self._verify_items(step)
        verify_at_s = time.perf_counter()
        verified = self._verify(logits, items)
        now_s = time.perf_counter()
        phases = Phases(
            waiting=verify_at_s - arrived_at_s, forward=arrived_at_s - forward_at_s, verify=now_s - verify_at_s
        )
        batch_size = len(self._scheduler.running)
        rounds = self._commit(verified, logits, phases)
        self._observe(step, rounds, phases, batch_size)
        self._choose(verified, batch_size)
        phases.total = time.perf_counter() - started_s
        self._report = partial(self._recorder.step_ended, step, rounds, phases, idle_s=idle_s)
        return True

    # ---- parts of a step --------------------------------------------------------------------------------------

    def _tell(self) -> None:
        """Hand over what the last step brought, and record it.

        Called while the next forward runs, where the model can do that. The event loop has work with it for every
        sequence, and would take the interpreter from the way to that forward.
        """
        self._outbox.flush()
        report, self._report = self._report, None
        if report is not None:
            report()

    def _expire(self, now_s: float) -> None:
        """End the waits whose deadline has come."""
        waiting = [s for s in self._scheduler.running if s.await_deadline_s is not None and s.await_deadline_s <= now_s]
        for sequence in waiting:
            with self._sequences.isolated(sequence):
                self._next_round.expire(sequence)

    def _schedule(self) -> ScheduledStep:
        while True:
            try:
                return self._scheduler.schedule()
            except Unschedulable as refusal:  # one sequence less each time
                self._sequences.fail(refusal.sequence, refusal.cause)

    def _admit(self, step: ScheduledStep) -> ScheduledStep:
        for sequence in step.admitted:
            if not sequence.was_admitted:
                assert sequence.kv is not None, "just admitted"
                sequence.was_admitted = True
                sequence.num_cached_prompt_tokens = min(sequence.kv.length, sequence.num_prompt_tokens)
                self._recorder.admitted(len(sequence.tokens), sequence.kv.length)
                with self._sequences.isolated(sequence):
                    self._next_round.admit(sequence, batch_size=len(self._scheduler.running))
        if all(sequence.is_admitted for sequence in step.admitted):
            return step
        return replace(step, segments=[s for s in step.segments if s.sequence.is_admitted])

    def _idle(self, now_s: float) -> None:
        self._recorder.idle()
        if not self._scheduler.running:
            self._observer.idle()
            self._idle_since_s = None
        elif self._idle_since_s is None:
            self._idle_since_s = now_s

    def _forward(self, step: ScheduledStep) -> Tensor | None:
        """The logits [R, V] of the step; None if a sequence that no forward can run was ended: the others try again."""
        try:
            logits = self._forward_of([scheduled.segment() for scheduled in step.segments], self._tell)
        except SpecPoolError as error:  # raised before anything changed
            if isinstance(error, EngineFailed) or not self._sequences.end_the_cause(error, step, self._model):
                raise
            return None
        if logits.is_cuda:
            # Not the device: on another stream of it, distributions may be on their way for as long as they like.
            torch.cuda.current_stream(logits.device).synchronize()
        return logits

    def _verify_items(self, step: ScheduledStep) -> list[tuple[TargetSequence, VerifyItem]]:
        """The sequences whose round ends, each with its rows; waits a little for distributions they need."""
        complete = [scheduled.sequence for scheduled in step.segments if scheduled.is_complete]
        items: list[tuple[TargetSequence, VerifyItem]] = []
        start = 0
        for sequence, distribution in zip(complete, self._distributions.take(complete), strict=True):
            stop = start + 1 + len(sequence.draft.tokens)
            with self._sequences.isolated(sequence):
                items.append((sequence, sequence.verify_item(slice(start, stop), distribution)))
            start = stop
        return items

    def _verify(self, logits: Tensor, items: Sequence[tuple[TargetSequence, VerifyItem]]) -> list[Verified]:
        verified: list[Verified] = []
        outcomes = verify_isolated(logits, [item for _, item in items]) if items else []
        for (sequence, item), outcome in zip(items, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._sequences.fail(sequence, outcome)
            else:
                verified.append((sequence, item, outcome))
        return verified

    def _commit(self, verified: Sequence[Verified], logits: Tensor, phases: Phases) -> list[EndedRound]:
        rounds: list[EndedRound] = []
        for sequence, item, outcome in verified:
            with self._sequences.isolated(sequence):
                committed = commit(sequence, outcome, logits, item.rows)
                ended = EndedRound(sequence, sequence.draft, outcome.num_accepted, len(committed.tokens))
                own_phases = self._recorder.round_ended(ended, phases)
                ended.seconds = own_phases.total
                finish = None if committed.reason is None else self._finish(sequence, committed.reason)
                update = SequenceUpdate(
                    tokens=committed.tokens,
                    text=committed.text,
                    logprobs=committed.logprobs,
                    round=round_info(ended, own_phases),
                    finish=finish,
                )
                self._outbox.emit(sequence.id, update)
                rounds.append(ended)
        return rounds

    def _finish(self, sequence: TargetSequence, reason: FinishReason) -> Finish:
        self._sequences.remove(sequence)
        assert sequence.first_token_s is not None, "it has a token"
        seconds = sequence.round_ended_s - sequence.arrived_s
        self._recorder.request_finished(reason.label, seconds)
        stats = sequence.stats.to_proto(
            seconds_to_first_token=sequence.first_token_s - sequence.arrived_s, seconds=seconds
        )
        return Finish(reason=reason, stats=stats, num_cached_prompt_tokens=sequence.num_cached_prompt_tokens)

    def _observe(self, step: ScheduledStep, rounds: Sequence[EndedRound], phases: Phases, batch_size: int) -> None:
        for ended in rounds:
            if ended.sequence.round > 0:
                self._observer.round_ended(ended)
        self._observer.step_ended(
            rounds,
            self._scheduler.running,
            batch_size=batch_size,
            verify_s=phases.forward + phases.verify,
            has_prefill=any(scheduled.is_prefill for scheduled in step.segments),
            now_s=time.perf_counter(),
        )

    def _choose(self, verified: Sequence[Verified], batch_size: int) -> None:
        for sequence, _, outcome in verified:
            if sequence.is_admitted:  # else it has ended
                with self._sequences.isolated(sequence):
                    self._next_round.choose(sequence, outcome, batch_size=batch_size)
