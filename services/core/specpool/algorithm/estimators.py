"""Online estimates of acceptance and of the miss power law, forgetting old rounds exponentially.

They start from priors measured on a real pair and weigh them as ``prior_weight`` observations.
"""

from __future__ import annotations

import math
from typing import Final

from specpool.algorithm.fan_out import (
    DEFAULT_ACCEPTANCE,
    DEFAULT_MISS_AFTER_REJECTION,
    PowerLaw,
)

_SMOOTHING: Final = 0.1
_GRID: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_CONSTANT_RANGE: Final = (1e-3, 1.0)
_EXPONENT_RANGE: Final = (0.1, 4.0)


class Average:
    """Exponential average; its first value is the first observation."""

    def __init__(self, smoothing: float = _SMOOTHING) -> None:
        self._smoothing = smoothing
        self.value = 0.0
        self.is_empty = True

    def observe(self, value: float) -> None:
        """Take one more observation into the average."""
        self.value = value if self.is_empty else self.value + self._smoothing * (value - self.value)
        self.is_empty = False


class AcceptanceEstimator:
    """Probability that a drafted token is accepted, given that those before it were."""

    def __init__(self, prior: float = DEFAULT_ACCEPTANCE, *, prior_weight: float = 8.0, decay: float = 0.995) -> None:
        self._accepted = 0.0
        self._trials = 0.0
        self._prior = prior
        self._prior_weight = prior_weight
        self._decay = decay

    @property
    def value(self) -> float:
        """The estimated probability, from 0 to 1."""
        return (self._accepted + self._prior * self._prior_weight) / (self._trials + self._prior_weight)

    def observe(self, num_accepted: int, num_draft: int) -> None:
        """Take in one round: ``num_accepted`` of ``num_draft``; a rejection is one more trial, the rest none."""
        num_trials = min(num_accepted + 1, num_draft)
        if num_trials <= 0:
            return
        forget = self._decay**num_trials
        self._accepted = self._accepted * forget + num_accepted
        self._trials = self._trials * forget + num_trials


class MissPowerLawEstimator:
    """Fits miss rate = c / F^r to the ranks at which the true token was found among the guesses.

    Keep two: one for outcomes after a rejection, one for outcomes that accept all. A round that made n
    guesses says for every F <= n whether F guesses would have missed, and nothing about larger F, whether
    it hit or not: so the fit is not biased by how many guesses were made. The fit is a weighted
    least-squares line through log miss rate over log F.
    """

    def __init__(
        self,
        prior: PowerLaw = DEFAULT_MISS_AFTER_REJECTION,
        *,
        prior_weight: float = 8.0,
        decay: float = 0.995,
    ) -> None:
        self._misses = [0.0] * len(_GRID)
        self._trials = [0.0] * len(_GRID)
        self._prior = prior
        self._prior_weight = prior_weight
        self._decay = decay

    def observe(self, rank: int | None, num_guesses: int) -> None:
        """Take in one round: the token was guess number ``rank`` (from 0) of ``num_guesses``, or None of them."""
        if num_guesses <= 0:
            return
        for i, fan_out in enumerate(_GRID):
            if fan_out <= num_guesses:
                missed = rank is None or rank >= fan_out
                self._misses[i] = self._misses[i] * self._decay + missed
                self._trials[i] = self._trials[i] * self._decay + 1

    def miss_rate(self, num_guesses: int) -> float:
        """Miss rate with `num_guesses` guesses, by the fitted law."""
        return self.value.miss_rate(num_guesses)

    @property
    def value(self) -> PowerLaw:
        """The power law that fits the observations best."""
        points = [self._point(i) for i in range(len(_GRID))]
        total = sum(weight for _, _, weight in points)
        mean_x = sum(x * weight for x, _, weight in points) / total
        mean_y = sum(y * weight for _, y, weight in points) / total
        spread = sum(weight * (x - mean_x) ** 2 for x, _, weight in points)
        slope = sum(weight * (x - mean_x) * (y - mean_y) for x, y, weight in points) / spread
        exponent = _clamp(-slope, *_EXPONENT_RANGE)
        return PowerLaw(_clamp(math.exp(mean_y + exponent * mean_x), *_CONSTANT_RANGE), exponent)

    def _point(self, i: int) -> tuple[float, float, float]:
        """A point of the fit: (log F, log miss rate, weight). A log is as certain as its misses are many."""
        trials = self._trials[i] + self._prior_weight
        misses = self._misses[i] + self._prior_weight * self._prior.miss_rate(_GRID[i])
        return math.log(_GRID[i]), math.log(misses / trials), misses


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
