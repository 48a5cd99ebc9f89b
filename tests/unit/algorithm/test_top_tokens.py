"""The likeliest tokens, found by blocks, are those that a full sort finds."""

from __future__ import annotations

import pytest
import torch

from specpool.algorithm.top_tokens import top_tokens


@pytest.mark.parametrize("vocab_size", [5, 300, 4096, 5000, 151936])
@pytest.mark.parametrize("k", [1, 5, 12])
def test_equals_topk(vocab_size: int, k: int) -> None:
    k = min(k, vocab_size)
    scores = torch.randn(3, vocab_size + 7, generator=torch.Generator().manual_seed(k))[:, :vocab_size]
    values, tokens = top_tokens(scores, k)
    expected = scores.topk(k, dim=1)
    assert values.equal(expected.values)
    assert tokens.equal(expected.indices)


@pytest.mark.parametrize("vocab_size", [4992, 5000])
def test_excluded_tokens_come_last_and_are_tokens(vocab_size: int) -> None:
    scores = torch.full((2, vocab_size), -torch.inf)
    scores[0, -1], scores[1, 3], scores[1, 70] = 1.0, 2.0, 3.0
    values, tokens = top_tokens(scores, 12)
    assert values[:, :3].tolist() == [[1.0, -torch.inf, -torch.inf], [3.0, 2.0, -torch.inf]]
    assert (tokens[0, 0], *tokens[1, :2]) == (vocab_size - 1, 70, 3)
    for row in tokens.tolist():
        assert len(set(row)) == 12
        assert max(row) < vocab_size


def test_equal_scores_are_taken_once_each() -> None:
    _, tokens = top_tokens(torch.zeros(1, 5000), 12)
    assert len(set(tokens[0].tolist())) == 12
