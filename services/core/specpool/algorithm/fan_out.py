"""Fan-out: how many guesses F_k to spend on each accepted length k of the next verification outcome.

With K drafted tokens and acceptance rate a, the outcome accepts k tokens with P(k) = a^k (1 - a) for k < K
and P(K) = a^K. If F guesses of the next token miss with rate c / F^r, the expected misses sum_k P(k) c_k /
F_k^r_k under a budget sum_k F_k = B are least at F_k = (c_k r_k P(k) / price)^(1 / (1 + r_k)). With c = 1
and one r this is the closed form of Kumar, Dao and May (arXiv 2603.03251).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_MIN_ACCEPTANCE: Final = 1e-3
_NUM_BISECTIONS: Final = 60


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """Law of misses: the miss rate of F guesses is min(1, constant / F^exponent)."""

    constant: float
    """Miss rate of one guess, c."""
    exponent: float
    """How fast more guesses help, r."""

    def miss_rate(self, num_guesses: int) -> float:
        """Probability that the token is not among ``num_guesses`` guesses."""
        if num_guesses <= 0:
            return 1.0
        return min(1.0, self.constant / math.pow(num_guesses, self.exponent))


# Where a running pool starts: fitted on a real pair (Qwen2.5-Coder-Instruct 0.5B for 1.5B, greedy, 21 prompts);
# more prompts of that pair give 0.48, 0.70.
DEFAULT_MISS_AFTER_REJECTION: Final = PowerLaw(0.41, 1.0)
DEFAULT_MISS_AFTER_ACCEPTANCE: Final = PowerLaw(0.10, 1.4)
DEFAULT_ACCEPTANCE: Final = 0.85


def uniform_fan_out(budget: int, lookahead: int) -> tuple[int, ...]:
    """``budget`` guesses spread evenly over the lookahead + 1 outcomes, the earlier ones first."""
    _check(budget, lookahead)
    share, rest = divmod(budget, lookahead + 1)
    return tuple(share + (k < rest) for k in range(lookahead + 1))


def geometric_fan_out(
    budget: int,
    lookahead: int,
    acceptance: float = DEFAULT_ACCEPTANCE,
    miss_after_rejection: PowerLaw = DEFAULT_MISS_AFTER_REJECTION,
    miss_after_acceptance: PowerLaw = DEFAULT_MISS_AFTER_ACCEPTANCE,
) -> tuple[int, ...]:
    """Guesses per accepted length 0..lookahead that minimise expected misses; they sum to ``budget``."""
    _check(budget, lookahead)
    return round_to_sum(
        continuous_fan_out(budget, lookahead, acceptance, miss_after_rejection, miss_after_acceptance), budget
    )


def outcome_probabilities(lookahead: int, acceptance: float) -> tuple[float, ...]:
    """The probabilities P(k) of accepting exactly k tokens, [lookahead + 1], k = 0..lookahead."""
    rejected = tuple(acceptance**k * (1 - acceptance) for k in range(lookahead))
    return (*rejected, acceptance**lookahead)


def continuous_fan_out(
    budget: float,
    lookahead: int,
    acceptance: float,
    miss_after_rejection: PowerLaw,
    miss_after_acceptance: PowerLaw,
) -> tuple[float, ...]:
    """Guesses per accepted length, [lookahead + 1], that miss least often, before rounding; they sum to `budget`."""
    acceptance = min(max(acceptance, _MIN_ACCEPTANCE), 1 - _MIN_ACCEPTANCE)
    laws = [miss_after_rejection] * lookahead + [miss_after_acceptance]
    weights = [
        (math.log(law.constant * law.exponent * probability), 1 / (1 + law.exponent))
        for law, probability in zip(laws, outcome_probabilities(lookahead, acceptance), strict=True)
    ]

    def fan_out_at(log_price: float) -> list[float]:
        return [math.exp((log_weight - log_price) * power) for log_weight, power in weights]

    # the sum falls as the price rises, and at ``low`` one term alone is the budget
    low = max(log_weight - math.log(max(budget, 1e-9)) / power for log_weight, power in weights)
    high = low + math.log(lookahead + 2) / min(power for _, power in weights)
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(fan_out_at(middle)) > budget else (low, middle)
    return tuple(fan_out_at(high))


def round_to_sum(values: Sequence[float], total: int) -> tuple[int, ...]:
    """Non-negative integers near ``values`` that sum to ``total`` (largest remainder, earlier first)."""
    scale = total / sum(values) if total else 0.0
    scaled = [value * scale for value in values]
    floors = [math.floor(value + 1e-9) for value in scaled]
    by_remainder = sorted(range(len(scaled)), key=lambda k: (floors[k] - scaled[k], k))
    for k in by_remainder[: max(0, total - sum(floors))]:
        floors[k] += 1
    return tuple(floors)


def _check(budget: int, lookahead: int) -> None:
    if budget < 0 or lookahead < 0:
        raise ValueError(f"budget and lookahead must not be negative, got {budget} and {lookahead}")
