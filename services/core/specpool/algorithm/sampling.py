"""Sampling parameters, and the way from raw logits to the scores that are sampled.

Shape legend: N rows (consecutive positions of one sequence, or branches of it), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from specpool.errors import InvalidArgument

_NO_BIAS: Final[Mapping[int, float]] = MappingProxyType({})
_MIN_TEMPERATURE: Final = 1e-3  # below, logits / temperature leaves float32's precision
_NUM_TOP_P_CANDIDATES: Final = 1024  # a full sort of the vocabulary is needed only where the nucleus is wider
MAX_LOGPROBS: Final = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one request is sampled and when it stops."""

    temperature: float = 1.0
    """Scores are divided by it before sampling; 0 is greedy, and so is what lies below 0.001: it becomes 0."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this; 1 keeps all."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens seen in prompt or output; 1 is off."""
    presence_penalty: float = 0.0
    """Subtract from logits of tokens seen in the output."""
    frequency_penalty: float = 0.0
    """Subtract, times the number of occurrences in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _NO_BIAS)
    """Add to the logits of these token ids."""
    seed: int | None = None
    """Seed of the noise; None lets the service choose one."""
    max_tokens: int = 256
    """Stop after this many output tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Stop after any of these tokens."""
    stop: tuple[str, ...] = ()
    """Stop before any of these strings."""
    ignore_eos: bool = False
    """Do not stop at the model's end-of-sequence tokens."""
    num_logprobs: int | None = None
    """Return the log-probability of each token and of this many most likely ones; None returns none."""

    def __post_init__(self) -> None:
        """Some clients write 1e-6 for greedy."""
        if 0 < self.temperature < _MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether scores depend on the tokens before, beyond the model itself."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def changes_logits(self) -> bool:
        """Whether anything but the temperature is applied."""
        masks = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        return self.has_penalties or bool(self.logit_bias) or (masks and not self.is_greedy)

    def validate(self, vocab_size: int) -> None:
        """Raise InvalidArgument, naming field, value and what is accepted, at the first bad value."""
        _require_range("temperature", self.temperature, 0, 100)
        if not 0 < self.top_p <= 1:
            raise _invalid("top_p", self.top_p, "a number above 0 and at most 1")
        _require_at_least("top_k", self.top_k, 0)
        _require_range("min_p", self.min_p, 0, 1)
        if not 0 < self.repetition_penalty <= 100:
            raise _invalid("repetition_penalty", self.repetition_penalty, "a number above 0 and at most 100")
        _require_range("presence_penalty", self.presence_penalty, -2, 2)
        _require_range("frequency_penalty", self.frequency_penalty, -2, 2)
        _validate_logit_bias(self.logit_bias, vocab_size)
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise _invalid("seed", self.seed, "a 64-bit integer")
        _require_at_least("max_tokens", self.max_tokens, 1)
        for token in self.stop_token_ids:
            _require_token("stop_token_ids", token, vocab_size)
        if any(not text for text in self.stop):
            raise _invalid("stop", "''", "non-empty strings")
        if self.num_logprobs is not None:
            _require_range("num_logprobs", self.num_logprobs, 0, MAX_LOGPROBS)


def process_logits(
    logits: Tensor,
    params: SamplingParams,
    *,
    prompt_tokens: Sequence[int] = (),
    output_tokens: Sequence[int] = (),
    draft_tokens: Sequence[int] = (),
    row_suffixes: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Apply penalties, bias, temperature, top-k, top-p, min-p, in this order. Never changes ``logits``.

    Row j is the position after ``output_tokens + draft_tokens[:j]``: drafted tokens count towards penalties
    as if they were committed. Branches give each row's tokens after ``output_tokens`` as ``row_suffixes``
    instead. At temperature 0 only penalties and bias apply (masks never exclude the most likely token).
    When nothing is set, the result is ``logits`` itself.

    Args:
        logits: [N, V] float32.
        params: of the sequence.
        prompt_tokens: of the sequence; only the repetition penalty looks at them.
        output_tokens: committed so far.
        draft_tokens: at least N - 1 of them when penalties are set and N > 1.
        row_suffixes: N sequences of tokens.
    """
    scores = logits
    if params.has_penalties:
        if row_suffixes is None:
            row_suffixes = [draft_tokens[:row] for row in range(len(logits))]
        scores = _apply_penalties(scores, params, prompt_tokens, output_tokens, row_suffixes)
    if params.logit_bias:
        scores = _apply_bias(scores, params.logit_bias)
    if params.is_greedy:
        return scores
    if params.temperature != 1:
        scores = scores / params.temperature
    if params.top_k and params.top_k < scores.shape[1]:
        scores = _keep_from(scores, scores.topk(params.top_k, dim=1).values[:, -1:])
    if params.top_p < 1:
        scores = _keep_from(scores, _nucleus_threshold(scores, params.top_p))
    if params.min_p > 0:
        scores = _keep_from(scores, scores.amax(dim=1, keepdim=True) + math.log(params.min_p))
    return scores


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities under the model itself (before any processing)."""

    chosen: Tensor
    """Natural logarithm of the chosen token's probability, float [N]."""
    top_token_ids: Tensor
    """The most likely tokens, int64 [N, n], best first."""
    top_logprobs: Tensor
    """Natural logarithms of their probabilities, float [N, n], in the order of `top_token_ids`."""


def token_logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> TokenLogprobs:
    """Log-softmax of raw ``logits`` [N, V] at ``tokens`` [N] and at the ``num_top`` most likely tokens."""
    logits = logits.float()
    normalizer = logits.logsumexp(dim=1, keepdim=True)
    top = logits.topk(num_top, dim=1)
    chosen = logits.gather(1, tokens[:, None]) - normalizer
    return TokenLogprobs(chosen[:, 0], top.indices, top.values - normalizer)


def _apply_penalties(
    logits: Tensor,
    params: SamplingParams,
    prompt_tokens: Sequence[int],
    output_tokens: Sequence[int],
    row_suffixes: Sequence[Sequence[int]],
) -> Tensor:
    counts = _token_counts(output_tokens, logits).expand_as(logits).clone()
    rows = [row for row, suffix in enumerate(row_suffixes) for _ in suffix]
    suffix_tokens = [token for suffix in row_suffixes for token in suffix]
    if rows:
        index = (torch.tensor(rows, device=logits.device), torch.tensor(suffix_tokens, device=logits.device))
        counts.index_put_(index, counts.new_ones(()), accumulate=True)
    scores = logits
    if params.repetition_penalty != 1:
        seen = (counts > 0) | (_token_counts(prompt_tokens, logits) > 0)
        penalty = params.repetition_penalty
        scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    return scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)


def _token_counts(tokens: Sequence[int], like: Tensor) -> Tensor:
    """How often each token occurs, [V], of the dtype and on the device of ``like``."""
    ids = torch.tensor(list(tokens), dtype=torch.int64)
    return torch.bincount(ids, minlength=like.shape[1]).to(like.device, like.dtype)


def _apply_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    tokens = torch.tensor(list(bias), device=logits.device)
    values = torch.tensor(list(bias.values()), device=logits.device, dtype=logits.dtype)
    return logits.index_add(1, tokens, values.expand(len(logits), -1))


def _keep_from(scores: Tensor, threshold: Tensor) -> Tensor:
    """Exclude scores below ``threshold`` [N, 1]; ties with it stay, so that order plays no part."""
    return scores.masked_fill(scores < threshold, -torch.inf)


def _nucleus_threshold(scores: Tensor, top_p: float) -> Tensor:
    """Score of the last token of the nucleus, [N, 1]."""
    vocab_size = scores.shape[1]
    normalizer = scores.logsumexp(dim=1, keepdim=True)
    best = scores.topk(min(_NUM_TOP_P_CANDIDATES, vocab_size), dim=1).values
    mass = (best - normalizer).exp().cumsum(dim=1)
    if best.shape[1] < vocab_size and bool((mass[:, -1] < top_p).any()):
        best = scores.sort(dim=1, descending=True).values
        mass = (best - normalizer).exp().cumsum(dim=1)
    # a token is kept if the mass before it has not reached top_p
    last = (mass < top_p).sum(dim=1, keepdim=True).clamp_(max=best.shape[1] - 1)
    return best.gather(1, last)


def _invalid(name: str, value: object, accepted: str) -> InvalidArgument:
    return InvalidArgument(
        f"{name} must be {accepted}, got {value}",
        metadata={"field": name, "value": value, "accepted": accepted},
    )


def _require_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise _invalid(name, value, f"between {low} and {high}")


def _require_at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise _invalid(name, value, f"at least {low}")


def _require_token(name: str, token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise _invalid(name, token, f"token ids from 0 to {vocab_size - 1}")


def _validate_logit_bias(bias: Mapping[int, float], vocab_size: int) -> None:
    for token, value in bias.items():
        _require_token("logit_bias", token, vocab_size)
        if not -100 <= value <= 100:
            raise _invalid(f"logit_bias[{token}]", value, "between -100 and 100")
