"""Targets and one speculator in virtual time.

The speculator is the real one: draft trees, calibration-free ranking, row scheduling and tables of
`specpool_speculator`; so are the targets' speculation cache and what decides whether they wait after
a miss. Forwards take the profile's times, messages half a round trip.
"""

from __future__ import annotations

import gc
import math

from specpool.algorithm.speculation_cache import LookupKind
from specpool_tools.planning.clock import Clock
from specpool_tools.planning.profile import Profile
from specpool_tools.planning.scenario import Figures, Scenario
from specpool_tools.planning.simulated_speculator import SimulatedSpeculator
from specpool_tools.planning.simulated_target import SimulatedTarget
from specpool_tools.planning.text import SimulatedText

_WARM_UP_SHARE = 0.2
"""Share of the simulated time, at its beginning, that is left out of the figures."""


class Simulation:
    """Targets, their speculator, and a clock."""

    def __init__(self, profile: Profile, scenario: Scenario) -> None:
        self.scenario = scenario
        self.clock = Clock()
        text = SimulatedText(profile, scenario.seed)
        self.speculator = SimulatedSpeculator(self.clock, profile, text)
        self.targets = [
            SimulatedTarget(self.clock, profile, scenario, text, self.speculator, index)
            for index in range(scenario.num_targets)
        ]

    def run(self) -> Figures:
        """Run everything from the prefill on."""
        warm_up_s = self.scenario.seconds * _WARM_UP_SHARE
        for target in self.targets:
            self.clock.after(0.0, target.start)
        is_warm = False
        for action in self.clock.until(self.scenario.seconds):
            if not is_warm and self.clock.now_s >= warm_up_s:
                is_warm = True
                self.speculator.reset()
                for target in self.targets:
                    target.reset()
            action()
        return self._figures(self.scenario.seconds - warm_up_s)

    def _figures(self, seconds: float) -> Figures:
        sequences = [sequence for target in self.targets for sequence in target.sequences]
        rounds = max(1, sum(sequence.num_rounds for sequence in sequences))
        tokens = sum(sequence.num_tokens for sequence in sequences)
        lookups = max(1, sum(sum(sequence.lookups.values()) for sequence in sequences))
        full = sum(sequence.lookups.get(LookupKind.HIT, 0) for sequence in sequences)
        partial = sum(sequence.lookups.get(LookupKind.PARTIAL, 0) for sequence in sequences)
        waits = sum(sequence.num_waits for sequence in sequences)
        return Figures(
            tokens_per_second=tokens / seconds / len(sequences),
            relative_error=_relative_error(rounds, tokens, sum(sequence.sum_of_squares for sequence in sequences)),
            tokens_per_round=tokens / rounds,
            hit_rate=(full + partial) / lookups,
            full_hit_rate=full / lookups,
            wait_rate=waits / max(1, lookups - full - partial),
            rows_per_step=self.speculator.num_rows / max(1, self.speculator.num_steps),
            utilisation=min(1.0, self.speculator.busy_s / seconds),
        )


def _relative_error(num_rounds: int, num_tokens: int, sum_of_squares: int) -> float:
    """Standard error of the mean tokens of a round over that mean."""
    mean = num_tokens / num_rounds
    variance = max(0.0, sum_of_squares / num_rounds - mean**2)
    return math.sqrt(variance / num_rounds) / mean if mean else 0.0


def simulate(profile: Profile, scenario: Scenario) -> Figures:
    """Simulate one scenario; returns its figures."""
    gc.freeze()  # what was there before is not looked through again and again: a quarter of the time
    try:
        return Simulation(profile, scenario).run()
    finally:
        gc.unfreeze()
