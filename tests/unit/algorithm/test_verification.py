"""Verification of single sequences and ragged batches: exact cases, without statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specpool.algorithm.draft_distribution import DenseDistribution, DraftDistribution, SparseDistribution
from specpool.algorithm.noise import gumbel_argmax
from specpool.algorithm.verification import (
    VerificationMode,
    VerificationOutcome,
    verify,
    verify_coupled,
    verify_coupled_batch,
    verify_greedy,
    verify_greedy_batch,
    verify_rejection,
    verify_rejection_batch,
    verify_sample_and_match,
)

VOCAB_SIZE = 50


def scores_of(*best: int) -> Tensor:
    """Rows whose most likely tokens are ``best``."""
    return torch.nn.functional.one_hot(torch.tensor(best), VOCAB_SIZE).float()


def random_scores(num_rows: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize(
    ("draft", "expected"),
    [
        ((), (0, 5)),
        ((5,), (1, 6)),
        ((4,), (0, 5)),
        ((5, 6, 7), (3, 8)),
        ((5, 6, 9), (2, 7)),
        ((9, 6, 7), (0, 5)),
    ],
)
def test_greedy_accepts_the_leading_matches(draft: tuple[int, ...], expected: tuple[int, int]) -> None:
    outcome = verify_greedy(scores_of(5, 6, 7, 8)[: len(draft) + 1], draft)
    assert outcome == VerificationOutcome(*expected)
    assert outcome.committed(draft) == [5, 6, 7, 8][: expected[0] + 1]


def test_greedy_breaks_ties_like_plain_decoding() -> None:
    scores = torch.zeros(2, VOCAB_SIZE)
    assert verify_greedy(scores, [int(scores[0].argmax())]) == VerificationOutcome(1, int(scores[1].argmax()))


@pytest.mark.parametrize("verifier", [verify_coupled, verify_sample_and_match])
def test_matching_commits_the_targets_own_sample_whatever_the_draft(verifier: object) -> None:
    scores = random_scores(5)
    alone = [
        verifier(scores[i : i + 1], [], seed=3, position=20 + i).bonus_token  # type: ignore[operator]
        for i in range(5)
    ]
    for wrong_at in range(5):
        draft = [*alone[:wrong_at], (alone[wrong_at] + 1) % VOCAB_SIZE, *alone[wrong_at + 1 :]][:4]
        outcome = verifier(scores, draft, seed=3, position=20)  # type: ignore[operator]
        assert outcome.committed(draft) == alone[: wrong_at + 1]


def test_coupled_is_the_gumbel_argmax() -> None:
    scores = random_scores(1)
    expected = gumbel_argmax(scores, 7, torch.tensor([33]))
    assert verify_coupled(scores, [], seed=7, position=33).bonus_token == int(expected)


def sparse(num_draft: int, seed: int = 1) -> tuple[SparseDistribution, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(VOCAB_SIZE, generator=generator)[:6] for _ in range(num_draft)])
    probabilities = torch.rand(num_draft, 6, generator=generator)
    return SparseDistribution(ids, probabilities / probabilities.sum(1, keepdim=True)), ids[:, 0].clone()


def densified(draft: SparseDistribution) -> DenseDistribution:
    full = torch.zeros(len(draft.token_ids), VOCAB_SIZE)
    return DenseDistribution(full.scatter(1, draft.token_ids, draft.probabilities))


def test_sparse_and_dense_distributions_verify_alike() -> None:
    draft, tokens = sparse(4)
    for seed in range(200):
        arguments = {"seed": seed, "position": 9}
        one = verify_rejection(random_scores(5, seed), tokens.tolist(), draft, **arguments)
        other = verify_rejection(random_scores(5, seed), tokens.tolist(), densified(draft), **arguments)
        assert one == other


def test_rejection_accepts_everything_when_draft_and_target_agree() -> None:
    scores = random_scores(4)
    draft = DenseDistribution(scores[:3].softmax(1))
    tokens = draft.probabilities.argmax(1).tolist()
    assert all(verify_rejection(scores, tokens, draft, seed=s, position=0).num_accepted == 3 for s in range(99))


def test_rejection_never_accepts_what_the_target_excludes_nor_recovers_what_the_draft_favoured() -> None:
    scores = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]])
    draft = SparseDistribution(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.5]]))
    for seed in range(99):
        # the residual is max((.5, .5, 0) - (.5, 0, .5), 0): only token 1 is left
        outcome = verify_rejection(scores, [2], draft, seed=seed, position=0)
        assert outcome == VerificationOutcome(0, 1)


def test_rejection_without_probabilities_is_sample_and_match() -> None:
    scores = random_scores(3)
    for seed in range(50):
        expected = verify_sample_and_match(scores, [1, 2], seed=seed, position=4)
        assert verify(VerificationMode.REJECTION, scores, [1, 2], seed=seed, position=4) == expected


@pytest.mark.parametrize("num_draft", [[0], [3], [2, 0, 3, 1], [0, 0], [1, 4, 0]])
@pytest.mark.parametrize("mode", VerificationMode)
def test_a_ragged_batch_equals_its_sequences_one_by_one(mode: VerificationMode, num_draft: list[int]) -> None:
    scores = random_scores(sum(num_draft) + len(num_draft))
    draft, tokens = sparse(max(sum(num_draft), 1))
    draft, tokens = draft.narrow(sum(num_draft)), tokens[: sum(num_draft)]
    # make the drafts right often enough to matter
    boost_rows = torch.cat([torch.arange(k) + sum(num_draft[:b]) + b for b, k in enumerate(num_draft)])
    scores[boost_rows.long(), tokens] += 4
    seeds = torch.repeat_interleave(torch.arange(len(num_draft)) + 70, torch.tensor(num_draft) + 1)
    positions = torch.cat([torch.arange(k + 1) + 10 * b for b, k in enumerate(num_draft)])
    if mode is VerificationMode.GREEDY:
        batch = verify_greedy_batch(scores, tokens, num_draft)
    elif mode is VerificationMode.COUPLED:
        batch = verify_coupled_batch(scores, tokens, num_draft, seeds=seeds, positions=positions)
    else:
        batch = verify_rejection_batch(scores, tokens, num_draft, draft, seeds=seeds, positions=positions)
    for b, (k, outcome) in enumerate(zip(num_draft, batch.unbind(), strict=True)):
        row, first = sum(num_draft[:b]) + b, sum(num_draft[:b])
        own: DraftDistribution = SparseDistribution(
            draft.token_ids[first : first + k], draft.probabilities[first : first + k]
        )
        alone = verify(
            mode,
            scores[row : row + k + 1],
            tokens[first : first + k].tolist(),
            seed=70 + b,
            position=10 * b,
            draft=own,
        )
        assert outcome == alone
