"""Draft distributions from outside are used only if they are what they should be."""

from __future__ import annotations

import pytest
import torch

from specpool.algorithm.draft_distribution import DenseDistribution
from specpool.v1 import speculator_pb2
from specpool_target.verify.arrived_distributions import ArrivedDistributions, read_dense, read_distributions

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


def dense(body: torch.Tensor, rows=((), ()), tokens=tuple(DRAFT)):
    found = message([row or ([], []) for row in rows])
    del found.draft_tokens[:]
    found.draft_tokens.extend(tokens)
    return read_dense(found, body, vocab_size=8, device=torch.device("cpu"))


def body_of(dtype=torch.float16) -> torch.Tensor:
    return torch.tensor([[0.1, 0.4, 0.1, 0.2, 0.1, 0.1], [0.0, 0.25, 0.25, 0.0, 0.0, 0.5]]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense_distributions_are_normalised_and_padded(dtype) -> None:
    distribution = dense(body_of(dtype))
    assert distribution.probabilities.shape == (2, 8)
    torch.testing.assert_close(distribution.probabilities.sum(1), torch.ones(2))
    assert distribution.probabilities[:, 6:].sum() == 0
    assert distribution.probability_of(torch.tensor(DRAFT)).tolist() == pytest.approx([0.2, 0.5], abs=2e-3)


def test_sparse_rows_take_their_places_among_dense_ones() -> None:
    distribution = dense(body_of()[1:], rows=[([3, 7], [0.25, 0.75]), ()])
    assert distribution.probabilities[0].tolist() == [0, 0, 0, 0.25, 0, 0, 0, 0.75]
    assert distribution.probabilities[1, 5] == 0.5


@pytest.mark.parametrize("fault", ["nan", "negative", "sum", "own token", "beyond", "few tokens", "sparse row"])
def test_unsound_dense_distributions_are_not_used(fault) -> None:
    body, rows, tokens = body_of(), [(), ()], list(DRAFT)
    if fault == "nan":
        body[0, 0] = torch.nan
    elif fault == "negative":
        body[0, 0] = -0.1
    elif fault == "sum":
        body[1] *= 2
    elif fault == "own token":
        body[1, 5], body[1, 0] = 0.0, 0.5
    elif fault == "beyond":
        tokens[0] = 8
    elif fault == "few tokens":
        tokens = tokens[:1]
    else:
        rows[0], body = ([3], [0.5]), body[1:]
    assert dense(body, rows, tokens) is None


def test_arrived_distributions_are_of_exactly_these_tokens() -> None:
    distribution = DenseDistribution(torch.full((3, 8), 0.125))

    def read_arrived(tokens, found=distribution):
        return read_distributions(
            ArrivedDistributions((3, 5, 1), found), tokens, vocab_size=8, device=torch.device("cpu")
        )

    assert read_arrived([3, 5]).probabilities.shape == (2, 8)
    assert read_arrived([3, 6]) is None
    assert read_arrived([3, 5], None) is None
