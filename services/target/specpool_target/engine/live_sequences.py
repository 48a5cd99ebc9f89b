"""The sequences that run or wait, by id; and how one of them ends without the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final

from specpool.errors import KVCacheFull, SequenceFailed, SpecPoolError
from specpool_engine.modeling.interface import CausalModel, check_segments
from specpool_target.engine.outbox import TargetOutbox
from specpool_target.engine.scheduler import ScheduledStep, Scheduler
from specpool_target.engine.sequence import SequenceUpdate, TargetSequence
from specpool_target.metrics import TargetMetrics
from specpool_target.next_round.knowledge import SpeculatorKnowledge

_logger = logging.getLogger(__name__)
_MAX_MESSAGE: Final = 500


class LiveSequences:
    """The live sequences of a target. Used on the engine thread; the length may be read from any."""

    def __init__(
        self, scheduler: Scheduler, knowledge: SpeculatorKnowledge, outbox: TargetOutbox, metrics: TargetMetrics
    ) -> None:
        self._scheduler = scheduler
        self._knowledge = knowledge
        self._outbox = outbox
        self._metrics = metrics
        self._by_id: dict[str, TargetSequence] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[TargetSequence]:
        return iter(list(self._by_id.values()))

    def get(self, sequence_id: str) -> TargetSequence | None:
        """The sequence of this id; None if it has ended."""
        return self._by_id.get(sequence_id)

    def add(self, sequence: TargetSequence) -> None:
        """Add a sequence, which then waits for admission."""
        self._by_id[sequence.id] = sequence
        self._scheduler.add(sequence)

    def remove(self, sequence: TargetSequence) -> None:
        """Remove a sequence that has ended well."""
        del self._by_id[sequence.id]
        self._scheduler.remove(sequence)
        self._knowledge.close(sequence)

    def cancel(self, sequence_id: str) -> None:
        """End a sequence that nobody wants any more; unknown ids are ignored."""
        sequence = self._by_id.get(sequence_id)
        if sequence is None:
            return
        with self.isolated(sequence):
            self.remove(sequence)
            self._metrics.request_finished("cancelled", time.perf_counter() - sequence.arrived_s)

    # ---- what goes wrong with one sequence --------------------------------------------------------------------

    def isolated(self, sequence: TargetSequence) -> _Isolated:
        """A context in which an exception ends the sequence, and nothing else."""
        return _Isolated(self, sequence)

    def call(self, sequence_id: str, action: Callable[[TargetSequence], None]) -> None:
        """Call `action` with the sequence, isolated; does nothing if it has ended."""
        sequence = self._by_id.get(sequence_id)
        if sequence is not None:
            with self.isolated(sequence):
                action(sequence)

    def fail(self, sequence: TargetSequence, error: Exception) -> None:
        """End a sequence with `error`; what is not a typed error becomes `SequenceFailed`."""
        if not isinstance(error, SpecPoolError):
            _logger.error("sequence %s failed", sequence.id, exc_info=error)
            error = SequenceFailed(
                f"the target failed on this sequence, others go on: {type(error).__name__}: {error}"[:_MAX_MESSAGE]
            )
        if self._by_id.pop(sequence.id, None) is not None:
            self._scheduler.remove(sequence, publish=False)  # nobody knows how far its KV goes
        self._outbox.emit(sequence.id, SequenceUpdate(error=error))
        self._metrics.request_finished("error", time.perf_counter() - sequence.arrived_s)
        try:
            self._knowledge.close(sequence)
        except Exception:
            _logger.exception("the speculator of sequence %s was not told of its end", sequence.id)

    def end_the_cause(self, error: SpecPoolError, step: ScheduledStep, model: CausalModel) -> bool:
        """End the sequences for which the model refused the step before anything changed; False if it was none."""
        if isinstance(error, KVCacheFull):
            self.fail(step.segments[-1].sequence, error)
            return True
        causes: list[tuple[TargetSequence, SpecPoolError]] = []
        for scheduled in step.segments:
            try:
                check_segments([scheduled.segment()], max_context=model.max_context, vocab_size=model.vocab_size)
            except SpecPoolError as refusal:
                causes.append((scheduled.sequence, refusal))
        for sequence, cause in causes:
            self.fail(sequence, cause)
        return bool(causes)


class _Isolated:
    """The context of `isolated`, as a class: cheaper than a generator, and there are several per round and sequence."""

    __slots__ = ("_sequence", "_sequences")

    def __init__(self, sequences: LiveSequences, sequence: TargetSequence) -> None:
        self._sequences = sequences
        self._sequence = sequence

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        self._sequences.fail(self._sequence, error)
        return True
