"""Verification: how many drafted tokens the target accepts, and the one token it adds.

Every function is pure. The batched forms take the rows exactly as a model returns them for segments of
different length: the K_b + 1 rows of sequence 0, then those of sequence 1, and so on. The forms without
``batch`` are the same for one sequence.

Shape legend: B sequences; K_b drafted tokens of sequence b (0 allowed); D = sum of K_b; R = D + B rows; V
vocabulary. ``scores`` are processed logits; sampling is
softmax(scores).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from specpool.algorithm.draft_distribution import DraftDistribution
from specpool.algorithm.noise import Stream, gumbel_argmax, uniform


class VerificationMode(StrEnum):
    """How drafted tokens are checked, and with that how they must have been drafted."""

    GREEDY = "greedy"
    """Temperature 0: accept what equals the target's most likely token."""
    COUPLED = "coupled"
    """Target and draft share noise: accept what equals the target's own sample."""
    REJECTION = "rejection"
    """Accept with min(1, target / draft), recover from max(target - draft, 0)."""


@dataclass(frozen=True, slots=True)
class VerificationOutcome:
    """What the speculator has to guess: (accepted length, next token)."""

    num_accepted: int
    """Number of leading draft tokens that are committed, k."""
    bonus_token: int
    """The token after them, t*: the target's correction after a rejection, else its extra token."""

    def committed(self, draft_tokens: Sequence[int]) -> list[int]:
        """The tokens this round commits."""
        return [*draft_tokens[: self.num_accepted], self.bonus_token]


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """Verification outcomes of B sequences."""

    num_accepted: Tensor
    """Number of leading draft tokens that are committed, int64 [B]."""
    bonus_tokens: Tensor
    """The token after them, int64 [B]."""

    def unbind(self) -> list[VerificationOutcome]:
        """One outcome per sequence, on the host."""
        pairs = torch.stack((self.num_accepted, self.bonus_tokens), dim=1).tolist()
        return [VerificationOutcome(num_accepted, bonus) for num_accepted, bonus in pairs]


# ---- one sequence ------------------------------------------------------------------------------------------


def verify(
    mode: VerificationMode,
    scores: Tensor,
    draft_tokens: Sequence[int],
    *,
    seed: int,
    position: int,
    draft: DraftDistribution | None = None,
) -> VerificationOutcome:
    """Verify one sequence in ``mode``.

    Rejection without the draft's distribution (it did not arrive in time) becomes sample-and-match.

    Args:
        mode: agreed with the draft.
        scores: [K + 1, V] processed logits.
        draft_tokens: K tokens.
        seed: of the request.
        position: index in the whole sequence of the first drafted token (the first row's token).
        draft: what rejection needs.
    """
    if mode is VerificationMode.GREEDY:
        return verify_greedy(scores, draft_tokens)
    if mode is VerificationMode.COUPLED:
        return verify_coupled(scores, draft_tokens, seed=seed, position=position)
    if draft is None:
        return verify_sample_and_match(scores, draft_tokens, seed=seed, position=position)
    return verify_rejection(scores, draft_tokens, draft, seed=seed, position=position)


def verify_greedy(scores: Tensor, draft_tokens: Sequence[int]) -> VerificationOutcome:
    """Accept while the drafted token is the target's most likely one. ``scores`` [K + 1, V]."""
    return _match_one(scores.argmax(dim=1), draft_tokens)


def verify_coupled(scores: Tensor, draft_tokens: Sequence[int], *, seed: int, position: int) -> VerificationOutcome:
    """Accept while the drafted token is the target's own sample. ``scores`` [K + 1, V]."""
    return _match_one(gumbel_argmax(scores, seed, _positions(scores, position)), draft_tokens)


def verify_sample_and_match(
    scores: Tensor, draft_tokens: Sequence[int], *, seed: int, position: int
) -> VerificationOutcome:
    """Accept while the drafted token is a sample with noise that the draft never saw. ``scores`` [K + 1, V].

    Lossless whatever the draft did, but accepts less than `verify_coupled`.
    """
    own = gumbel_argmax(scores, seed, _positions(scores, position), Stream.RECOVER)
    return _match_one(own, draft_tokens)


def verify_rejection(
    scores: Tensor,
    draft_tokens: Sequence[int],
    draft: DraftDistribution,
    *,
    seed: int,
    position: int,
) -> VerificationOutcome:
    """Rejection verification (Leviathan et al. 2023). ``scores`` [K + 1, V], ``draft`` of K tokens."""
    tokens = torch.tensor(list(draft_tokens), dtype=torch.int64, device=scores.device)
    outcome = verify_rejection_batch(
        scores, tokens, [len(draft_tokens)], draft, seeds=seed, positions=_positions(scores, position)
    )
    return outcome.unbind()[0]


# ---- many sequences ----------------------------------------------------------------------------------------


def verify_greedy_batch(scores: Tensor, draft_tokens: Tensor, num_draft: Sequence[int]) -> BatchOutcome:
    """Greedy verification of ``scores`` [R, V], ``draft_tokens`` [D], K_b = ``num_draft[b]``."""
    return _match(scores.argmax(dim=1), draft_tokens, _Layout.of(num_draft, scores.device))


def verify_coupled_batch(
    scores: Tensor,
    draft_tokens: Tensor,
    num_draft: Sequence[int],
    *,
    seeds: int | Tensor,
    positions: Tensor,
    stream: Stream = Stream.TARGET,
) -> BatchOutcome:
    """Coupled verification of ``scores`` [R, V], ``draft_tokens`` [D], ``seeds`` int or [R], ``positions`` [R].

    With ``stream=Stream.RECOVER`` it is sample-and-match.
    """
    own = gumbel_argmax(scores, seeds, positions, stream)
    return _match(own, draft_tokens, _Layout.of(num_draft, scores.device))


def verify_rejection_batch(
    scores: Tensor,
    draft_tokens: Tensor,
    num_draft: Sequence[int],
    draft: DraftDistribution,
    *,
    seeds: int | Tensor,
    positions: Tensor,
) -> BatchOutcome:
    """Rejection verification of ``scores`` [R, V], ``draft_tokens`` [D], ``seeds`` int or [R], ``positions`` [R].

    The draft token was sampled from ``draft``, possibly changed by Saguaro sampling and cut to few tokens:
    any distribution is verified exactly, as long as it is the one sampled from.
    """
    layout = _Layout.of(num_draft, scores.device)
    rows = layout.draft_rows
    target_at_draft = (scores[rows, draft_tokens] - scores[rows].logsumexp(dim=1)).double().exp()
    threshold = uniform(_of_rows(seeds, rows), positions[rows]) * draft.probability_of(draft_tokens).double()
    num_accepted = layout.leading_true(threshold < target_at_draft)

    last_rows = layout.first_rows + num_accepted
    weights = scores[last_rows].softmax(dim=1)
    rejected = num_accepted < layout.num_draft
    if len(rows):
        draft_index = (layout.first_draft + num_accepted).clamp_(max=len(rows) - 1)
        residual = draft.residual(weights, draft_index)
        # rounding can leave nothing of a residual that is zero but for rounding: then target = draft
        use_residual = rejected & (residual.sum(dim=1) > 0)
        weights = torch.where(use_residual[:, None], residual, weights)
    tokens = gumbel_argmax(weights.log(), _of_rows(seeds, last_rows), positions[last_rows], Stream.RECOVER)
    return BatchOutcome(num_accepted, tokens)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where each sequence's rows and drafted tokens lie in the ragged batch."""

    num_draft: Tensor
    """Number of draft tokens of each sequence, [B]."""
    first_rows: Tensor
    """Index of each sequence's first row, [B]."""
    first_draft: Tensor
    """Index of each sequence's first draft token, [B]."""
    sequence: Tensor
    """The sequence that each draft token belongs to, [D]."""

    @classmethod
    def of(cls, num_draft: Sequence[int], device: torch.device) -> _Layout:
        counts = torch.as_tensor(num_draft, dtype=torch.int64).to(device)
        index = torch.arange(len(counts), device=device)
        first_draft = counts.cumsum(0) - counts
        return cls(counts, first_draft + index, first_draft, index.repeat_interleave(counts))

    @property
    def draft_rows(self) -> Tensor:
        """The row that judges each draft token, [D]: one extra row per sequence before its own."""
        return torch.arange(len(self.sequence), device=self.sequence.device) + self.sequence

    def leading_true(self, accepted: Tensor) -> Tensor:
        """Length [B] of each sequence's leading run of True in ``accepted`` [D]."""
        step = torch.arange(len(accepted), device=accepted.device) - self.first_draft[self.sequence]
        step = torch.where(accepted, self.num_draft[self.sequence], step)
        return self.num_draft.scatter_reduce(0, self.sequence, step, "amin")


def _match(own_tokens: Tensor, draft_tokens: Tensor, layout: _Layout) -> BatchOutcome:
    """Accept draft tokens [D] while they equal the target's own [R]; its next one is the bonus."""
    num_accepted = layout.leading_true(own_tokens[layout.draft_rows] == draft_tokens)
    return BatchOutcome(num_accepted, own_tokens[layout.first_rows + num_accepted])


def _match_one(own_tokens: Tensor, draft_tokens: Sequence[int]) -> VerificationOutcome:
    """Accept draft tokens of one sequence while they equal the target's own [K + 1].

    On the host: the engine needs the tokens there anyway.
    """
    own = own_tokens.tolist()
    num_accepted = 0
    while num_accepted < len(draft_tokens) and own[num_accepted] == draft_tokens[num_accepted]:
        num_accepted += 1
    return VerificationOutcome(num_accepted, own[num_accepted])


def _positions(scores: Tensor, first: int) -> Tensor:
    return torch.arange(first, first + len(scores), device=scores.device)


def _of_rows(seeds: int | Tensor, rows: Tensor) -> int | Tensor:
    return seeds if isinstance(seeds, int) else seeds[rows]
