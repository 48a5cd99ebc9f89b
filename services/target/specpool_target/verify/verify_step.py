"""Verification of a whole step: rows of many sequences, batched where their parameters are alike.

Shapes: R rows (1 + K_b of each verified sequence, in order), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from specpool.algorithm.noise import Stream
from specpool.algorithm.sampling import SamplingParams, process_logits, token_logprobs
from specpool.algorithm.verification import (
    DenseDistribution,
    DraftDistribution,
    SparseDistribution,
    VerificationMode,
    VerificationOutcome,
    verify_coupled_batch,
    verify_greedy_batch,
    verify_rejection,
)
from specpool.v1 import speculator_pb2
from specpool_target.engine.sequence import Draft, TargetSequence, TokenLogprobs

_SUM_TOLERANCE: Final = 1e-3
_DENSE_SUM_TOLERANCE: Final = 0.1
"""Of rounded probabilities; what is lost by rounding is not drafted either."""


@dataclass(frozen=True, slots=True)
class ArrivedDistributions:
    """What came through a process group."""

    draft_tokens: tuple[int, ...]
    """That were sampled from it."""
    distribution: DraftDistribution | None
    """None: it does not come, or is not sound."""


@dataclass(frozen=True, slots=True)
class VerifyItem:
    """One sequence of the step."""

    sequence: TargetSequence
    draft: Draft
    """What is verified."""
    rows: slice
    """Of the step's logits."""
    distribution: DraftDistribution | None = None
    """For rejection, if it is here."""

    @property
    def num_draft(self) -> int:
        """K of this round."""
        return len(self.draft.tokens)


def effective_mode(params: SamplingParams, mode: VerificationMode) -> VerificationMode:
    """At temperature 0 every mode is greedy."""
    return VerificationMode.GREEDY if params.is_greedy else mode


def verify_step(logits: Tensor, items: Sequence[VerifyItem]) -> list[VerificationOutcome]:
    """Outcomes in the order of `items`. `logits` [R, V]."""
    outcomes: dict[int, VerificationOutcome] = {}
    for group in _groups(items):
        outcomes.update(zip((id(i) for i in group), _verify_group(logits, group), strict=True))
    return [outcomes[id(item)] for item in items]


def _groups(items: Sequence[VerifyItem]) -> list[list[VerifyItem]]:
    groups: dict[Hashable, list[VerifyItem]] = {}
    for item in items:
        groups.setdefault(_group_key(item), []).append(item)
    return list(groups.values())


def _group_key(item: VerifyItem) -> Hashable:
    params, mode = item.sequence.request.sampling, item.sequence.request.verification
    mode = effective_mode(params, mode)
    if params.has_penalties or params.logit_bias or item.distribution is not None:
        return id(item)  # alone
    if mode is VerificationMode.GREEDY:
        return mode
    return (mode, params.temperature, params.top_p, params.top_k, params.min_p)


def _verify_group(logits: Tensor, group: Sequence[VerifyItem]) -> list[VerificationOutcome]:
    first = group[0].sequence
    params = first.request.sampling
    rows = _rows_of(logits, group)
    scores = process_logits(
        rows,
        params,
        prompt_tokens=first.request.prompt_tokens if params.has_penalties else (),
        output_tokens=first.output_tokens if params.has_penalties else (),
        draft_tokens=group[0].draft.tokens if params.has_penalties else (),
    )
    mode = effective_mode(params, first.request.verification)
    if mode is VerificationMode.REJECTION and group[0].distribution is not None:
        return [
            verify_rejection(
                scores,
                group[0].draft.tokens,
                group[0].distribution,
                seed=first.seed,
                position=len(first.tokens),
            )
        ]
    draft_tokens = torch.tensor([t for i in group for t in i.draft.tokens], dtype=torch.int64)
    draft_tokens = draft_tokens.to(logits.device)
    num_draft = [item.num_draft for item in group]
    if mode is VerificationMode.GREEDY:
        return verify_greedy_batch(scores, draft_tokens, num_draft).unbind()
    # Rejection without distributions (none drafted, or late) is sample-and-match: noise the draft never saw.
    stream = Stream.TARGET if mode is VerificationMode.COUPLED else Stream.RECOVER
    seeds, positions = _noise_counters(group)
    return verify_coupled_batch(
        scores,
        draft_tokens,
        num_draft,
        seeds=seeds.to(logits.device),
        positions=positions.to(logits.device),
        stream=stream,
    ).unbind()


def _rows_of(logits: Tensor, group: Sequence[VerifyItem]) -> Tensor:
    """Rows of the group; no copy when they lie together."""
    start, stop = group[0].rows.start, group[-1].rows.stop
    if stop - start == sum(1 + item.num_draft for item in group):
        return logits[start:stop]
    return torch.cat([logits[item.rows] for item in group])


def _noise_counters(group: Sequence[VerifyItem]) -> tuple[Tensor, Tensor]:
    """Seeds and positions of the rows, both [R]."""
    seeds: list[int] = []
    positions: list[int] = []
    for item in group:
        start = len(item.sequence.tokens)
        seeds += [item.sequence.seed] * (1 + item.num_draft)
        positions += range(start, start + 1 + item.num_draft)
    return torch.tensor(seeds, dtype=torch.int64), torch.tensor(positions, dtype=torch.int64)


def logprobs_of(logits: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of committed `tokens` under raw `logits` [at least len(tokens), V]."""
    chosen = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    result = token_logprobs(logits[: len(tokens)], chosen, num_top)
    tops = zip(result.top_token_ids.tolist(), result.top_logprobs.tolist(), strict=True)
    return [
        TokenLogprobs(token_id=token, chosen=value, top=tuple(zip(ids, values, strict=True)))
        for token, value, (ids, values) in zip(tokens, result.chosen.tolist(), tops, strict=True)
    ]


def read_distributions(
    message: speculator_pb2.DraftDistributions | ArrivedDistributions | None,
    draft_tokens: Sequence[int],
    *,
    vocab_size: int,
    device: torch.device,
) -> DraftDistribution | None:
    """The distributions of exactly these tokens, or None if the message is not that or not sound.

    A speculator can only be trusted so far: a distribution that is none, or gives its own token no probability, would
    make the output wrong. Sample-and-match is right whatever it sent.
    """
    if isinstance(message, ArrivedDistributions):
        is_same = list(message.draft_tokens[: len(draft_tokens)]) == list(draft_tokens)
        return message.distribution.narrow(len(draft_tokens)) if is_same and message.distribution is not None else None
    if message is None or len(message.distributions) < len(draft_tokens) or not draft_tokens:
        return None
    if list(message.draft_tokens)[: len(draft_tokens)] != list(draft_tokens):
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
    ids, probabilities = list(row.token_ids), list(row.probabilities)
    if not ids or len(ids) != len(probabilities) or len(set(ids)) != len(ids) or max(ids) >= vocab_size:
        return False
    if not all(0 <= p <= 1 for p in probabilities) or not math.isclose(sum(probabilities), 1, abs_tol=_SUM_TOLERANCE):
        return False
    return token in ids and probabilities[ids.index(token)] > 0


def read_dense(
    message: speculator_pb2.DraftDistributions, body: Tensor, *, vocab_size: int, device: torch.device
) -> DenseDistribution | None:
    """The distributions of all the message's tokens, its own and those in `body` [rows, V']; None if not sound.

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
