"""Simulations on demand: each scenario once, with somebody told how far they are."""

from __future__ import annotations

from specpool_engine.modeling.files import Progress
from specpool_tools.planning.profile import Profile
from specpool_tools.planning.scenario import Figures, Scenario
from specpool_tools.planning.simulator import simulate


class Simulations:
    """Simulates scenarios; one that was simulated before is answered from memory."""

    def __init__(self, on_progress: Progress) -> None:
        self._on_progress = on_progress
        self._known: dict[tuple[Profile, Scenario], Figures] = {}
        self._stage, self._num_done, self._num_expected = "", 0, 0

    def begin(self, stage: str, num_expected: int) -> None:
        """Begin a stage of about so many scenarios."""
        self._stage, self._num_done, self._num_expected = stage, 0, num_expected
        self._on_progress(stage, 0, num_expected)

    def end(self) -> None:
        """End the stage, perhaps before all that was expected."""
        self._on_progress(self._stage, self._num_expected, self._num_expected)

    def __call__(self, profile: Profile, scenario: Scenario) -> Figures:
        """The figures of a scenario."""
        key = (profile, scenario)
        if key not in self._known:
            self._known[key] = simulate(profile, scenario)
        self._num_done = min(self._num_done + 1, self._num_expected - 1)
        self._on_progress(self._stage, max(0, self._num_done), self._num_expected)
        return self._known[key]
