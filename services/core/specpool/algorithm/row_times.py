"""How many rows to draft in a step and how many tokens to verify in a round, from measured times."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from specpool.algorithm.fallback import expected_tokens

_LEAST_SPREAD: Final = 0.5
"""Variance of the row counts seen, below which a slope would be noise."""
_FORGOTTEN: Final = 0.01
"""Weight below which a number of rows says nothing any more."""
_REFIT_EVERY: Final = 8
"""Forwards between two fits of the times by rows: a step should not spend a tenth of a millisecond on it."""
_EARLY: Final = 64
"""Number of first forwards after each of which the times are fitted."""
_LINE_WEIGHT: Final = 2.0
"""Number of forwards with one number of rows that count as much as the line through all."""


class LinearTime:
    """Seconds of a forward as base + per_row * rows, fitted online with exponential forgetting."""

    def __init__(self, *, decay: float = 0.99) -> None:
        self._decay = decay
        self._weight = 0.0
        self._mean_rows = 0.0
        self._mean_seconds = 0.0
        self._spread = 0.0  # sum of squares of rows around their mean
        self._common = 0.0  # the same of rows and seconds

    @property
    def per_row_s(self) -> float:
        """Seconds per further row; 0 while row counts have hardly differed, never negative."""
        if self._weight == 0 or self._spread / self._weight < _LEAST_SPREAD:
            return 0.0
        return max(0.0, self._common / self._spread)

    @property
    def base_s(self) -> float:
        """Seconds of a forward of no rows."""
        return max(0.0, self._mean_seconds - self.per_row_s * self._mean_rows)

    def observe(self, num_rows: int, seconds: float) -> None:
        """Take one forward of `num_rows` rows into the line."""
        self._weight = self._weight * self._decay + 1
        rows, time = num_rows - self._mean_rows, seconds - self._mean_seconds
        self._mean_rows += rows / self._weight
        self._mean_seconds += time / self._weight
        self._spread = self._spread * self._decay + rows * (num_rows - self._mean_rows)
        self._common = self._common * self._decay + rows * (seconds - self._mean_seconds)

    def __call__(self, num_rows: int) -> float:
        """Expected seconds of a forward of `num_rows` rows."""
        return self.base_s + self.per_row_s * num_rows


class RowTimes(LinearTime):
    """Seconds of a forward by its number of rows: what was measured, near a line where little was.

    A line alone would be wrong where it matters: up to some number of rows a forward takes as long as reading the
    weights, so these rows are free, and only further ones cost time.
    """

    def __init__(self, *, decay: float = 0.99) -> None:
        super().__init__(decay=decay)
        self._means: dict[int, _Mean] = {}
        self._num_observed = 0
        self._fitted: tuple[list[int], list[float]] | None = None

    def observe(self, num_rows: int, seconds: float) -> None:
        """Take one forward into the line and into the mean of its number of rows."""
        super().observe(num_rows, seconds)
        self._num_observed += 1
        if self._num_observed < _EARLY or self._num_observed % _REFIT_EVERY == 0:
            self._fitted = None
        mean = self._means.setdefault(num_rows, _Mean())
        mean.weight = self._weight_now(mean) + 1
        mean.seconds += (seconds - mean.seconds) / mean.weight
        mean.observed_at = self._num_observed

    def __call__(self, num_rows: int) -> float:
        """Expected seconds of a forward of `num_rows` rows; never fewer for more rows."""
        if self._fitted is None:
            self._fitted = self._fit()
        rows, seconds = self._fitted
        index = bisect_left(rows, num_rows)
        if index == len(rows):
            # A line through all would begin below the last of them where the first rows are free.
            return seconds[-1] + self.per_row_s * (num_rows - rows[-1]) if rows else 0.0
        if rows[index] == num_rows:
            return seconds[index]
        least = seconds[index - 1] if index else 0.0
        return min(max(least, super().__call__(num_rows)), seconds[index])

    def _fit(self) -> tuple[list[int], list[float]]:
        """Numbers of rows that were observed, and what they take, as the nearest times that never fall.

        A number of rows that was seldom run and seemed slow then must not make all larger ones seem so: they would not
        be run, and nothing would correct it.
        """
        self._means = {n: mean for n, mean in self._means.items() if self._weight_now(mean) > _FORGOTTEN}
        rows = sorted(self._means)
        weights = [self._weight_now(self._means[count]) for count in rows]
        lines = [super(RowTimes, self).__call__(count) for count in rows]
        near_line = [
            line + (self._means[count].seconds - line) * weight / (weight + _LINE_WEIGHT)
            for count, weight, line in zip(rows, weights, lines, strict=True)
        ]
        return rows, never_falling(near_line, [weight + _LINE_WEIGHT for weight in weights])

    def _weight_now(self, mean: _Mean) -> float:
        weight: float = mean.weight * self._decay ** (self._num_observed - mean.observed_at)
        return weight


@dataclass(slots=True)
class _Mean:
    """Mean of the seconds that forwards with one number of rows took."""

    weight: float = 0.0
    """Number of forwards, older ones counting less, when it was last observed."""
    seconds: float = 0.0
    observed_at: int = 0


def never_falling(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The sequence without a fall that is nearest to `values` in weighted squares (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for value, weight in zip(values, weights, strict=True):
        size = 1
        while pools and pools[-1][0] > value:
            before, before_weight, before_size = pools.pop()
            value = (before * before_weight + value * weight) / (before_weight + weight)
            weight, size = weight + before_weight, size + before_size
        pools.append((value, weight, size))
    return [value for value, _, size in pools for _ in range(size)]


def rows_worth_running(
    values: Sequence[float], step_s: Callable[[int], float], *, num_rows: int, num_fixed: int = 0
) -> int:
    """Number of the most valuable rows that give the most value per second.

    A row whose value per second is below that of the step without it only delays the next step.

    Args:
        values: probability that what a row drafts is used, the largest first.
        step_s: seconds of a step by its rows.
        num_rows: at most so many.
        num_fixed: rows that are run in any case.
    """
    best, best_rate, total = 0, 0.0, 0.0
    for count, value in enumerate(values[: max(num_rows, 0)], start=1):
        total += value
        seconds = step_s(num_fixed + count)
        if seconds <= 0:
            return min(len(values), max(num_rows, 0))  # nothing measured
        if total / seconds >= best_rate:
            best, best_rate = count, total / seconds
    return best


def best_lookahead(
    max_lookahead: int, *, acceptance: float, verify_s: Callable[[int], float], draft_s: Callable[[int], float]
) -> int:
    """The lookahead K with the largest expected tokens per second, at least 1.

    Args:
        max_lookahead: the largest K.
        acceptance: per drafted token.
        verify_s: seconds of verifying K draft tokens.
        draft_s: seconds that K draft tokens hold the target up; 0 when they are drafted ahead.
    """

    def speed(lookahead: int) -> float:
        return expected_tokens(lookahead, acceptance) / max(verify_s(lookahead) + draft_s(lookahead), 1e-9)

    return max(range(1, max_lookahead + 1), key=speed, default=1)
