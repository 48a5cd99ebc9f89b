"""Draft distributions from outside are used only if they are what they should be."""

from __future__ import annotations

import pytest
import torch

from specpool.v1 import speculator_pb2
from specpool_target.verifying import read_distributions

DRAFT = [3, 5]


def message(rows, tokens=DRAFT):
    return speculator_pb2.DraftDistributions(
        draft_tokens=tokens,
        distributions=[speculator_pb2.SparseDistribution(token_ids=i, probabilities=p) for i, p in rows],
    )


def read(found):
    return read_distributions(found, DRAFT, vocab_size=8, device=torch.device("cpu"))


def test_sound_distributions_are_read():
    distribution = read(message([([3, 1], [0.25, 0.75]), ([5], [1.0])]))
    assert distribution is not None
    assert distribution.probability_of(torch.tensor(DRAFT)).tolist() == [0.25, 1.0]


@pytest.mark.parametrize(
    "found",
    [
        None,
        message([([3], [1.0])]),
        message([([3], [1.0]), ([5], [1.0])], tokens=[3, 6]),
        message([([3], [0.5]), ([5], [1.0])]),
        message([([3, 4], [0.0, 1.0]), ([5], [1.0])]),
        message([([4], [1.0]), ([5], [1.0])]),
        message([([3, 3], [0.5, 0.5]), ([5], [1.0])]),
        message([([3, 8], [0.5, 0.5]), ([5], [1.0])]),
        message([([3], [float("nan")]), ([5], [1.0])]),
        message([([3, 1], [1.5, -0.5]), ([5], [1.0])]),
        message([([], []), ([5], [1.0])]),
    ],
)
def test_anything_else_is_not(found):
    assert read(found) is None
