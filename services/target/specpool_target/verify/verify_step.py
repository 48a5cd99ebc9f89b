"""Verification of a whole step: rows of many sequences, batched where their parameters are alike.

Pure: tensors and plain values in, outcomes out. It knows no sequence, and nothing of where drafts come from.

Shapes: R rows (1 + K_b of each verified sequence, in order), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specpool.algorithm.draft_distribution import DraftDistribution
from specpool.algorithm.noise import Stream
from specpool.algorithm.sampling import SamplingParams, process_logits, token_logprobs
from specpool.algorithm.verification import (
    VerificationMode,
    VerificationOutcome,
    verify_coupled_batch,
    verify_greedy_batch,
    verify_rejection,
)


@dataclass(kw_only=True, slots=True)
class VerifyItem:
    """One sequence of the step, as far as verification looks at it."""

    rows: slice
    """Rows of the step's logits that are this sequence's, 1 + K."""
    draft_tokens: Sequence[int]
    """The K draft tokens to verify."""
    params: SamplingParams
    mode: VerificationMode
    """Verification mode as the request has it; see `effective_mode`."""
    seed: int
    position: int
    """Position of the first draft token, which is the number of tokens that the sequence has."""
    distribution: DraftDistribution | None = None
    """The distribution that the draft tokens were sampled from, for rejection verification, if it is here."""
    prompt_tokens: Sequence[int] = ()
    """Tokens of the prompt, where penalties need them."""
    output_tokens: Sequence[int] = ()
    """Tokens of the output so far, where penalties need them."""

    @property
    def num_draft(self) -> int:
        """K of this round."""
        return len(self.draft_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one committed token."""

    token_id: int
    chosen: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens as (token, log-probability), best first."""


def effective_mode(params: SamplingParams, mode: VerificationMode) -> VerificationMode:
    """The mode that a round is verified in: at temperature 0 every mode is greedy."""
    return VerificationMode.GREEDY if params.is_greedy else mode


def verify_step(logits: Tensor, items: Sequence[VerifyItem]) -> list[VerificationOutcome]:
    """The outcomes of `logits` [R, V], in the order of `items`."""
    outcomes: dict[int, VerificationOutcome] = {}
    for group in _groups(items):
        outcomes.update(zip((id(i) for i in group), _verify_group(logits, group), strict=True))
    return [outcomes[id(item)] for item in items]


def verify_isolated(logits: Tensor, items: Sequence[VerifyItem]) -> list[VerificationOutcome | Exception]:
    """The outcomes, or for an item that cannot be verified its error, which spoils no other; see `verify_step`."""
    try:
        return [*verify_step(logits, items)]
    except Exception:
        return [_outcome_or_error(logits, item) for item in items]


def _outcome_or_error(logits: Tensor, item: VerifyItem) -> VerificationOutcome | Exception:
    try:
        return verify_step(logits, [item])[0]
    except Exception as error:
        return error


def _groups(items: Sequence[VerifyItem]) -> list[list[VerifyItem]]:
    groups: dict[Hashable, list[VerifyItem]] = {}
    for item in items:
        groups.setdefault(_group_key(item), []).append(item)
    return list(groups.values())


def _group_key(item: VerifyItem) -> Hashable:
    params, mode = item.params, effective_mode(item.params, item.mode)
    if params.has_penalties or params.logit_bias or item.distribution is not None:
        return id(item)  # alone
    if mode is VerificationMode.GREEDY:
        return mode
    return (mode, params.temperature, params.top_p, params.top_k, params.min_p)


def _verify_group(logits: Tensor, group: Sequence[VerifyItem]) -> list[VerificationOutcome]:
    first, params = group[0], group[0].params
    rows = _rows_of(logits, group)
    scores = process_logits(
        rows,
        params,
        prompt_tokens=first.prompt_tokens,
        output_tokens=first.output_tokens,
        draft_tokens=first.draft_tokens if params.has_penalties else (),
    )
    mode = effective_mode(params, first.mode)
    if mode is VerificationMode.REJECTION and first.distribution is not None:
        return [
            verify_rejection(scores, first.draft_tokens, first.distribution, seed=first.seed, position=first.position)
        ]
    draft_tokens = torch.tensor([t for i in group for t in i.draft_tokens], dtype=torch.int64)
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
    """Rows of the group's logits [R, V]; no copy when they lie together."""
    start, stop = group[0].rows.start, group[-1].rows.stop
    if stop - start == sum(1 + item.num_draft for item in group):
        return logits[start:stop]
    return torch.cat([logits[item.rows] for item in group])


def _noise_counters(group: Sequence[VerifyItem]) -> tuple[Tensor, Tensor]:
    """Seeds and positions of the rows, both [R]."""
    seeds: list[int] = []
    positions: list[int] = []
    for item in group:
        seeds += [item.seed] * (1 + item.num_draft)
        positions += range(item.position, item.position + 1 + item.num_draft)
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
