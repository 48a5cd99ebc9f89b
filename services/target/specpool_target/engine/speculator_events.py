"""What links to speculators report, brought to the engine thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from specpool_engine.runtime.engine_thread import EngineThread
from specpool_target.engine.live_sequences import LiveSequences
from specpool_target.engine.sequence import TargetSequence
from specpool_target.links.link import SpeculatorLink
from specpool_target.metrics import TargetMetrics
from specpool_target.next_round.knowledge import SpeculatorKnowledge
from specpool_target.next_round.next_round import NextRound
from specpool_target.next_round.speculation_trials import SpeculationTrials


class SpeculatorEvents:
    """See `LinkListener`. Called from the event loop; everything else happens on the engine thread."""

    def __init__(
        self,
        thread: EngineThread,
        sequences: LiveSequences,
        knowledge: SpeculatorKnowledge,
        next_round: NextRound,
        trials: SpeculationTrials,
        metrics: TargetMetrics,
    ) -> None:
        self._thread = thread
        self._sequences = sequences
        self._knowledge = knowledge
        self._next_round = next_round
        self._trials = trials
        self._metrics = metrics
        self._transports: dict[str, str] = {}  # of the connected links; touched by the event loop alone

    def link_up(self, link: SpeculatorLink, epoch: int) -> None:
        """Open every sequence that has been in the batch."""
        self._show_link(link, up=True)
        self._thread.call(partial(self._link_up, link, epoch))

    def link_down(self, link: SpeculatorLink, epoch: int) -> None:
        """Its sequences go on alone."""
        self._show_link(link, up=False)
        self._thread.call(partial(self._link_down, link, epoch))

    def transport_changed(self, link: SpeculatorLink) -> None:
        """Draft distributions come another way."""
        if link.endpoint in self._transports:
            self._show_link(link, up=True)

    def resync(self, sequence_id: str) -> None:
        """The speculator asks for a sequence again."""
        self._thread.call(partial(self._sequences.call, sequence_id, self._knowledge.resync))

    def speculation(self, sequence_id: str, round_: int, tokens: Sequence[int]) -> None:
        """The answer to a request."""
        self._thread.call(partial(self._answer, sequence_id, round_, tokens))

    def distributions_arrived(self) -> None:
        """Wakes an engine that waits for them."""
        self._thread.call(_nothing)

    def stale_message(self) -> None:
        """Something came for a sequence that has ended."""
        self._metrics.stale_message()

    def _show_link(self, link: SpeculatorLink, *, up: bool) -> None:
        if up:
            self._transports[link.endpoint] = link.transport
        else:
            self._transports.pop(link.endpoint, None)
        self._metrics.set_links(len(self._transports))
        self._metrics.set_transports(self._transports.values())

    # ---- on the engine thread ---------------------------------------------------------------------------------

    def _link_up(self, link: SpeculatorLink, epoch: int) -> None:
        self._knowledge.link_up(link, epoch)
        self._trials.forget()
        self._each(self._knowledge.reopen, lambda sequence: sequence.link is link and sequence.was_admitted)

    def _link_down(self, link: SpeculatorLink, epoch: int) -> None:
        self._knowledge.link_down(link, epoch)
        self._each(self._lose, lambda sequence: sequence.link is link and sequence.opened_epoch == epoch)

    def _lose(self, sequence: TargetSequence) -> None:
        self._next_round.fallbacks["speculator_lost"] += 1
        self._knowledge.abandon(sequence)

    def _each(self, action: Callable[[TargetSequence], None], among: Callable[[TargetSequence], bool]) -> None:
        for sequence in self._sequences:
            if among(sequence):
                with self._sequences.isolated(sequence):
                    action(sequence)

    def _answer(self, sequence_id: str, round_: int, tokens: Sequence[int]) -> None:
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return self._metrics.stale_message()
        with self._sequences.isolated(sequence):
            if not self._next_round.answer(sequence, round_, tokens):
                self._metrics.stale_message()
        return None


def _nothing() -> None:
    """Wakes the engine."""
