"""The tuner of the Saguaro constant."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from specpool.algorithm.saguaro_tuning import SaguaroTuner


def _run(tuner: SaguaroTuner, mean_tokens: Callable[[float], float], num_rounds: int, seed: int = 0) -> float:
    """Share of the last rounds that were drafted with the best constant's neighbourhood; noise as in real rounds."""
    rng = random.Random(seed)
    used = []
    for _ in range(num_rounds):
        used.append(tuner.constant)
        tuner.observe(max(1, round(rng.gauss(mean_tokens(tuner.constant), 1.0))), 0.1)
    return sum(used[-500:]) / 500


@pytest.mark.parametrize("peak", [0.0, 0.4, 1.0])
def test_finds_the_fastest_constant(peak: float) -> None:
    tuner = SaguaroTuner()
    mean = _run(tuner, lambda c: 4.0 - 3.0 * abs(c - peak), 4000)
    assert tuner.best == pytest.approx(peak, abs=0.21)
    assert mean == pytest.approx(peak, abs=0.25)


def test_follows_a_change() -> None:
    tuner = SaguaroTuner()
    _run(tuner, lambda c: 2.0 + 2.0 * c, 2000)
    assert tuner.best >= 0.8
    _run(tuner, lambda c: 4.0 - 2.0 * c, 6000, seed=1)
    assert tuner.best <= 0.4


def test_starts_without_saguaro_and_stays_within_the_given_constants() -> None:
    tuner = SaguaroTuner([0.5])
    assert SaguaroTuner().constant == 1.0
    _run(tuner, lambda c: 3.0, 500)
    assert tuner.constant == 0.5
    with pytest.raises(ValueError, match="between 0 and 1"):
        SaguaroTuner([1.5])
    with pytest.raises(ValueError, match="at least one"):
        SaguaroTuner([])
