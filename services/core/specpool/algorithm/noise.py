"""Counter-based Gumbel noise: a pure function of (seed, position, token, stream).

Two sides that never talk draw the same noise, and a request with a seed continues identically on any
machine. The bits are the same on CPU and GPU and across torch versions because every value is made only of
wrapping int64 operations and of exactly rounded elementwise float64 additions, multiplications and
divisions. (Run it eagerly: a compiler that contracts a multiplication and an addition into one rounding
would change the last bit.)

Shape legend: N rows (one sampled token each), V vocabulary, C candidates, B blocks of W consecutive tokens.
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

_LEAST_FINITE: Final = torch.finfo(torch.float64).min
_MIN_NOISE: Final = -3.62  # of v = 1 - 2**-53, rounded down
_MAX_NOISE: Final = 36.74  # of v = 2**-53, rounded up
_MARGIN: Final = 1e-9  # far above the error of torch's own logarithm, which only bounds use
_BLOCK_SIZE: Final = 64  # W: torch reduces fewer at a time slowly, and more make the bounds less tight
_NUM_TRIED: Final = 16  # blocks per token wanted that are looked into first
_CACHED_ENTRIES: Final = 1 << 16  # half a MiB of int64


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

    The largest score and the smallest hash of a block of tokens bound their sums. Exact noise is computed only in the
    few blocks that may hold one of the best; the result is that of exact noise everywhere. Where a row has fewer than
    k possible tokens (finite scores), the rest are -1, with sum -inf.

    Args:
        scores: [N, V], -inf for excluded tokens.
        seed: one seed, or int64 [N].
        positions: [N].
        k: how many tokens per row.
        stream: what the noise is for.
        reach: leave out tokens whose score is further below the row's best than this, for a draft: it costs no noise
            over the vocabulary, and misses only what would be sampled with a probability under exp(-reach) each.
    """
    keys = _row_keys(seed, positions, stream).to(scores.device).expand(len(scores))
    blocks = _blocks(scores)
    best = blocks.amax(dim=2).double()
    if reach is not None:
        lowest = best.amax(dim=1, keepdim=True) - reach
    elif best.shape[1] <= _NUM_TRIED * k:
        lowest = torch.full_like(best[:, :1], -torch.inf)
    else:
        return _topk_by_bounds(scores, blocks, best, keys, k)
    rows, tokens = _at_least(blocks, best >= lowest.clamp_(min=_LEAST_FINITE), lowest)
    return _topk_of_candidates(scores, keys, rows, tokens, k)


def _blocks(scores: Tensor) -> Tensor:
    """[N, B, W], a view unless the last block must be filled up with -inf."""
    num_rows, vocab_size = scores.shape
    block_size = min(_BLOCK_SIZE, vocab_size)
    if num_missing := -vocab_size % block_size:
        scores = torch.nn.functional.pad(scores, (0, num_missing), value=-torch.inf)
    return scores.view(num_rows, scores.shape[1] // block_size, block_size)


def _topk_by_bounds(scores: Tensor, blocks: Tensor, best: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`gumbel_topk` of many `blocks` [N, B, W] of scores, given the `best` score of each block [N, B].

    Most often the blocks with the highest bounds hold better sums than any other bound, and that is all.
    """
    block_size = blocks.shape[2]
    lowest = best.topk(k, dim=1).values[:, -1:] + _MIN_NOISE - _MAX_NOISE
    bounds = best + _noise_bounds(keys, block_size, best >= lowest.clamp_(min=_LEAST_FINITE))
    tried = bounds.topk(_NUM_TRIED * k + 1, dim=1)
    columns = tried.indices[:, :-1, None]
    tokens = (columns * block_size + torch.arange(block_size, device=blocks.device)).flatten(1)
    tried_scores = blocks.gather(1, columns.expand(-1, -1, block_size)).flatten(1)
    found = (tried_scores.double() + _exact_gumbel(_bits(keys[:, None], tokens))).topk(k, dim=1)
    enough = found.values[:, -1:].clamp(min=_LEAST_FINITE)
    if not (tried.values[:, -1:] >= enough).any():  # nor is any other bound
        tokens = tokens.gather(1, found.indices)
        return tokens.masked_fill_(found.values == -torch.inf, -1), found.values
    rows, tokens = _at_least(blocks, bounds >= enough, enough - _MAX_NOISE)
    noise_bounds = _MARGIN - _unit(_bits(keys[rows], tokens)).log_()
    possible = scores[rows, tokens].double() + noise_bounds >= enough[rows, 0]
    return _topk_of_candidates(scores, keys, rows[possible], tokens[possible], k)


def _noise_bounds(keys: Tensor, block_size: int, wanted: Tensor) -> Tensor:
    """At least the noise of every token of a block, float64 [N, B]; -inf where the block is not `wanted`.

    Noise decreases in v and is below -log v: per token only integers are needed, and of these the smallest of the
    block. The last step of `_mix` is left out, as it changes only the low 33 of the 64 bits.
    """
    device = keys.device
    firsts = torch.arange(wanted.shape[1], device=device) * block_size + 1
    starts = (keys[:, None] + firsts * _TOKEN_STEP).masked_select(wanted)
    steps = torch.arange(block_size, device=device) * _TOKEN_STEP
    # On a CPU a dozen passes over 64-bit integers stay in the cache if they go piece by piece.
    size = max(1, _CACHED_ENTRIES // block_size if device.type == "cpu" else len(starts))
    states, scratch = torch.empty((2, size, block_size), dtype=torch.int64, device=device)
    top = torch.tensor((1 << 63) - 1, device=device)
    turned = torch.empty_like(starts)  # top - smallest hash: torch is slow at minima
    for piece, out in zip(torch.split(starts[:, None], size), torch.split(turned, size), strict=True):
        state, shifted = states[: len(piece)], scratch[: len(piece)]
        torch.add(steps, piece, out=state)
        _xor_shifted(state, 30, shifted)
        state *= _MULTIPLY_1
        _xor_shifted(state, 27, shifted)
        torch.add(top, state, alpha=-_MULTIPLY_2, out=state)
        torch.amax(state, dim=1, out=out)
    smallest = (0.5 - 2.0**-30) - turned.double() * 2.0**-64
    noise = _MARGIN - smallest.clamp_(min=2.0 ** -(_NUM_BITS + 1)).log_()
    return torch.full_like(wanted, -torch.inf, dtype=torch.float64).masked_scatter_(wanted, noise)


def _at_least(blocks: Tensor, near: Tensor, lowest: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and tokens, in order, with scores of at least `lowest` [N, 1] in the `near` blocks [N, B]."""
    rows, columns = near.nonzero(as_tuple=True)
    entries, lanes = (blocks[rows, columns] >= lowest[rows]).nonzero(as_tuple=True)
    return rows[entries], columns[entries] * blocks.shape[2] + lanes


def _topk_of_candidates(scores: Tensor, keys: Tensor, rows: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Best k tokens of each row among its candidates, given in order of rows: pad the ragged rows, then sort once."""
    num_rows = len(scores)
    values = scores[rows, tokens].double() + _exact_gumbel(_bits(keys[rows], tokens))
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
    """SplitMix64's finaliser, in place."""
    _xor_shifted(state, 30)
    state *= _MULTIPLY_1
    _xor_shifted(state, 27)
    state *= _MULTIPLY_2
    return _xor_shifted(state, 31)


def _xor_shifted(state: Tensor, shift: int, shifted: Tensor | None = None) -> Tensor:
    """state ^= state >> shift, in place. The mask makes torch's arithmetic shift a logical one."""
    shifted = torch.bitwise_right_shift(state, shift, out=shifted)
    state ^= shifted.bitwise_and_((1 << (64 - shift)) - 1)
    return state


def _unit(bits: Tensor) -> Tensor:
    """Integer to (0, 1), exactly, float64."""
    return (bits.double() + 0.5) * 2.0**-_NUM_BITS


def _exact_gumbel(bits: Tensor) -> Tensor:
    """-log(-log(1 - v)), float64; 1 - v is exact."""
    return -_log(-_log(1.0 - _unit(bits)))


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
        series.mul_(s).add_(coefficient)
    e = exponent.double()
    return e * _LN2 + (2.0 * f * series + e * _LN2_TAIL)
