"""The arithmetic of the comparison of weights, and how it reads llama-perplexity's files."""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def weight_quality():
    path = str(Path(__file__).parents[2] / "bench")
    sys.path.insert(0, path)
    import weight_quality

    yield weight_quality
    sys.path.remove(path)


def test_a_model_is_like_itself(weight_quality):
    scores = [torch.randn(5, 7).log_softmax(-1) for _ in range(2)]
    found = weight_quality.quality(iter(scores), scores, [torch.arange(5)] * 2)
    assert found.same_first == 1.0
    assert found.divergence == pytest.approx(0.0, abs=1e-7)


def test_perplexity_agreement_and_divergence_by_hand(weight_quality):
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]]).log()
    other = torch.tensor([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]]).log()
    found = weight_quality.quality(iter([other]), [reference], [torch.tensor([0, 1])])
    assert found.perplexity == pytest.approx(math.sqrt(4 * 2))
    assert found.same_first == 0.5
    parts = (0.25 * math.log(2), 0.75 * math.log(1.5) - 0.25 * math.log(2))
    assert found.divergence == pytest.approx(sum(parts) / 2, rel=1e-5)
    assert found.divergence_error == pytest.approx(abs(parts[0] - parts[1]) / 2, rel=1e-4)


def test_reads_what_llama_perplexity_writes(weight_quality, tmp_path):
    chunks = [[4, 1, 2, 3], [0, 4, 4, 1]]  # a vocabulary of five, one place of each chunk scored
    path = tmp_path / "scores"
    head = b"_logits_" + struct.pack("<3i", 4, 5, 2) + struct.pack("<8i", *chunks[0], *chunks[1])
    places = [struct.pack("<2f6H", 0.5, -9.0, *(10, 0, 3, 4, i, 999)) for i in range(2)]
    path.write_bytes(head + b"".join(places))
    first, second = weight_quality.read_scores(path, chunks)
    assert first.tolist() == [[-4.0, -9.0, -7.5, -7.0, -9.0]]
    assert second.tolist() == [[-4.0, -9.0, -7.5, -7.0, -8.5]]
    with pytest.raises(ValueError, match="other tokens"):
        next(weight_quality.read_scores(path, [[4, 1, 2, 3], [0, 4, 4, 2]]))


def test_scored_are_the_second_halves(weight_quality):
    assert weight_quality.scored(range(512)) == 256


def test_the_text_has_code_and_prose(weight_quality):
    words = weight_quality.text(3000)
    assert len(words) == 4 * 3000 + 3
    assert "def " in words
    assert "Speculative" in words
