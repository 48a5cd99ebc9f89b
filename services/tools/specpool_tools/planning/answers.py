"""What a simulation is asked: acceptance behind a measured speed, targets per speculator, K, the cost of a loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from specpool.errors import InvalidArgument
from specpool_tools.planning.profile import Profile
from specpool_tools.planning.scenario import Figures, Scenario
from specpool_tools.planning.simulator import simulate

MAX_FITS = 14
"""Most simulations of a fit."""
_CLOSE = 2e-4
"""Distance of a fit's speed from the one asked for, relative to it, that is not worth another simulation."""
_LEAST_SHARE = 1 / 8
"""Least share of a scenario's time for which several targets are simulated: their estimates have to settle."""
Simulate = Callable[[Profile, Scenario], Figures]


def for_targets(scenario: Scenario, num_targets: int) -> Scenario:
    """The scenario with so many targets, for less time: together they have as many rounds as one has alone."""
    share = max(1 / num_targets, _LEAST_SHARE)
    return replace(scenario, num_targets=num_targets, seconds=scenario.seconds * share)


def fit_acceptance(
    profile: Profile, scenario: Scenario, tokens_per_second: float, simulate: Simulate = simulate
) -> Profile:
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
    # Where a line through both ends meets the speed, and in the middle now and then, so that it never gets stuck.
    ends, middle = (slowest, fastest), low
    for count in range(MAX_FITS - 2):
        share = (tokens_per_second - ends[0]) / max(ends[1] - ends[0], 1e-9) if count % 3 else 0.5
        middle = low + (high - low) * share
        found = speed(middle)
        if abs(found - tokens_per_second) < _CLOSE * tokens_per_second:
            break
        if found < tokens_per_second:
            low, ends = middle, (found, ends[1])
        else:
            high, ends = middle, (ends[0], found)
    return replace(profile, acceptance=middle)


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolPoint:
    """What targets get that share one speculator."""

    num_targets: int
    figures: Figures
    share: float
    """Speed of a sequence over its speed with a speculator for one target."""


def targets_per_speculator(
    profile: Profile, scenario: Scenario, counts: Iterable[int], simulate: Simulate = simulate
) -> list[PoolPoint]:
    """The figures of the same load per target, for each of `counts` targets on one speculator."""
    alone = simulate(profile, for_targets(scenario, 1))
    points = []
    for num_targets in counts:
        figures = alone if num_targets == 1 else simulate(profile, for_targets(scenario, num_targets))
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
    profile: Profile,
    scenario: Scenario,
    *,
    num_targets: int,
    slo_tokens_per_s: float,
    simulate: Simulate = simulate,
) -> PoolSize | None:
    """The smallest pool that gives every sequence the speed asked for; None if even one each does not.

    The fewer targets share a speculator, the faster they are: so it is found by halving.
    """

    @functools.cache
    def speed(targets_each: int) -> float:
        return simulate(profile, for_targets(scenario, targets_each)).tokens_per_second

    def each(num_speculators: int) -> int:
        return math.ceil(num_targets / num_speculators)

    if speed(1) < slo_tokens_per_s:
        return None
    too_few, enough = 0, num_targets
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if speed(each(middle)) >= slo_tokens_per_s:
            enough = middle
        else:
            too_few = middle
    alone = simulate(profile, replace(for_targets(scenario, 1), mode="off")).tokens_per_second
    return PoolSize(
        num_speculators=enough,
        targets_each=each(enough),
        tokens_per_second=speed(each(enough)),
        tokens_per_second_after_loss=speed(each(enough - 1)) if enough > 1 else alone,
    )


def best_settings(
    profile: Profile,
    scenario: Scenario,
    *,
    lookaheads: Iterable[int],
    fan_outs: Iterable[int],
    simulate: Simulate = simulate,
) -> tuple[Profile, Figures]:
    """The profile with the K and B of the fastest sequences, and its figures."""
    tried = [
        (candidate, simulate(candidate, scenario))
        for lookahead in lookaheads
        for fan_out in fan_outs
        for candidate in (replace(profile, lookahead=lookahead, fan_out=fan_out),)
    ]
    return max(tried, key=lambda pair: pair[1].tokens_per_second)
