"""What the script makes of ranks and scores."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def draft_quality():
    path = str(Path(__file__).parents[2] / "bench")
    sys.path.insert(0, path)
    import draft_quality

    yield draft_quality
    sys.path.remove(path)


def test_finds_what_the_draft_was_made_to_be(draft_quality):
    """Sure in half of the places and right in 0.95 of these, else in 0.55; 0.5 / F of the others are not the next F."""
    rng = random.Random(1)
    scores, ranks = [], []
    for _ in range(6000):
        right = rng.choice([0.95, 0.55])
        within = [0.5, *(0.5 / i - 0.5 / (i + 1) for i in range(1, draft_quality.NUM_RANKS - 1))]
        others = [(1 - right) * share for share in within]
        scores.append([math.log(p) for p in (right, *others)])
        rank = 0 if rng.random() < right else min(int(0.5 / (1 - rng.random())) + 1, 1000)
        ranks.append(rank if rank < draft_quality.NUM_RANKS else None)
    found = draft_quality.quality(scores, ranks)
    assert found.acceptance == pytest.approx(0.75, abs=0.02)
    assert found.confidence_spread == pytest.approx(0.04 / (0.75 * 0.25), abs=0.03)
    assert found.miss_constant == pytest.approx(0.5, abs=0.05)
    assert found.miss_exponent == pytest.approx(1.0, abs=0.1)
