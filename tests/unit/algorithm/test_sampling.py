"""Validation messages, penalties, masks and log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from specpool.algorithm.sampling import SamplingParams, process_logits, token_logprobs
from specpool.errors import InvalidArgument

NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -1}, "temperature must be between 0 and 100, got -1"),
        ({"temperature": NAN}, "temperature must be between 0 and 100, got nan"),
        ({"top_p": 0.0}, "top_p must be a number above 0 and at most 1, got 0.0"),
        ({"top_p": NAN}, "top_p must be a number above 0 and at most 1, got nan"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"min_p": 1.5}, "min_p must be between 0 and 1, got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0 and at most 100, got 0"),
        ({"presence_penalty": 2.5}, "presence_penalty must be between -2 and 2, got 2.5"),
        ({"frequency_penalty": -3}, "frequency_penalty must be between -2 and 2, got -3"),
        ({"logit_bias": {7: NAN}}, "logit_bias[7] must be between -100 and 100, got nan"),
        ({"logit_bias": {7: math.inf}}, "logit_bias[7] must be between -100 and 100, got inf"),
        ({"logit_bias": {100: 1.0}}, "logit_bias must be token ids from 0 to 99, got 100"),
        ({"stop_token_ids": (3, -4)}, "stop_token_ids must be token ids from 0 to 99, got -4"),
        ({"stop": ("a", "")}, "stop must be non-empty strings, got ''"),
        ({"seed": 2**64}, f"seed must be a 64-bit integer, got {2**64}"),
        ({"num_logprobs": 21}, "num_logprobs must be between 0 and 20, got 21"),
    ],
    ids=str,
)
def test_a_bad_value_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(**changes).validate(vocab_size=100)  # type: ignore[arg-type]
    assert str(caught.value) == message
    assert caught.value.metadata["field"] == message.split(" must")[0]
    assert set(caught.value.metadata) == {"field", "value", "accepted"}


def test_the_edges_are_accepted() -> None:
    SamplingParams().validate(100)
    SamplingParams(
        temperature=0, top_p=1e-6, min_p=1, logit_bias={0: -100, 99: 100}, seed=-(2**63), num_logprobs=0
    ).validate(100)


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [2.0, 1.0, 0.0, -1.0]])


def test_nothing_set_costs_nothing() -> None:
    assert process_logits(LOGITS, SamplingParams()) is LOGITS
    assert process_logits(LOGITS, SamplingParams(temperature=0, top_p=0.5, top_k=1)) is LOGITS
    assert not SamplingParams(temperature=0.5).changes_logits
    assert SamplingParams(top_p=0.5).changes_logits


@pytest.mark.parametrize("temperature", [1e-9, 1e-6, 9.99e-4])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=2)
    params.validate(vocab_size=4)
    assert params == SamplingParams(temperature=0, top_k=2)
    assert params.is_greedy
    assert not SamplingParams(temperature=1e-3).is_greedy


def test_temperature_divides() -> None:
    assert process_logits(LOGITS, SamplingParams(temperature=0.5)).equal(LOGITS * 2)


def test_the_draft_prefix_counts_towards_penalties() -> None:
    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    scores = process_logits(LOGITS, params, prompt_tokens=[3], output_tokens=[0, 0], draft_tokens=[1])
    assert scores.tolist() == [[1.0, 1.0, 0.0, -1.0], [1.0, 0.25, 0.0, -1.0]]


def test_branches_bring_their_own_suffixes() -> None:
    params = SamplingParams(temperature=0, frequency_penalty=1)
    scores = process_logits(LOGITS, params, output_tokens=[2], row_suffixes=[[3, 3], [0]])
    assert scores.tolist() == [[2.0, 1.0, -1.0, -3.0], [1.0, 1.0, -1.0, -1.0]]


def test_repetition_penalty_covers_prompt_and_output() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=2)
    scores = process_logits(LOGITS, params, prompt_tokens=[3], output_tokens=[], draft_tokens=[0])
    assert scores.tolist() == [[2.0, 1.0, 0.0, -2.0], [1.0, 1.0, 0.0, -2.0]]


def test_verifying_a_draft_equals_decoding_step_by_step() -> None:
    params = SamplingParams(
        temperature=0.8,
        top_p=0.9,
        top_k=20,
        min_p=0.01,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        logit_bias={4: 3.0},
    )
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(1)) * 3
    prompt, output, draft = [1, 2, 3], [4, 5, 4], [6, 6, 7]
    together = process_logits(logits, params, prompt_tokens=prompt, output_tokens=output, draft_tokens=draft)
    for row in range(4):
        alone = process_logits(logits[row : row + 1], params, prompt_tokens=prompt, output_tokens=output + draft[:row])
        assert alone[0].equal(together[row])


def test_the_input_is_never_changed() -> None:
    logits = LOGITS.clone()
    params = SamplingParams(temperature=0.7, top_p=0.5, logit_bias={1: 2.0}, presence_penalty=1)
    process_logits(logits, params, output_tokens=[0])
    assert logits.equal(LOGITS)


def kept(params: SamplingParams, logits: torch.Tensor = LOGITS) -> list[int]:
    return (process_logits(logits, params)[0] > -torch.inf).nonzero()[:, 0].tolist()


def test_masks() -> None:
    # softmax of 2, 1, 0, -1 is .644, .237, .087, .032
    assert kept(SamplingParams(top_k=2)) == [0, 1]
    assert kept(SamplingParams(top_k=9)) == [0, 1, 2, 3]
    assert kept(SamplingParams(top_p=0.64)) == [0]
    assert kept(SamplingParams(top_p=0.65)) == [0, 1]
    assert kept(SamplingParams(top_p=0.9)) == [0, 1, 2]
    assert kept(SamplingParams(min_p=0.3)) == [0, 1]
    assert kept(SamplingParams(min_p=1.0)) == [0]
    # top-p looks at what top-k left: .731, .269
    assert kept(SamplingParams(top_k=2, top_p=0.72)) == [0]


def test_ties_stay_together() -> None:
    assert kept(SamplingParams(top_k=1), torch.tensor([[1.0, 1.0, 0.0]])) == [0, 1]


@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_the_short_nucleus_search_equals_the_full_sort(spread: float) -> None:
    logits = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(2)) * spread
    best = logits.sort(dim=1, descending=True).values
    before = best.softmax(1).double().cumsum(1) - best.softmax(1)
    scores = process_logits(logits, SamplingParams(top_p=0.9))
    for row in range(3):
        expected = int((before[row] < 0.9).sum())
        assert abs(int((scores[row] > -torch.inf).sum()) - expected) <= 1  # rounding of the sums


def test_bias_can_forbid_and_force() -> None:
    params = SamplingParams(temperature=0, logit_bias={0: -100, 3: 100})
    assert process_logits(LOGITS, params).argmax(1).tolist() == [3, 3]


def test_logprobs_are_of_the_raw_model() -> None:
    result = token_logprobs(LOGITS, torch.tensor([1, 3]), 2)
    expected = LOGITS.log_softmax(1)
    torch.testing.assert_close(result.chosen, torch.stack((expected[0, 1], expected[1, 3])))
    assert result.top_token_ids.tolist() == [[0, 1], [0, 1]]
    torch.testing.assert_close(result.top_logprobs, expected[:, :2])
