"""Counter-based Gumbel noise: a pure function of (seed, position, token, stream).

Two sides that never talk draw the same noise, and a request with a seed continues identically on any
machine. The bits are the same on CPU and GPU and across torch versions because every value is made only of
wrapping int64 operations and of exactly rounded elementwise float64 additions, multiplications and
divisions. (Run it eagerly: a compiler that contracts a multiplication and an addition into one rounding
would change the last bit.)

Gumbel noise is -log E of independent exponential E. Here E of a token is the least E of its block of 64 tokens, drawn
once per block, plus, unless the token is the one that has the least, an exponential of its own: independent
exponentials, since they have no memory. So the best noise of a block is known without looking at its tokens, and an
argmax over a vocabulary looks into a few blocks only.

Shape legend: N rows (one sampled token each), V vocabulary, C candidates, B blocks of W consecutive tokens.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from enum import IntEnum
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from specpool.errors import ConfigError
from specpool.native import load_library

_logger = logging.getLogger(__name__)


class Stream(IntEnum):
    """Independent noise for independent purposes; the numbers are part of the seed contract."""

    TARGET = 0
    """Noise of the target's own sample, shared with a coupled draft."""
    DRAFT = 1
    """Noise of the draft's sample when it must not know the target's (rejection)."""
    ACCEPT = 2
    """Uniform numbers that decide acceptance in rejection verification."""
    RECOVER = 3
    """Noise of the recovered or bonus token of rejection and of sample-and-match."""


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
_MAX_NOISE: Final = 40.91  # of 64 E = -log(1 - 2**-53), rounded up
_MARGIN: Final = 1e-9  # far above the error of our logarithm: bounds hold although it is not quite monotonic
_BLOCK_BITS: Final = 6
_BLOCK_SIZE: Final = 1 << _BLOCK_BITS  # W; part of the seed contract
_BLOCK_STEP: Final = _int64(0xA0761D6478BD642F)
_NUM_TRIED: Final = 8  # blocks per token wanted that are looked into first


def gumbel(
    seed: int | Tensor,
    positions: Tensor,
    tokens: int | Tensor,
    stream: Stream = Stream.TARGET,
) -> Tensor:
    """The exact noise, float64: [N, V] for a vocabulary size, [N, C] for token ids [N, C] or [C].

    Args:
        seed: one seed, or int64 [N].
        positions: [N], index in the whole sequence (prompt and output) of the token being sampled.
        tokens: vocabulary size, or token ids.
        stream: what the noise is for.
    """
    keys = _row_keys(seed, positions, stream)
    if isinstance(tokens, int):
        tokens = torch.arange(tokens, device=keys.device)
    return _noise(keys[:, None], tokens)


def uniform(seed: int | Tensor, positions: Tensor, stream: Stream = Stream.ACCEPT) -> Tensor:
    """One uniform number in (0, 1) per row, float64 [N]."""
    keys = _row_keys(seed, positions, stream)
    return _unit(_hash(keys, torch.zeros_like(keys)))


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

    The largest score and the largest noise of a block of tokens bound their sums, so that noise of tokens is computed
    in few blocks only. Where a row has fewer than k possible tokens (finite scores), the rest are -1, with sum -inf.

    Args:
        scores: [N, V], -inf for excluded tokens.
        seed: one seed, or int64 [N].
        positions: [N].
        k: how many tokens per row.
        stream: what the noise is for.
        reach: leave out tokens whose score is further below the row's best than this, for a draft: it costs no noise
            over the vocabulary, and misses only what would be sampled with a probability under exp(-reach) each.
    """
    if scores.device.type == "cpu" and scores.dtype == torch.float32 and (kernel := _kernel()) is not None:
        return _topk_by_kernel(kernel, scores, seed, positions, k, stream, reach)
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


@functools.cache
def _kernel() -> ctypes.CDLL | None:
    """The same in C++, several times as fast on a CPU and equal bit for bit; None where it cannot be compiled."""
    try:
        library = load_library(Path(__file__).parent / "gumbel.cpp")
    except (ConfigError, OSError) as error:
        _logger.info("noise is computed by torch, which is slower: %s", error)
        return None
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    numbers = (number,) * 4
    library.specpool_gumbel_topk.argtypes = (pointer, number, pointer, pointer, *numbers, real, pointer, pointer)
    library.specpool_gumbel_topk.restype = None
    return library


def _topk_by_kernel(
    kernel: ctypes.CDLL,
    scores: Tensor,
    seed: int | Tensor,
    positions: Tensor,
    k: int,
    stream: Stream,
    reach: float | None,
) -> tuple[Tensor, Tensor]:
    """`gumbel_topk` of scores [N, V] in float32 on a CPU."""
    num_rows, vocab_size = scores.shape
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    if isinstance(seed, int):
        seed = torch.full((num_rows,), _int64(seed))
    seeds = seed.to(torch.int64).expand(num_rows).contiguous()
    positions = positions.to("cpu", torch.int64).expand(num_rows).contiguous()
    tokens = torch.empty(num_rows, k, dtype=torch.int64)
    sums = torch.empty(num_rows, k, dtype=torch.float64)
    kernel.specpool_gumbel_topk(
        scores.data_ptr(), scores.stride(0), seeds.data_ptr(), positions.data_ptr(), num_rows, vocab_size, k,
        int(stream), float("inf") if reach is None else reach, tokens.data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    return tokens, sums


def _blocks(scores: Tensor) -> Tensor:
    """The scores in blocks, [N, B, W]; a view unless the last block must be filled up with -inf."""
    if num_missing := -scores.shape[1] % _BLOCK_SIZE:
        scores = torch.nn.functional.pad(scores, (0, num_missing), value=-torch.inf)
    return scores.view(len(scores), scores.shape[1] // _BLOCK_SIZE, _BLOCK_SIZE)


def _topk_by_bounds(scores: Tensor, blocks: Tensor, best: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`gumbel_topk` of many `blocks` [N, B, W] of scores, given the `best` score of each block [N, B].

    Most often the blocks with the highest bounds hold better sums than any other bound, and that is all.
    """
    numbers = torch.arange(best.shape[1], device=best.device)
    bounds = best + (_MARGIN - _log(_least_of_block(keys[:, None], numbers)[0]))
    tried = bounds.topk(_NUM_TRIED * k + 1, dim=1)
    columns = tried.indices[:, :-1, None]
    tokens = (columns * _BLOCK_SIZE + torch.arange(_BLOCK_SIZE, device=blocks.device)).flatten(1)
    tried_scores = blocks.gather(1, columns.expand(-1, -1, _BLOCK_SIZE)).flatten(1)
    found = (tried_scores.double() + _noise(keys[:, None], tokens)).topk(k, dim=1)
    enough = found.values[:, -1:].clamp(min=_LEAST_FINITE)
    if not (tried.values[:, -1:] >= enough).any():  # nor is any other bound
        tokens = tokens.gather(1, found.indices)
        return tokens.masked_fill_(found.values == -torch.inf, -1), found.values
    rows, tokens = _at_least(blocks, bounds >= enough, enough - _MAX_NOISE)
    return _topk_of_candidates(scores, keys, rows, tokens, k)


def _at_least(blocks: Tensor, near: Tensor, lowest: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and tokens, in order, with scores of at least `lowest` [N, 1] in the `near` blocks [N, B]."""
    rows, columns = near.nonzero(as_tuple=True)
    entries, lanes = (blocks[rows, columns] >= lowest[rows]).nonzero(as_tuple=True)
    return rows[entries], columns[entries] * blocks.shape[2] + lanes


def _topk_of_candidates(scores: Tensor, keys: Tensor, rows: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Best k tokens of each row among its candidates, given in order of rows: pad the ragged rows, then sort once."""
    num_rows = len(scores)
    values = scores[rows, tokens].double() + _noise(keys[rows], tokens)
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


def _noise(keys: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise, float64, of each (key, token)."""
    least, lanes = _least_of_block(keys, tokens >> _BLOCK_BITS)
    further = _exponential(_hash(keys, tokens))
    return -_log(least + further.masked_fill_(lanes == tokens & (_BLOCK_SIZE - 1), 0.0))


def _least_of_block(keys: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Least exponential of W, float64, and which of a block's tokens has it."""
    hashed = _hash(keys ^ _BLOCK_STEP, blocks)
    return _exponential(hashed) * (1.0 / _BLOCK_SIZE), hashed & (_BLOCK_SIZE - 1)


def _hash(keys: Tensor, numbers: Tensor) -> Tensor:
    """64 random bits per (key, number), int64."""
    return _mix(keys + (numbers + 1) * _TOKEN_STEP)


def _mix(state: Tensor) -> Tensor:
    """Scramble 64-bit integers in place, by SplitMix64's finaliser."""
    _xor_shifted(state, 30)
    state *= _MULTIPLY_1
    _xor_shifted(state, 27)
    state *= _MULTIPLY_2
    return _xor_shifted(state, 31)


def _xor_shifted(state: Tensor, shift: int) -> Tensor:
    """state ^= state >> shift, in place. The mask makes torch's arithmetic shift a logical one."""
    state ^= (state >> shift).bitwise_and_((1 << (64 - shift)) - 1)
    return state


def _unit(hashed: Tensor) -> Tensor:
    """The high bits of 64, exactly, as a number in (0, 1), float64."""
    return (((hashed >> (64 - _NUM_BITS)) & ((1 << _NUM_BITS) - 1)).double() + 0.5) * 2.0**-_NUM_BITS


def _exponential(hashed: Tensor) -> Tensor:
    """The exponential -log(1 - v) of the bits as a number v, float64; 1 - v is exact."""
    return -_log(1.0 - _unit(hashed))


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
