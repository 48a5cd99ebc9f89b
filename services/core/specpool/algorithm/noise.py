"""Counter-based Gumbel noise: a pure function of (seed, position, token, stream).

Two sides that never talk draw the same noise, and a request with a seed continues identically on any
machine. The bits are the same on CPU and GPU and across torch versions because every value is made only of
wrapping int64 operations and of exactly rounded elementwise float64 additions, multiplications and
divisions. (Run it eagerly: a compiler that contracts a multiplication and an addition into one rounding
would change the last bit.)

Shape legend: N rows (one sampled token each), V vocabulary, C candidates.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import torch
from torch import Tensor


class Stream(IntEnum):
    """Independent noise for independent purposes; the numbers are part of the seed contract."""

    TARGET = 0
    """The target's own sample, shared with a coupled draft."""
    DRAFT = 1
    """The draft's sample when it must not know the target's noise (rejection)."""
    ACCEPT = 2
    """Acceptance uniforms of rejection verification."""
    RECOVER = 3
    """The recovered or bonus token of rejection and of sample-and-match."""


def _int64(value: int) -> int:
    """Wrap any integer into the signed 64-bit range."""
    value &= 0xFFFF_FFFF_FFFF_FFFF
    return value - (1 << 64) if value >= 1 << 63 else value


_TOKEN_STEP: Final = _int64(0x9E3779B97F4A7C15)
_POSITION_STEP: Final = _int64(0xD1B54A32D192ED03)
_STREAM_STEP: Final = _int64(0x8CB92BA72F3D8DD7)
_MULTIPLY_1: Final = _int64(0xBF58476D1CE4E5B9)
_MULTIPLY_2: Final = _int64(0x94D049BB133111EB)

_NUM_BITS: Final = 52  # (integer + 0.5) * 2**-52 is then exact in float64 and never 0 or 1
_LN2: Final = 0.6931471805599453
_LN2_TAIL: Final = 2.3190468138462996e-17  # ln 2 - _LN2
_SQRT_HALF_BITS: Final = 0x3FE6A09E667F3BCD
# atanh series 1 + s/3 + s^2/5 + ...: s <= 0.0295 makes the first term left out less than 1e-17
_ATANH_COEFFICIENTS: Final = tuple(1.0 / (2 * n + 1) for n in range(11))

_MARGIN: Final = 1.0  # above the largest error of the float32 noise (0.8, where 1 - v underflows; else 0.05)
_FLOAT32_EPS: Final = 2.0**-22  # a few roundings of score + noise
_CACHED_ENTRIES: Final = 1 << 17  # 1 MiB of int64


def gumbel(
    seed: int | Tensor,
    positions: Tensor,
    tokens: int | Tensor,
    stream: Stream = Stream.TARGET,
) -> Tensor:
    """Exact noise, float64 [N, V] for a vocabulary size, or [N, C] for token ids [N, C] or [C].

    Args:
        seed: one seed, or int64 [N].
        positions: [N], index in the whole sequence (prompt and output) of the token being sampled.
        tokens: vocabulary size, or token ids.
        stream: what the noise is for.
    """
    keys = _row_keys(seed, positions, stream)
    if isinstance(tokens, int):
        tokens = torch.arange(tokens, device=keys.device)
    return _exact_gumbel(_bits(keys[:, None], tokens))


def uniform(seed: int | Tensor, positions: Tensor, stream: Stream = Stream.ACCEPT) -> Tensor:
    """One uniform number in (0, 1) per row, float64 [N]."""
    keys = _row_keys(seed, positions, stream)
    return _unit(_bits(keys, torch.zeros_like(keys)))


def gumbel_argmax(scores: Tensor, seed: int | Tensor, positions: Tensor, stream: Stream = Stream.TARGET) -> Tensor:
    """Sample a token per row, distributed as softmax(scores): argmax(scores + noise), int64 [N]."""
    return gumbel_topk(scores, seed, positions, 1, stream)[0][:, 0]


def gumbel_topk(
    scores: Tensor,
    seed: int | Tensor,
    positions: Tensor,
    k: int,
    stream: Stream = Stream.TARGET,
    *,
    reach: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The k tokens with the largest scores + noise, best first: int64 [N, k], and these sums, float64 [N, k].

    Float32 noise over the vocabulary selects the few tokens that can be among the best; the exact noise
    decides among these, so the result is that of the exact noise everywhere. Where a row has fewer than k
    possible tokens (finite scores), the rest are -1, with sum -inf.

    Args:
        scores: [N, V], -inf for excluded tokens.
        seed: one seed, or int64 [N].
        positions: [N].
        k: how many tokens per row.
        stream: what the noise is for.
        reach: leave out tokens whose score is further below the row's best than this, for a draft: it costs no noise
            over the vocabulary, and misses only what would be sampled with a probability under exp(-reach) each.
    """
    keys = _row_keys(seed, positions, stream).to(scores.device)
    num_rows, vocab_size = scores.shape
    if reach is None:
        rows, tokens = _candidates(scores, keys, min(k, vocab_size))
    else:
        possible = (scores >= scores.amax(dim=1, keepdim=True) - reach) & (scores > -torch.inf)
        rows, tokens = possible.nonzero(as_tuple=True)
    values = scores[rows, tokens].double() + _exact_gumbel(_bits(keys.expand(num_rows)[rows], tokens))
    return _topk_of_candidates(rows, tokens, values, num_rows, k)


def _candidates(scores: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows and tokens (in order) of every entry that may be among its row's k best."""
    noisy = _noisy(scores, keys)
    kth = noisy.amax(dim=1) if k == 1 else noisy.topk(k, dim=1).values[:, -1]
    threshold = kth - (_MARGIN + _FLOAT32_EPS * kth.abs())
    possible = noisy >= threshold.clamp_(min=torch.finfo(noisy.dtype).min)[:, None]  # never -inf
    rows, tokens = possible.nonzero(as_tuple=True)
    return rows, tokens


def _noisy(scores: Tensor, keys: Tensor) -> Tensor:
    """Scores with float32 noise, [N, V]."""
    num_rows, vocab_size = scores.shape
    noisy = torch.empty_like(scores)
    # A dozen passes over 64-bit integers: on a CPU they stay in the cache if they go piece by piece.
    width = max(1, _CACHED_ENTRIES // max(1, num_rows)) if scores.device.type == "cpu" else vocab_size
    for start in range(0, vocab_size, width):
        stop = min(vocab_size, start + width)
        tokens = torch.arange(start, stop, device=scores.device)
        noise = _approximate_negative_gumbel(_bits(keys[:, None], tokens))
        torch.sub(scores[:, start:stop], noise, out=noisy[:, start:stop])
    return noisy


def _topk_of_candidates(rows: Tensor, tokens: Tensor, values: Tensor, num_rows: int, k: int) -> tuple[Tensor, Tensor]:
    """Best k tokens of each row among its candidates: pad the ragged rows, then sort once."""
    counts = torch.bincount(rows, minlength=num_rows)
    slots = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    width = max(k, int(counts.max()) if num_rows else 0)
    padded = values.new_full((num_rows, width), -torch.inf)
    padded_tokens = tokens.new_full((num_rows, width), -1)
    padded[rows, slots] = values
    padded_tokens[rows, slots] = tokens
    best = padded.topk(k, dim=1)
    return padded_tokens.gather(1, best.indices), best.values


def _row_keys(seed: int | Tensor, positions: Tensor, stream: Stream) -> Tensor:
    """One well-mixed key per row, int64 [N]."""
    positions = positions.to(torch.int64)
    if isinstance(seed, int):
        seed = torch.tensor([_int64(seed)], device=positions.device)
    keys = _mix(seed + _TOKEN_STEP)
    keys = _mix(keys + _int64((int(stream) + 1) * _STREAM_STEP))
    return _mix(keys.to(positions.device) + positions * _POSITION_STEP)


def _bits(keys: Tensor, tokens: Tensor) -> Tensor:
    """_NUM_BITS random bits per (key, token), int64."""
    hashed = _mix(keys + (tokens + 1) * _TOKEN_STEP)
    return hashed.bitwise_right_shift_(64 - _NUM_BITS).bitwise_and_((1 << _NUM_BITS) - 1)


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place. The mask makes torch's arithmetic shift a logical one."""
    state ^= (state >> 30).bitwise_and_((1 << 34) - 1)
    state *= _MULTIPLY_1
    state ^= (state >> 27).bitwise_and_((1 << 37) - 1)
    state *= _MULTIPLY_2
    state ^= (state >> 31).bitwise_and_((1 << 33) - 1)
    return state


def _unit(bits: Tensor) -> Tensor:
    """Integer to (0, 1), exactly, float64."""
    return (bits.double() + 0.5) * 2.0**-_NUM_BITS


def _exact_gumbel(bits: Tensor) -> Tensor:
    """-log(-log(1 - v)), float64; 1 - v is exact."""
    return -_log(-_log(1.0 - _unit(bits)))


def _approximate_negative_gumbel(bits: Tensor) -> Tensor:
    """log(-log(1 - v)) in float32: small v (large noise) keeps its relative precision through log1p."""
    unit = bits.float().mul_(2.0**-_NUM_BITS).clamp_(2.0**-53, 1.0 - 2.0**-24)
    return unit.neg_().log1p_().neg_().log_()


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float64, of exactly rounded operations only.

    x = 2^e m with sqrt(1/2) <= m < sqrt(2); log m = 2 atanh(f), f = (m - 1) / (m + 1).
    """
    bits = x.contiguous().view(torch.int64)
    exponent = (bits - _SQRT_HALF_BITS) >> 52
    mantissa = (bits - (exponent << 52)).view(torch.float64)
    f = (mantissa - 1.0) / (mantissa + 1.0)
    s = f * f
    series = torch.full_like(s, _ATANH_COEFFICIENTS[-1])
    for coefficient in reversed(_ATANH_COEFFICIENTS[:-1]):
        series = series * s + coefficient
    e = exponent.double()
    return e * _LN2 + (2.0 * f * series + e * _LN2_TAIL)
