"""What the draft drafts and guesses, and the Saguaro distribution it samples from."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from specpool.algorithm.draft_distribution import DenseDistribution
from specpool.algorithm.draft_ranks import draft_ranks
from specpool.algorithm.noise import gumbel
from specpool.algorithm.saguaro import saguaro_scores
from specpool.algorithm.verification import VerificationMode, verify_coupled

SCORES = torch.tensor([[3.0, 1.0, 2.0, 0.0, -torch.inf]])
POSITIONS = torch.tensor([8])


def _saguaro(scores: torch.Tensor, fan_out: int, constant: float) -> torch.Tensor:
    return saguaro_scores(scores, fan_out, constant).softmax(dim=1)


def test_greedy_ranks_are_the_most_likely_tokens() -> None:
    ranks = draft_ranks(SCORES, VerificationMode.GREEDY, 3)
    assert ranks.token_ids.tolist() == ranks.bonus_ids.tolist() == [[0, 2, 1]]
    assert ranks.distribution is None


def test_excluded_tokens_are_never_guessed() -> None:
    for mode in VerificationMode:
        ranks = draft_ranks(SCORES, mode, 7, seed=1, positions=POSITIONS)
        assert sorted(ranks.token_ids[0].tolist()) == [-1, -1, -1, 0, 1, 2, 3]
        assert sorted(ranks.bonus_ids[0].tolist()) == [-1, -1, -1, 0, 1, 2, 3]


def test_coupled_ranks_are_the_order_of_scores_plus_the_targets_noise() -> None:
    noisy = SCORES[:, :4].double() + gumbel(5, POSITIONS, 4)
    ranks = draft_ranks(SCORES, VerificationMode.COUPLED, 4, seed=5, positions=POSITIONS)
    assert ranks.token_ids.equal(noisy.argsort(dim=1, descending=True))


def test_a_coupled_draft_equal_to_the_target_is_always_accepted() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 100, generator=generator)
    drafted = draft_ranks(scores, VerificationMode.COUPLED, 1, seed=5, positions=torch.arange(200))
    tokens = drafted.token_ids[:199, 0].tolist()
    assert verify_coupled(scores, tokens, seed=5, position=0).num_accepted == 199


@pytest.mark.parametrize("constant", [0.0, 0.5, 1.0])
def test_rejection_samples_from_the_distribution_it_reports(constant: float) -> None:
    num_samples = 50_000
    ranks = draft_ranks(
        SCORES.expand(num_samples, -1),
        VerificationMode.REJECTION,
        3,
        seed=torch.arange(num_samples),
        positions=torch.full((num_samples,), 8),
        saguaro_fan_out=2,
        saguaro_constant=constant,
        num_kept=4,
    )
    assert ranks.distribution is not None
    expected = _saguaro(SCORES[:, :4], 2, constant)[0].double()
    reported = torch.zeros(5).scatter(0, ranks.distribution.token_ids[0], ranks.distribution.probabilities[0])
    torch.testing.assert_close(reported[:4].double(), expected)
    counts = torch.bincount(ranks.token_ids[:, 0], minlength=5)
    possible = expected > 0
    assert counts[4] == 0
    assert not counts[:4][~possible].any()
    expected_counts = expected[possible] / expected[possible].sum() * num_samples
    assert chisquare(counts[:4][possible].numpy(), expected_counts.numpy()).pvalue > 1e-3


def test_rejection_guesses_leave_out_the_drafted_token_and_bonus_guesses_do_not() -> None:
    for seed in range(50):
        ranks = draft_ranks(SCORES, VerificationMode.REJECTION, 3, seed=seed, positions=POSITIONS)
        drafted, *guesses = ranks.token_ids[0].tolist()
        assert guesses == [token for token in (0, 2, 1, 3) if token != drafted][:2]
        assert ranks.bonus_ids[0].tolist() == [0, 2, 1]


def test_sampling_modes_need_positions() -> None:
    with pytest.raises(ValueError, match="coupled drafting needs positions"):
        draft_ranks(SCORES, VerificationMode.COUPLED, 1)


def test_saguaro_scales_the_top_tokens_only() -> None:
    weights = SCORES[0].exp()
    expected = weights * torch.tensor([0.25, 1, 0.25, 1, 1])
    torch.testing.assert_close(_saguaro(SCORES, 2, 0.25)[0], expected / expected.sum())


def test_saguaro_without_effect_is_softmax() -> None:
    for fan_out, constant in ((2, 1.0), (0, 0.3)):
        assert _saguaro(SCORES, fan_out, constant).equal(SCORES.softmax(1))


def test_saguaro_at_zero_never_leaves_a_row_empty() -> None:
    assert _saguaro(SCORES, 4, 0.0).equal(SCORES.softmax(1))
    assert _saguaro(SCORES, 9, 0.0).equal(SCORES.softmax(1))


@pytest.mark.parametrize("constant", [-0.1, 1.1, float("nan")])
def test_saguaro_refuses_other_constants(constant: float) -> None:
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        _saguaro(SCORES, 2, constant)


def test_a_smaller_constant_moves_the_residual_onto_the_guesses() -> None:
    generator = torch.Generator().manual_seed(4)
    draft = torch.randn(300, 40, generator=generator) * 2
    target = (draft + torch.randn(300, 40, generator=generator)).softmax(1)
    top = draft.topk(3, dim=1).indices

    def share_on_guesses(constant: float) -> float:
        residual = (target - _saguaro(draft, 3, constant)).clamp(min=0)
        return float((residual.gather(1, top).sum(1) / residual.sum(1)).mean())

    assert share_on_guesses(0.0) > share_on_guesses(0.5) > share_on_guesses(1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense_rejection_samples_from_the_rounded_distribution(dtype: torch.dtype) -> None:
    """Coarse steps of the type shift the frequencies by more than chance; the reported distribution has them."""
    num = 40_000
    scores = torch.tensor([[0.0, -1.0, -2.0, -7.0]]).expand(num, -1)
    ranks = draft_ranks(
        scores, VerificationMode.REJECTION, 2, positions=torch.arange(num), saguaro_fan_out=1, saguaro_constant=0.5,
        dense_dtype=dtype,
    )  # fmt: skip
    assert isinstance(ranks.distribution, DenseDistribution)
    assert ranks.distribution.probabilities.dtype is dtype
    exact = DenseDistribution.from_rounded(ranks.distribution.probabilities).probabilities[0]
    assert exact.dtype is torch.float32
    torch.testing.assert_close(exact.sum(), torch.tensor(1.0))
    frequencies = torch.bincount(ranks.token_ids[:, 0], minlength=4) / num
    torch.testing.assert_close(frequencies, exact, atol=0.01, rtol=0)
