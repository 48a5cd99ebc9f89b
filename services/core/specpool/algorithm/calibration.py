"""How likely each of the draft's ranked tokens is the target's, from the draft's own scores, corrected by outcomes.

A draft is sure of some tokens and unsure of others; a mean acceptance rate throws that away. The probability that the
target's token is rank i of a node with scores s_0 >= s_1 >= ... is modelled as

    (1 - outside) * softmax(slope * s_i + lift * [i = 0])_i

and slope, lift and outside are learned online from the ranks at which the target's tokens were found. For coupled
verification the scores include the shared noise, so the same form says how likely the target's own noisy maximum is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import Final

import numpy as np

_SLOPE_RANGE: Final = (0.05, 3.0)
_LIFT_RANGE: Final = (-3.0, 3.0)
_PRIOR_OUTSIDE: Final = 0.02


class RankCalibration:
    """How scores become probabilities in one verification mode: by a slope, a lift and a share outside of the ranks.

    Learned by online Newton steps on the log-likelihood: the information matrix is summed with exponential forgetting,
    so that steps shrink as evidence grows and never vanish.
    """

    def __init__(self, *, prior_weight: float = 8.0, decay: float = 0.998) -> None:
        self._slope = 1.0
        self._lift = 0.0
        self._information = (prior_weight, 0.0, prior_weight / 4)  # of (slope, slope and lift, lift)
        self._outside = _PRIOR_OUTSIDE * prior_weight
        self._trials = prior_weight
        self._confidences = (0.0, 0.0, 0.0)  # number, sum, and sum of squares
        self._decay = decay

    @property
    def slope(self) -> float:
        """Factor that the draft's scores count; below 1 the draft is surer than it should be."""
        return self._slope

    @property
    def lift(self) -> float:
        """Log-odds that rank 0 gains beyond its score."""
        return self._lift

    @property
    def outside(self) -> float:
        """Probability that the target's token is none of those ranked."""
        return self._outside / self._trials

    @property
    def confidence_spread(self) -> float:
        """Variance of rank 0's probability from place to place, over m (1 - m), m its mean; 0 before the first outcome.

        0: the draft is equally sure everywhere; 1: it always knows whether it is right.
        """
        count, total, squares = self._confidences
        mean = total / count if count else 0.0
        return max(0.0, squares / count - mean**2) / (mean * (1 - mean)) if 0 < mean < 1 else 0.0

    def probabilities(self, scores: Sequence[float]) -> tuple[float, ...]:
        """Probabilities of the ranks from their finite scores, best first; they sum to 1 - `outside`."""
        inside = 1 - self.outside
        return tuple(inside * share for share in self._shares(scores))

    def of_rows(self, scores: np.ndarray) -> np.ndarray:
        """`probabilities` of many rows of scores [N, F] at once, float64 [N, F]; 0 for ranks with a score of -inf."""
        if not scores.shape[1]:
            return np.zeros(scores.shape)
        best = scores[:, :1]
        weights = np.exp(self._slope * (scores - np.where(np.isfinite(best), best, 0.0)))
        weights[:, 0] *= math.exp(self._lift)
        totals = weights.sum(axis=1, keepdims=True)
        return (1 - self.outside) * weights / np.where(totals > 0, totals, 1.0)

    def observe(self, scores: Sequence[float], rank: int | None) -> None:
        """Take in that the target's token was the one at `rank`, or None of them."""
        self._outside = self._outside * self._decay + (rank is None)
        self._trials = self._trials * self._decay + 1
        if not scores:
            return
        shares = self._shares(scores)
        confidence = (1 - self.outside) * shares[0]
        count, total, squares = (value * self._decay for value in self._confidences)
        self._confidences = (count + 1, total + confidence, squares + confidence**2)
        if rank is None or len(scores) < 2:
            return
        best = scores[0]
        relative = [score - best for score in scores]
        mean = sum(map(mul, shares, relative))
        # gradient and Fisher information of a softmax whose features are (score, is rank 0)
        gradient = (relative[rank] - mean, (rank == 0) - shares[0])
        spread = sum([share * (score - mean) ** 2 for share, score in zip(shares, relative, strict=True)])
        common = shares[0] * (0.0 - mean)
        slope_slope, slope_lift, lift_lift = (self._decay * value for value in self._information)
        self._information = (slope_slope + spread, slope_lift + common, lift_lift + shares[0] * (1 - shares[0]))
        self._step(*gradient)

    def _shares(self, scores: Sequence[float]) -> list[float]:
        """The ranks' shares of what is not outside: a calibrated softmax of their scores."""
        best = scores[0] if scores else 0.0
        slope, exp = self._slope, math.exp
        weights = [exp(slope * (score - best)) for score in scores]
        if weights:
            weights[0] *= math.exp(self._lift)
        total = sum(weights)
        return [weight / total for weight in weights]

    def _step(self, slope_gradient: float, lift_gradient: float) -> None:
        slope_slope, slope_lift, lift_lift = self._information
        determinant = slope_slope * lift_lift - slope_lift**2
        if determinant <= 0:
            return
        self._slope += (lift_lift * slope_gradient - slope_lift * lift_gradient) / determinant
        self._lift += (slope_slope * lift_gradient - slope_lift * slope_gradient) / determinant
        self._slope = min(max(self._slope, _SLOPE_RANGE[0]), _SLOPE_RANGE[1])
        self._lift = min(max(self._lift, _LIFT_RANGE[0]), _LIFT_RANGE[1])
