"""Draft distributions as they arrive: read if they are what they should be.

Shapes: K drafted tokens, V vocabulary size of the target, V' of the draft.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from specpool.algorithm.draft_distribution import DenseDistribution, DraftDistribution, SparseDistribution
from specpool.v1 import speculator_pb2

_SUM_TOLERANCE: Final = 1e-3
_DENSE_SUM_TOLERANCE: Final = 0.1
"""How far a dense distribution may be from 1: its values are rounded, and what is lost so is not drafted either."""


@dataclass(frozen=True, slots=True)
class ArrivedDistributions:
    """Draft distributions that came through a process group."""

    draft_tokens: tuple[int, ...]
    """The draft tokens that were sampled from it, K of them."""
    distribution: DraftDistribution | None
    """The draft's distribution, K rows; None: it does not come, or is not sound."""


def read_distributions(
    message: object | None,
    draft_tokens: Sequence[int],
    *,
    vocab_size: int,
    device: torch.device,
) -> DraftDistribution | None:
    """The distributions of exactly these draft tokens; None if what came is something else or not sound.

    A speculator can only be trusted so far: a distribution that is none, or gives its own token no probability, would
    make the output wrong. Sample-and-match is right whatever it sent.
    """
    if isinstance(message, ArrivedDistributions):
        is_same = list(message.draft_tokens[: len(draft_tokens)]) == list(draft_tokens)
        return message.distribution.narrow(len(draft_tokens)) if is_same and message.distribution is not None else None
    if (
        not isinstance(message, speculator_pb2.DraftDistributions)
        or len(message.distributions) < len(draft_tokens)
        or not draft_tokens
    ):
        return None
    if list(message.draft_tokens[: len(draft_tokens)]) != list(draft_tokens):
        return None
    rows = message.distributions[: len(draft_tokens)]
    if not all(_is_sound(row, token, vocab_size) for row, token in zip(rows, draft_tokens, strict=True)):
        return None
    width = max(len(row.token_ids) for row in rows)
    token_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    probabilities = torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        token_ids[index, : len(row.token_ids)] = torch.tensor(list(row.token_ids), dtype=torch.int64)
        probabilities[index, : len(row.token_ids)] = torch.tensor(list(row.probabilities))
    return SparseDistribution(token_ids.to(device), probabilities.to(device))


def _is_sound(row: speculator_pb2.SparseDistribution, token: int, vocab_size: int) -> bool:
    if not len(row.token_ids) == len(row.probabilities) <= vocab_size:  # before anything is done with them
        return False
    ids, probabilities = list(row.token_ids), list(row.probabilities)
    if not ids or len(set(ids)) != len(ids) or max(ids) >= vocab_size:
        return False
    if not all(0 <= p <= 1 for p in probabilities) or not math.isclose(sum(probabilities), 1, abs_tol=_SUM_TOLERANCE):
        return False
    return token in ids and probabilities[ids.index(token)] > 0


def read_dense(
    message: speculator_pb2.DraftDistributions, body: Tensor, *, vocab_size: int, device: torch.device
) -> DenseDistribution | None:
    """The distributions [K, V] of the message's tokens, from it and from `body` [rows, V']; None if not sound.

    Tokens that only the target has, from V' on, are never drafted.
    """
    tokens, rows = list(message.draft_tokens), list(message.distributions)
    is_dense = [not row.token_ids for row in rows]
    sparse = [(row, token) for row, token in zip(rows, tokens, strict=False) if row.token_ids]
    if len(rows) != len(tokens) or not all(_is_sound(row, token, vocab_size) for row, token in sparse):
        return None
    if max(tokens) >= vocab_size or not _are_sound(body):
        return None
    probabilities = torch.zeros(len(rows), vocab_size, device=device)
    dense_rows = torch.tensor(is_dense, device=device)
    probabilities[dense_rows, : body.shape[1]] = DenseDistribution.from_rounded(body.to(device)).probabilities
    for index, row in enumerate(rows):
        if row.token_ids:
            ids = torch.tensor(list(row.token_ids), device=device)
            probabilities[index, ids] = torch.tensor(list(row.probabilities), device=device)
    own = probabilities.gather(1, torch.tensor(tokens, device=device)[:, None])
    return DenseDistribution(probabilities) if bool((own > 0).all()) else None


def _are_sound(body: Tensor) -> bool:
    sums = body.float().sum(dim=1)
    return bool((body >= 0).all() and ((sums - 1).abs() < _DENSE_SUM_TOLERANCE).all())
