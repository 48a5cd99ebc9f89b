"""What a simulation is asked: acceptance behind a measured speed, targets per speculator, K, the cost of a loss."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from specpool.errors import InvalidArgument
from specpool_tools.planning.profile import Profile
from specpool_tools.planning.scenario import Figures, Scenario
from specpool_tools.planning.simulator import simulate

_NUM_BISECTIONS = 12


def fit_acceptance(profile: Profile, scenario: Scenario, tokens_per_second: float) -> Profile:
    """The profile whose acceptance rate gives that speed in `scenario`. Raises `InvalidArgument` if none does."""

    def speed(acceptance: float) -> float:
        return simulate(replace(profile, acceptance=acceptance), scenario).tokens_per_second

    low, high = 0.0, 0.999
    slowest, fastest = speed(low), speed(high)
    if not slowest <= tokens_per_second <= fastest:
        raise InvalidArgument(
            f"no acceptance rate gives {tokens_per_second:g} tokens/s in mode {scenario.mode}: "
            f"0 gives {slowest:.1f} and {high} gives {fastest:.1f}",
            metadata={"field": "tokens_per_second", "value": tokens_per_second},
        )
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if speed(middle) < tokens_per_second else (low, middle)
    return replace(profile, acceptance=(low + high) / 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolPoint:
    """What targets get that share one speculator."""

    num_targets: int
    figures: Figures
    share: float
    """Speed of a sequence over its speed with a speculator for one target."""


def targets_per_speculator(profile: Profile, scenario: Scenario, counts: Iterable[int]) -> list[PoolPoint]:
    """The figures of the same load per target, for each of `counts` targets on one speculator."""
    alone = simulate(profile, replace(scenario, num_targets=1))
    points = []
    for num_targets in counts:
        figures = alone if num_targets == 1 else simulate(profile, replace(scenario, num_targets=num_targets))
        share = figures.tokens_per_second / alone.tokens_per_second
        points.append(PoolPoint(num_targets=num_targets, figures=figures, share=share))
    return points


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSize:
    """How many speculators a number of targets needs."""

    num_speculators: int
    targets_each: int
    """Most targets on one speculator, with all speculators there."""
    tokens_per_second: float
    """Tokens per second of one sequence with all speculators there."""
    tokens_per_second_after_loss: float
    """The same with one speculator less, its targets spread over the others, or plain decoding if it was the only
    one."""


def smallest_pool(
    profile: Profile, scenario: Scenario, *, num_targets: int, slo_tokens_per_s: float
) -> PoolSize | None:
    """The smallest pool that gives every sequence the speed asked for; None if even one each does not."""
    speeds: dict[int, float] = {}

    def speed(targets_each: int) -> float:
        if targets_each not in speeds:
            speeds[targets_each] = simulate(profile, replace(scenario, num_targets=targets_each)).tokens_per_second
        return speeds[targets_each]

    for num_speculators in range(1, num_targets + 1):
        each = math.ceil(num_targets / num_speculators)
        if speed(each) >= slo_tokens_per_s:
            return PoolSize(
                num_speculators=num_speculators,
                targets_each=each,
                tokens_per_second=speed(each),
                tokens_per_second_after_loss=(
                    speed(math.ceil(num_targets / (num_speculators - 1)))
                    if num_speculators > 1
                    else simulate(profile, replace(scenario, mode="off", num_targets=1)).tokens_per_second
                ),
            )
    return None


def best_settings(
    profile: Profile, scenario: Scenario, *, lookaheads: Iterable[int], fan_outs: Iterable[int]
) -> tuple[Profile, Figures]:
    """The profile with the K and B of the fastest sequences, and its figures."""
    tried = [
        (candidate, simulate(candidate, scenario))
        for lookahead in lookaheads
        for fan_out in fan_outs
        for candidate in (replace(profile, lookahead=lookahead, fan_out=fan_out),)
    ]
    return max(tried, key=lambda pair: pair[1].tokens_per_second)
