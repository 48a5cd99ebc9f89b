"""Calibrated probabilities of the draft's ranks."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from specpool.algorithm.calibration import RankCalibration


def _learn(calibration: RankCalibration, *, slope: float, lift: float, outside: float, num: int = 4000) -> None:
    """Outcomes drawn from the model that the calibration is to find."""
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(num, 6, generator=generator) * 2).sort(dim=1, descending=True).values
    features = slope * scores
    features[:, 0] += lift
    ranks = torch.multinomial(features.softmax(dim=1), 1, generator=generator)[:, 0]
    ranks[torch.rand(num, generator=generator) < outside] = -1
    for row, rank in zip(scores.tolist(), ranks.tolist(), strict=True):
        calibration.observe(row, rank if rank >= 0 else None)


@pytest.mark.parametrize(("slope", "lift", "outside"), [(1.0, 0.0, 0.0), (0.5, 1.0, 0.1), (1.5, -0.5, 0.3)])
def test_learns_what_made_the_outcomes(slope: float, lift: float, outside: float) -> None:
    calibration = RankCalibration()
    _learn(calibration, slope=slope, lift=lift, outside=outside)
    assert calibration.slope == pytest.approx(slope, rel=0.2)
    assert calibration.lift == pytest.approx(lift, abs=0.3)
    assert calibration.outside == pytest.approx(outside, abs=0.06)


def test_probabilities_follow_scores_and_leave_room_for_other_tokens() -> None:
    calibration = RankCalibration()
    probabilities = calibration.probabilities([2.0, 1.0, -3.0])
    assert list(probabilities) == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1 - calibration.outside)
    assert probabilities[0] / probabilities[1] == pytest.approx(math.e)
    assert calibration.probabilities([]) == ()


def test_confidence_spreads_between_equally_sure_and_knowing() -> None:
    assert RankCalibration().confidence_spread == 0
    equally_sure, knowing = RankCalibration(), RankCalibration()
    for n in range(2000):
        equally_sure.observe([1.0, 0.0], int(n % 4 == 0))
        knowing.observe([8.0, 0.0] if n % 4 else [0.1, 0.0], int(n % 4 == 0))
    assert equally_sure.confidence_spread < 0.05
    assert knowing.confidence_spread > 0.8


def test_survives_extreme_outcomes() -> None:
    calibration = RankCalibration()
    for _ in range(200):
        calibration.observe([100.0, -100.0], 1)
        calibration.observe([5.0], 0)
        calibration.observe([], None)
    assert all(math.isfinite(p) and 0 <= p <= 1 for p in calibration.probabilities([100.0, -100.0]))


def test_follows_a_draft_that_changes() -> None:
    calibration = RankCalibration(decay=0.99)
    _learn(calibration, slope=1.5, lift=1.0, outside=0.0, num=1500)
    sure = calibration.probabilities([3.0, 2.0, 1.0])[0]
    _learn(calibration, slope=0.3, lift=-1.0, outside=0.2, num=1500)
    assert calibration.probabilities([3.0, 2.0, 1.0])[0] < sure - 0.3


def test_many_rows_at_once_have_the_probabilities_of_each() -> None:
    calibration, draw = RankCalibration(), random.Random(3)
    for _ in range(40):
        calibration.observe(sorted((draw.gauss(0, 3) for _ in range(5)), reverse=True), draw.choice([0, 0, 1, None]))
    rows = [sorted((draw.gauss(0, 3) for _ in range(length)), reverse=True) for length in (5, 3, 1, 5, 0)]
    padded = np.array([row + [-math.inf] * (5 - len(row)) for row in rows])
    for row, found in zip(rows, calibration.of_rows(padded), strict=True):
        assert found.tolist() == pytest.approx([*calibration.probabilities(row), *[0.0] * (5 - len(row))])
