"""The Saguaro constant that gives the most tokens per second, found by trying its neighbours.

How much is lost in acceptance and won in hits depends on the pair, the text and the machine, so C is chosen by what it
is for. Rounds are taken in blocks, each with one C; every few blocks a neighbour of the best one is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

CONSTANTS: Final = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(slots=True)
class _Candidate:
    tokens: float = 0.0
    seconds: float = 0.0

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class SaguaroTuner:
    """Chooses C among `constants`; starts with the last one, 1, which is plain sampling."""

    def __init__(
        self,
        constants: Sequence[float] = CONSTANTS,
        *,
        rounds_per_block: int = 24,
        blocks_per_trial: int = 3,
        decay: float = 0.8,
    ) -> None:
        if not constants or any(not 0 <= constant <= 1 for constant in constants):
            raise ValueError(f"constants must be between 0 and 1 and at least one, got {list(constants)}")
        self._constants = sorted(constants)
        self._candidates = [_Candidate() for _ in self._constants]
        self._rounds_per_block = rounds_per_block
        self._blocks_per_trial = blocks_per_trial
        self._decay = decay
        self._current = len(self._constants) - 1
        self._side = -1
        self._num_rounds = 0
        self._num_blocks = 0

    @property
    def constant(self) -> float:
        """The constant to draft with now."""
        return self._constants[self._current]

    @property
    def best(self) -> float:
        """The constant that was fastest so far."""
        return self._constants[self._best()]

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Take in one round of one sequence: committed tokens, and the seconds since its round before."""
        candidate = self._candidates[self._current]
        candidate.tokens += num_tokens
        candidate.seconds += seconds
        self._num_rounds += 1
        if self._num_rounds % self._rounds_per_block == 0:
            self._end_block()

    def _end_block(self) -> None:
        candidate = self._candidates[self._current]
        candidate.tokens *= self._decay
        candidate.seconds *= self._decay
        self._num_blocks += 1
        best = self._best()
        if self._num_blocks % self._blocks_per_trial == 0:
            self._side = -self._side
            neighbours = [i for i in (best + self._side, best - self._side) if 0 <= i < len(self._constants)]
            self._current = neighbours[0] if neighbours else best
        else:
            self._current = best

    def _best(self) -> int:
        return max(range(len(self._constants)), key=lambda i: (self._candidates[i].speed, i))
