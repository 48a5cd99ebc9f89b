"""What the pool reports, brought to the engine thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from specpool.speculation import Connection
from specpool_engine.runtime.engine_thread import EngineThread
from specpool_target.engine.live_sequences import LiveSequences
from specpool_target.engine.sequence import TargetSequence
from specpool_target.metrics import TargetMetrics
from specpool_target.next_round.knowledge import SpeculatorKnowledge
from specpool_target.next_round.next_round import NextRound
from specpool_target.next_round.speculation_trials import SpeculationTrials


class SpeculatorEvents:
    """Brings the pool's events to the engine thread: the first half is called on any thread, the rest runs there."""

    def __init__(
        self,
        thread: EngineThread,
        sequences: LiveSequences,
        knowledge: SpeculatorKnowledge,
        next_round: NextRound,
        trials: SpeculationTrials,
        metrics: TargetMetrics,
        connections: Callable[[], list[Connection]],
    ) -> None:
        """`connections` returns those that are live."""
        self._thread = thread
        self._sequences = sequences
        self._knowledge = knowledge
        self._next_round = next_round
        self._trials = trials
        self._metrics = metrics
        self._connections = connections
        self._known: set[Connection] = set()

    def connections_changed(self) -> None:
        """Take in the connections that are live now; called on the event loop."""
        connections = self._connections()
        self._metrics.set_links(len(connections))
        self._metrics.set_transports([connection.transport for connection in connections])
        known, self._known = self._known, set(connections)
        if self._known - known:
            self._thread.call(self._end_pauses)

    def moved(self, reason: str) -> None:
        """Note that a running sequence lost its speculator, or has another."""
        self._metrics.sequence_moved(reason)
        if reason == "lost":
            self._thread.call(self._next_round.note_lost_speculator)

    def answered(self, sequence_id: str, round_: int, tokens: tuple[int, ...]) -> None:
        """Pass on the tokens that a sequence waits for; none if they never come."""
        self._thread.call(partial(self._answer, sequence_id, round_, tokens))

    def distributions_arrived(self) -> None:
        """Wake an engine that waits for draft distributions."""
        self._thread.call(_nothing)

    # ---- on the engine thread ---------------------------------------------------------------------------------

    def _end_pauses(self) -> None:
        """End all pauses: a speculator that comes is given a chance; what was measured was measured with others."""
        self._trials.forget()
        for sequence in self._sequences:
            if sequence.is_paused and sequence.was_admitted:
                with self._sequences.isolated(sequence):
                    self._knowledge.resume(sequence)

    def _answer(self, sequence_id: str, round_: int, tokens: tuple[int, ...]) -> None:
        self._sequences.call(sequence_id, lambda sequence: self._take(sequence, round_, tokens))

    def _take(self, sequence: TargetSequence, round_: int, tokens: tuple[int, ...]) -> None:
        if not self._next_round.answer(sequence, round_, tokens):
            self._metrics.stale_message()


def _nothing() -> None:
    """Do nothing but wake the engine."""
