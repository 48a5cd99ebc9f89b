"""The target engine as the wire sees it: one thread owns the model, its KV cache and every sequence.

Commands go in as calls to make on that thread; what it finds out leaves through the outbox. What it does in a step is
in `loop`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

from specpool.errors import EngineFailed, SpecPoolError
from specpool.speculation import Connection, PoolEvents, SpeculationPool
from specpool.v1 import types_pb2
from specpool_engine.modeling.detokenizer import IncrementalDetokenizer
from specpool_engine.modeling.interface import CausalModel
from specpool_engine.runtime.engine_thread import EngineThread
from specpool_engine.runtime.outbox import call_on_loop
from specpool_target.config import TargetConfig
from specpool_target.engine.draft_distributions import DraftDistributions
from specpool_target.engine.live_sequences import LiveSequences
from specpool_target.engine.loop import TargetLoop
from specpool_target.engine.outbox import TargetOutbox
from specpool_target.engine.scheduler import Scheduler
from specpool_target.engine.sequence import Pairing, SequenceRequest, SequenceUpdate, TargetSequence
from specpool_target.engine.speculator_events import SpeculatorEvents
from specpool_target.engine.step_recorder import StepRecorder
from specpool_target.engine.streams import Emit, Streams
from specpool_target.metrics import TargetMetrics
from specpool_target.next_round.fallback_policy import FallbackPolicy
from specpool_target.next_round.knowledge import KnowledgeEvents, SpeculatorKnowledge
from specpool_target.next_round.lookahead_policy import LookaheadPolicy
from specpool_target.next_round.next_round import NextRound
from specpool_target.next_round.observer import Observer


class TargetEngine:
    """One target's engine. Every public method may be called from any thread, unless it says otherwise."""

    def __init__(
        self,
        model: CausalModel,
        config: TargetConfig,
        *,
        loop: asyncio.AbstractEventLoop,
        metrics: TargetMetrics,
        make_pool: Callable[[PoolEvents], SpeculationPool],
        on_failed: Callable[[], None] = lambda: None,
        before_start: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the engine; its thread is not started yet.

        Args:
            model: of this target.
            config: of this process.
            loop: of the wire.
            metrics: of this process.
            make_pool: makes the pool of speculators, which works on `loop` and does not flush itself.
            on_failed: called on `loop`, after every stream was ended.
            before_start: called on the engine's thread.
        """
        self.model = model
        self.metrics = metrics
        self.max_context = min(model.max_context, config.max_context or model.max_context)
        self.scheduler = Scheduler(
            model.pool,
            max_context=self.max_context,
            max_batch_size=config.max_batch_size,
            max_batch_tokens=config.max_batch_tokens,
            max_waiting=config.max_waiting,
            max_prefill_share=config.max_prefill_share,
        )
        self._on_failed = on_failed
        self._config = config
        self._streams = Streams()
        self._loop = loop
        self.pool = make_pool(self._pool_events())
        """The connections to speculators; started and closed by the server."""
        self._outbox = TargetOutbox(loop, self._streams, self.pool)
        knowledge = SpeculatorKnowledge(self.pool, self._knowledge_events())
        fallback = FallbackPolicy(config.fallback)
        self.lookahead = LookaheadPolicy(fallback, max_lookahead=config.max_lookahead)
        next_round = NextRound(
            knowledge,
            fallback,
            self.lookahead,
            vocab_size=model.vocab_size,
            deadline_s=config.speculation_deadline_ms / 1e3,
        )
        self._recorder = StepRecorder(metrics, self.scheduler, next_round.take_counts)
        self._sequences = LiveSequences(self.scheduler, knowledge, self._outbox, metrics)
        self.loop = TargetLoop(
            model,
            scheduler=self.scheduler,
            sequences=self._sequences,
            distributions=self._draft_distributions(knowledge, next_round),
            observer=Observer(fallback, self.lookahead, knowledge.is_served),
            next_round=next_round,
            recorder=self._recorder,
            outbox=self._outbox,
            num_warm_up_tokens=config.max_lookahead + 1,
        )
        self.thread = EngineThread(
            self.loop, name="target engine", loop=loop, on_failed=self._failed, before_start=before_start
        )
        self.speculators = SpeculatorEvents(
            self.thread,
            self._sequences,
            knowledge,
            next_round,
            self.lookahead.trials,
            metrics,
            connections=lambda: [m.connection for m in self.pool.members if m.connection is not None],
        )
        self._num_submitted = 0
        self._num_added = 0
        """Submitted sequences that the loop has taken up; the others are still in the queue of commands."""

    def _pool_events(self) -> PoolEvents:
        return PoolEvents(
            on_connections=lambda: self.speculators.connections_changed(),
            on_move=lambda reason: self.speculators.moved(reason),
            on_stale=self.metrics.stale_message,
        )

    def _knowledge_events(self) -> KnowledgeEvents:
        return KnowledgeEvents(
            on_answer=lambda *answer: self.speculators.answered(*answer),
            on_distributions=lambda: self.speculators.distributions_arrived(),
            on_paired=self._paired,
        )

    def _draft_distributions(self, knowledge: SpeculatorKnowledge, next_round: NextRound) -> DraftDistributions:
        return DraftDistributions(
            knowledge,
            deadline_s=self._config.distribution_deadline_ms / 1e3,
            vocab_size=self.model.vocab_size,
            device=self.model.device,
            wait_for_news=lambda timeout_s: self.thread.defer_a_command(timeout_s),
            on_late=next_round.note_late_distributions,
        )

    # ---- called by the wire -----------------------------------------------------------------------------------

    def submit(
        self,
        request: SequenceRequest,
        emit: Emit,
        *,
        detokenizer: IncrementalDetokenizer | None = None,
    ) -> None:
        """Run a sequence; `emit` is called on the event loop. Raises at once what can never run."""
        num_tokens = len(request.prompt_tokens) + len(request.committed_tokens)
        sequence = TargetSequence(
            request,
            detokenizer=detokenizer,
            max_length=self.scheduler.max_length,
            backup_ngram=self._config.backup_ngram,
            arrived_s=time.perf_counter(),
        )

        def accept() -> None:
            self.scheduler.check_admissible(
                num_tokens,
                num_submitted=self._num_submitted - self._num_added,
                is_continuation=sequence.has_begun,
            )
            self._num_submitted += 1
            self._streams.open(request.id, emit)

        self.thread.submit(partial(self._add, sequence), accept)

    def _add(self, sequence: TargetSequence) -> None:
        self._num_added += 1
        self._sequences.add(sequence)

    def cancel(self, sequence_id: str) -> None:
        """Free a sequence without another update. Unknown ids are ignored. Called on the event loop."""
        self._streams.close(sequence_id)
        if (handle := self.pool.find(sequence_id)) is not None:
            handle.close()  # without waiting for the step that runs
        self.thread.call(partial(self._sequences.cancel, sequence_id))

    def _paired(self, sequence_id: str, connection: Connection | None) -> None:
        """Pass a new pairing on to the sequence's stream; callable on any thread."""
        pairing = Pairing() if connection is None else Pairing(connection.address, connection.ack.speculator.id)
        update = SequenceUpdate(paired=pairing)
        call_on_loop(self._loop, lambda: self._streams.deliver(sequence_id, update))

    def fail_all(self, error: SpecPoolError) -> None:
        """End every sequence with `error`."""
        self.thread.call(partial(self._fail_all, error))

    def _fail_all(self, error: SpecPoolError) -> None:
        for sequence in self._sequences:
            self._sequences.fail(sequence, error)

    def _failed(self, error: EngineFailed) -> None:
        """Tell every stream of the failure, on the event loop."""
        self._streams.fail(error)
        self._on_failed()

    @property
    def failure(self) -> EngineFailed | None:
        """Why the engine cannot go on."""
        return self.thread.failure

    @property
    def num_sequences(self) -> int:
        """Number of sequences, running and waiting."""
        return len(self._sequences)

    def load(self) -> types_pb2.Load:
        """The load that status and the router's choice are made of."""
        return self._recorder.load()
