"""What the draft does at each node: the token it drafts, and its guesses for the target's token there.

Shape legend: N nodes (rows), V vocabulary, F ranks, m kept tokens of a sparse distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from specpool.algorithm.draft_distribution import DenseDistribution, SparseDistribution
from specpool.algorithm.noise import Stream, gumbel_argmax, gumbel_topk, uniform
from specpool.algorithm.saguaro import saguaro_scores
from specpool.algorithm.top_tokens import top_tokens
from specpool.algorithm.verification import VerificationMode

DEFAULT_NUM_KEPT: Final = 64
_REACH: Final = 12.0
"""Tokens less likely than exp(-12) times the likeliest are not drafted: guesses there would not be right often
enough."""


@dataclass(frozen=True, slots=True)
class DraftRanks:
    """Ranked tokens at N nodes; -1 where fewer are possible."""

    token_ids: Tensor
    """Ranked tokens, int64 [N, F]. Rank 0 is drafted; the others guess what the target puts there if it rejects it."""
    bonus_ids: Tensor
    """Guesses for the target's bonus token if the draft ends before this node, int64 [N, F]."""
    scores: Tensor | None
    """Scores of `token_ids` [N, F], noise included, -inf where there is none; None for rejection, which samples rank
    0."""
    distribution: SparseDistribution | DenseDistribution | None
    """The distributions [N, m] or [N, V] that rank 0 was sampled from (rejection only). Dense ones are as they travel:
    see `DenseDistribution.from_rounded`."""


def draft_ranks(
    scores: Tensor,
    mode: VerificationMode,
    num_ranks: int,
    *,
    seed: int | Tensor = 0,
    positions: Tensor | None = None,
    saguaro_fan_out: int = 0,
    saguaro_constant: float = 1.0,
    num_kept: int = DEFAULT_NUM_KEPT,
    dense_dtype: torch.dtype | None = None,
) -> DraftRanks:
    """Rank the next tokens at N nodes.

    Args:
        scores: [N, V] processed logits of the draft, with the request's own sampling parameters.
        mode: how the target will verify.
        num_ranks: F, at least 1.
        seed: the request's seed, or int64 [N].
        positions: [N], index in the whole sequence of the token being drafted; not needed for greedy.
        saguaro_fan_out: how many guesses the cache holds at such a node (rejection only).
        saguaro_constant: C of Saguaro sampling, 1 is off (rejection only).
        num_kept: m, the draft samples from its m most likely tokens (rejection only).
        dense_dtype: the draft samples from all tokens instead, rounded to this type (rejection only).
    """
    if mode is VerificationMode.GREEDY:
        return _same_ranks(*_top(scores, num_ranks))
    if positions is None:
        raise ValueError(f"{mode} drafting needs positions")
    if mode is VerificationMode.COUPLED:
        return _same_ranks(*gumbel_topk(scores, seed, positions, num_ranks, reach=_REACH))
    distribution: SparseDistribution | DenseDistribution
    if dense_dtype is None:
        distribution, drafted = _sample_sparse(
            scores, seed, positions, saguaro_fan_out, saguaro_constant, max(num_kept, saguaro_fan_out + 1)
        )
    else:
        changed = saguaro_scores(scores, saguaro_fan_out, saguaro_constant)
        distribution, drafted = _sample_dense(changed, seed, positions, dense_dtype)
    likely, _ = _top(scores, num_ranks + 1)
    return DraftRanks(_moved_to_front(likely, drafted)[:, :num_ranks], likely[:, :num_ranks], None, distribution)


def _same_ranks(token_ids: Tensor, scores: Tensor) -> DraftRanks:
    return DraftRanks(token_ids, token_ids, scores, None)


def _top(scores: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Most likely tokens [N, F], best first, -1 where the row has no more; and their scores."""
    values, best = top_tokens(scores, min(num_ranks, scores.shape[1]))
    tokens = best.masked_fill(values == -torch.inf, -1)
    padding = (0, num_ranks - tokens.shape[1])
    pad = torch.nn.functional.pad
    return pad(tokens, padding, value=-1), pad(values, padding, value=-torch.inf)


def _sample_sparse(
    scores: Tensor, seed: int | Tensor, positions: Tensor, fan_out: int, constant: float, num_kept: int
) -> tuple[SparseDistribution, Tensor]:
    """Cut to the most likely tokens, apply Saguaro sampling, sample; returns (distribution, tokens [N])."""
    values, kept = top_tokens(scores, min(num_kept, scores.shape[1]))
    changed = saguaro_scores(values, fan_out, constant)
    choice = gumbel_argmax(changed, seed, positions, Stream.DRAFT)
    distribution = SparseDistribution(kept, changed.softmax(dim=1))
    return distribution, kept.gather(1, choice[:, None])[:, 0]


def _sample_dense(
    scores: Tensor, seed: int | Tensor, positions: Tensor, dtype: torch.dtype
) -> tuple[DenseDistribution, Tensor]:
    """Round first, then sample from what the rounding left: exact for the verifier, whatever the type.

    One uniform number per row does it: noise over the whole vocabulary would cost more than the draft step.
    """
    rounded = scores.softmax(dim=1, dtype=torch.float32).to(dtype)
    cumulative = rounded.cumsum(dim=1, dtype=torch.float64)
    total = cumulative[:, -1]
    reached = (uniform(seed, positions, Stream.DRAFT).to(scores.device) * total).minimum(total.nextafter(total * 0))
    # The first token beyond it, which is never one without probability.
    drafted = torch.searchsorted(cumulative, reached[:, None], right=True)[:, 0]
    return DenseDistribution(rounded), drafted


def _moved_to_front(tokens: Tensor, first: Tensor) -> Tensor:
    """``first`` [N], then ``tokens`` [N, F] without it, [N, F]; a stable sort keeps the order."""
    order = (tokens == first[:, None]).to(torch.int8).argsort(dim=1, stable=True)
    return torch.cat((first[:, None], tokens.gather(1, order)[:, :-1]), dim=1)
