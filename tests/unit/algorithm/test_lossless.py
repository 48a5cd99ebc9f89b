"""The output distribution is exactly the target's: whole two-token continuations on a small vocabulary.

Toy models: the next token depends on the last one, through a table of logits. Every case draws NUM_SAMPLES
continuations, each with its own seed, through the batched verification with its draft, and compares their counts
with the exact probabilities by chi-square and total variation. Verifiers with a known mistake must fail.

Shape legend: B = NUM_SAMPLES sequences, V = 4 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from specpool.algorithm import verification
from specpool.algorithm.draft_distribution import DenseDistribution, DraftDistribution, SparseDistribution
from specpool.algorithm.draft_ranks import draft_ranks
from specpool.algorithm.noise import Stream
from specpool.algorithm.verification import BatchOutcome, VerificationMode, verify_coupled_batch, verify_rejection_batch

NUM_SAMPLES = 200_000
VOCAB_SIZE = 4
START = VOCAB_SIZE  # the row of the tables before any token
FIRST_POSITION = 17
FAN_OUT = 2

_generator = torch.Generator().manual_seed(5)
TARGET = torch.randn(VOCAB_SIZE + 1, VOCAB_SIZE, generator=_generator)
DRAFT = TARGET + torch.randn(VOCAB_SIZE + 1, VOCAB_SIZE, generator=_generator)
TARGET[2, 1] = -torch.inf  # a token the target excludes and the draft may propose


@dataclass(frozen=True)
class Drafted:
    tokens: Tensor  # [B, K]
    token_ids: Tensor  # [B, K, m] of the distributions
    probabilities: Tensor  # [B, K, m]


@dataclass(frozen=True)
class Method:
    """How a case drafts and verifies."""

    draft_mode: VerificationMode
    constant: float = 1.0
    probabilities_arrive: bool = True
    num_kept: int = VOCAB_SIZE
    dense_dtype: torch.dtype | None = None
    make_distribution: Callable[[Tensor, Tensor, Tensor], DraftDistribution] = (
        lambda token_ids, probabilities, previous: SparseDistribution(token_ids, probabilities)
    )


def dense(token_ids: Tensor, probabilities: Tensor, previous: Tensor) -> DraftDistribution:
    full = torch.zeros(len(token_ids), VOCAB_SIZE).scatter(1, token_ids, probabilities)
    return DenseDistribution(full)


def rounded(token_ids: Tensor, probabilities: Tensor, previous: Tensor) -> DraftDistribution:
    assert probabilities.dtype in (torch.float16, torch.bfloat16)
    return DenseDistribution.from_rounded(probabilities)


METHODS = {
    "coupled": Method(VerificationMode.COUPLED),
    "rejection-C0": Method(VerificationMode.REJECTION, constant=0.0),
    "rejection-C0.5": Method(VerificationMode.REJECTION, constant=0.5),
    "rejection-C1": Method(VerificationMode.REJECTION, constant=1.0),
    "rejection-C0.5-top3": Method(VerificationMode.REJECTION, constant=0.5, num_kept=3),
    "rejection-C0.5-dense": Method(VerificationMode.REJECTION, constant=0.5, make_distribution=dense),
    "rejection-C0.5-float16": Method(
        VerificationMode.REJECTION, constant=0.5, dense_dtype=torch.float16, make_distribution=rounded
    ),
    "rejection-C0.5-bfloat16": Method(
        VerificationMode.REJECTION, constant=0.5, dense_dtype=torch.bfloat16, make_distribution=rounded
    ),
    "sample-and-match": Method(VerificationMode.REJECTION, constant=0.5, probabilities_arrive=False),
}

HitDepth = Callable[[Tensor, Tensor], Tensor]
"""(drafted tokens [B, K], bonus token [B]) of the first round -> depth of the second [B]."""


def run(method: Method, first: int, following: HitDepth) -> Tensor:
    """Two tokens for each of B sequences, [B, 2]: one round, and a second one where it committed one token.

    The first round verifies ``first`` tokens, or 0 to 2 in turn where ``first`` is -1.
    """
    seeds = torch.arange(NUM_SAMPLES)
    previous = torch.full((NUM_SAMPLES,), START)
    depths = torch.full((NUM_SAMPLES,), first) if first >= 0 else seeds % 3  # a ragged batch
    tokens = first_speculation(method)
    outcome = verify_batch(method, seeds, previous, tokens, depths, FIRST_POSITION)
    committed = torch.where(
        torch.arange(2) < outcome.num_accepted[:, None], tokens.tokens, outcome.bonus_tokens[:, None]
    )
    second_previous = committed[:, 0]
    hit_depths = following(tokens.tokens, outcome.bonus_tokens)
    tokens = speculate(method, seeds, second_previous, FIRST_POSITION + 1, 1)
    second = verify_batch(method, seeds, second_previous, tokens, hit_depths, FIRST_POSITION + 1)
    second_token = torch.where(second.num_accepted > 0, tokens.tokens[:, 0], second.bonus_tokens)
    committed[:, 1] = torch.where(outcome.num_accepted == 0, second_token, committed[:, 1])
    return committed


@cache
def first_speculation(method: Method) -> Drafted:
    previous = torch.full((NUM_SAMPLES,), START)
    return speculate(method, torch.arange(NUM_SAMPLES), previous, FIRST_POSITION, 2)


def speculate(method: Method, seeds: Tensor, previous: Tensor, position: int, depth: int) -> Drafted:
    tokens, token_ids, probabilities = [], [], []
    for step in range(depth):
        ranks = draft_ranks(
            DRAFT[previous],
            method.draft_mode,
            FAN_OUT,
            seed=seeds,
            positions=torch.full_like(seeds, position + step),
            saguaro_fan_out=FAN_OUT,
            saguaro_constant=method.constant,
            num_kept=method.num_kept,
            dense_dtype=method.dense_dtype,
        )
        previous = ranks.token_ids[:, 0]
        tokens.append(previous)
        if ranks.distribution is not None:
            every = torch.arange(VOCAB_SIZE).expand(len(previous), -1)
            token_ids.append(getattr(ranks.distribution, "token_ids", every))
            probabilities.append(ranks.distribution.probabilities)
    if not token_ids:
        return Drafted(torch.stack(tokens, 1), torch.zeros(0), torch.zeros(0))
    return Drafted(torch.stack(tokens, 1), torch.stack(token_ids, 1), torch.stack(probabilities, 1))


def verify_batch(
    method: Method, seeds: Tensor, previous: Tensor, drafted: Drafted, depths: Tensor, position: int
) -> BatchOutcome:
    """One ragged batch: sequence b has depths[b] + 1 rows."""
    width = drafted.tokens.shape[1]
    before = torch.cat((previous[:, None], drafted.tokens), dim=1)  # the token before each row
    is_row = torch.arange(width + 1) <= depths[:, None]
    is_draft = torch.arange(width) < depths[:, None]
    scores = TARGET[before[is_row]]
    row_seeds = seeds[:, None].expand(-1, width + 1)[is_row]
    positions = (position + torch.arange(width + 1)).expand(len(seeds), -1)[is_row]
    tokens = drafted.tokens[is_draft]
    if method.draft_mode is VerificationMode.REJECTION and method.probabilities_arrive:
        distribution = method.make_distribution(
            drafted.token_ids[is_draft], drafted.probabilities[is_draft], before[:, :-1][is_draft]
        )
        return verify_rejection_batch(scores, tokens, depths, distribution, seeds=row_seeds, positions=positions)
    stream = Stream.TARGET if method.draft_mode is VerificationMode.COUPLED else Stream.RECOVER
    return verify_coupled_batch(scores, tokens, depths, seeds=row_seeds, positions=positions, stream=stream)


def exact_probabilities() -> Tensor:
    """Of the 16 continuations."""
    first = TARGET[START].double().softmax(0)
    return (first[:, None] * TARGET[:VOCAB_SIZE].double().softmax(1)).flatten()


def mismatch(committed: Tensor) -> tuple[float, float]:
    """(chi-square p-value, total variation) of B continuations against the exact probabilities."""
    counts = torch.bincount(committed[:, 0] * VOCAB_SIZE + committed[:, 1], minlength=VOCAB_SIZE**2)
    exact = exact_probabilities()
    possible = exact > 0
    total_variation = float((counts / len(committed) - exact).abs().sum() / 2)
    if counts[~possible].any():
        return 0.0, total_variation
    p_value = chisquare(counts[possible].numpy(), (exact[possible] * len(committed)).numpy()).pvalue
    return float(p_value), total_variation


def guessed(drafted: Tensor, bonus: Tensor) -> Tensor:
    """Whether a rejected first token was corrected to one of the FAN_OUT guesses of the cache."""
    guesses = DRAFT[START].topk(FAN_OUT + 1).indices
    is_guess = (guesses == bonus[:, None]) & (guesses != drafted[:, :1])
    return is_guess.any(dim=1).long()


def hit(drafted: Tensor, bonus: Tensor) -> Tensor:
    return torch.ones_like(bonus)


def miss(drafted: Tensor, bonus: Tensor) -> Tensor:
    return torch.zeros_like(bonus)


SCENARIOS: dict[str, tuple[int, HitDepth]] = {
    "all-hits": (2, hit),
    "cache-by-guesses": (2, guessed),
    "partial-depth": (1, hit),
    "misses-only": (0, miss),
    "ragged-batch": (-1, guessed),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("method", METHODS)
def test_the_output_has_the_targets_distribution(method: str, scenario: str) -> None:
    p_value, total_variation = mismatch(run(METHODS[method], *SCENARIOS[scenario]))
    assert p_value > 1e-3
    assert total_variation < 0.006


def test_a_request_may_lose_its_probabilities_half_way() -> None:
    """First round by sample-and-match (probabilities came late), the second by rejection."""
    seeds = torch.arange(NUM_SAMPLES)
    previous = torch.full((NUM_SAMPLES,), START)
    late, arrived = METHODS["sample-and-match"], METHODS["rejection-C0.5"]
    drafted = speculate(late, seeds, previous, FIRST_POSITION, 1)
    first = verify_batch(late, seeds, previous, drafted, torch.ones_like(seeds), FIRST_POSITION)
    token = torch.where(first.num_accepted > 0, drafted.tokens[:, 0], first.bonus_tokens)
    following = speculate(arrived, seeds, token, FIRST_POSITION + 1, 1)
    second = verify_batch(arrived, seeds, token, following, torch.ones_like(seeds), FIRST_POSITION + 1)
    after_rejection = torch.where(second.num_accepted > 0, following.tokens[:, 0], second.bonus_tokens)
    second_token = torch.where(first.num_accepted > 0, first.bonus_tokens, after_rejection)
    p_value, total_variation = mismatch(torch.stack((token, second_token), dim=1))
    assert p_value > 1e-3
    assert total_variation < 0.006


# ---- mistakes that the test above must find ----


class RecoversFromTarget(SparseDistribution):
    """The correction is sampled from the target, not from max(target - draft, 0)."""

    def residual(self, target: Tensor, index: Tensor) -> Tensor:
        return target


class AcceptsTooMuch(SparseDistribution):
    """Accepts as if the draft were half as sure."""

    def probability_of(self, tokens: Tensor) -> Tensor:
        return super().probability_of(tokens) / 2


def unmodified(token_ids: Tensor, probabilities: Tensor, previous: Tensor) -> DraftDistribution:
    """The verifier is told the draft's softmax, not the Saguaro distribution it sampled from."""
    return DenseDistribution(DRAFT[previous].softmax(dim=1))


BROKEN = {
    "recovers-from-target": Method(
        VerificationMode.REJECTION, make_distribution=lambda t, p, _: RecoversFromTarget(t, p)
    ),
    "accepts-too-much": Method(VerificationMode.REJECTION, make_distribution=lambda t, p, _: AcceptsTooMuch(t, p)),
    "unmodified-distribution-C0.5": Method(VerificationMode.REJECTION, constant=0.5, make_distribution=unmodified),
    "unmodified-distribution-C0": Method(VerificationMode.REJECTION, constant=0.0, make_distribution=unmodified),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_verifier_is_found(broken: str) -> None:
    p_value, total_variation = mismatch(run(BROKEN[broken], *SCENARIOS["all-hits"]))
    assert p_value < 1e-9
    assert total_variation > 0.006


def test_a_verifier_that_looks_at_the_drafts_noise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recovering with the noise that chose the rejected draft token is not a fresh sample."""
    monkeypatch.setattr(verification, "Stream", SimpleNamespace(ACCEPT=Stream.ACCEPT, RECOVER=Stream.DRAFT))
    assert mismatch(run(METHODS["rejection-C1"], *SCENARIOS["all-hits"]))[0] < 1e-9


def test_filler_tokens_that_pass_a_comparison_are_found() -> None:
    """On a miss: a token accepted because it is the target's most likely one, though the request samples."""
    committed = run(METHODS["coupled"], *SCENARIOS["misses-only"])
    filler = torch.arange(NUM_SAMPLES) % VOCAB_SIZE
    committed[:, 0] = torch.where(filler == TARGET[START].argmax(), filler, committed[:, 0])
    assert mismatch(committed)[0] < 1e-9


def test_every_mode_accepts_something_and_rejects_something() -> None:
    """The distribution tests would prove little if nothing were ever accepted or rejected."""
    seeds = torch.arange(NUM_SAMPLES)
    previous = torch.full((NUM_SAMPLES,), START)
    for name, method in METHODS.items():
        drafted = first_speculation(method)
        outcome = verify_batch(method, seeds, previous, drafted, torch.full_like(seeds, 2), FIRST_POSITION)
        shares = torch.bincount(outcome.num_accepted, minlength=3) / NUM_SAMPLES
        assert bool((shares > 0.02).all()), (name, shares)
