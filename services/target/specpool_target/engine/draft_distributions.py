"""The draft's distributions for rejection verification: those of the rounds that end, with a short wait for late ones.

Runs on the engine thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

from specpool.algorithm.draft_distribution import DraftDistribution
from specpool.algorithm.verification import VerificationMode
from specpool.speculation import DraftSource
from specpool_target.engine.sequence import TargetSequence
from specpool_target.next_round.knowledge import SpeculatorKnowledge
from specpool_target.verify.arrived_distributions import read_distributions
from specpool_target.verify.verify_step import effective_mode

_logger = logging.getLogger(__name__)


class DraftDistributions:
    """Takes draft distributions from the sequences' handles."""

    def __init__(
        self,
        knowledge: SpeculatorKnowledge,
        *,
        deadline_s: float,
        vocab_size: int,
        device: torch.device,
        wait_for_news: Callable[[float], None],
        on_late: Callable[[], None],
    ) -> None:
        """`wait_for_news` blocks until something arrived, for so many seconds at most."""
        self._knowledge = knowledge
        self._deadline_s = deadline_s
        self._vocab_size = vocab_size
        self._device = device
        self._wait_for_news = wait_for_news
        self._on_late = on_late

    def take(self, sequences: Sequence[TargetSequence]) -> list[DraftDistribution | None]:
        """The distributions of each sequence, all of whose rounds end; None: not needed, or late (sample-and-match)."""
        in_need = [_needs(sequence) for sequence in sequences]
        self._wait([s for s, is_in_need in zip(sequences, in_need, strict=True) if is_in_need])
        return [self._read(s) if is_in_need else None for s, is_in_need in zip(sequences, in_need, strict=True)]

    def _wait(self, sequences: Sequence[TargetSequence]) -> None:
        started_s = time.perf_counter()
        while missing := [s for s in sequences if self._may_wait(s)]:
            waited_s = time.perf_counter() - started_s
            if waited_s >= self._deadline_s:
                for sequence in missing:
                    if (trust := self._knowledge.trust(sequence)) is not None:
                        trust.distributions_late(waited_s)
                return
            self._wait_for_news(self._deadline_s - waited_s)

    def _may_wait(self, sequence: TargetSequence) -> bool:
        """Whether the sequence's distributions are missing and likely to come."""
        if sequence.handle is None or not sequence.handle.awaits_distributions():
            return False
        trust = self._knowledge.trust(sequence)
        return trust is not None and trust.may_wait_for_distributions()

    def _read(self, sequence: TargetSequence) -> DraftDistribution | None:
        if sequence.handle is None:
            return None
        found = sequence.handle.take_distributions()
        distribution = None
        try:
            distribution = read_distributions(
                found, sequence.draft.tokens, vocab_size=self._vocab_size, device=self._device
            )
        except Exception:  # whatever a speculator sent: sample-and-match is right
            _logger.exception("the draft distributions of round %d could not be read", sequence.round)
        if distribution is None:
            self._on_late()
            sequence.stats.num_sample_and_match_rounds += 1
        return distribution


def _needs(sequence: TargetSequence) -> bool:
    mode = effective_mode(sequence.request.sampling, sequence.request.verification)
    return (
        mode is VerificationMode.REJECTION
        and sequence.draft.source is DraftSource.SPECULATOR
        and bool(sequence.draft.tokens)
    )
