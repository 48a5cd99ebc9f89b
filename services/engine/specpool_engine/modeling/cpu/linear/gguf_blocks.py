"""GGUF's quantised blocks taken apart, losing nothing: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K.

The layouts are those of ggml's `ggml-common.h`. Shapes: O = outputs, B = blocks of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from specpool_engine.modeling.cpu.linear.quantised import BlockFormat, Blocks

FORMATS: Mapping[str, BlockFormat] = {
    "Q4_0": BlockFormat(bits=4, zero=8),
    "Q4_1": BlockFormat(bits=4),
    "Q5_0": BlockFormat(bits=5, zero=16),
    "Q5_1": BlockFormat(bits=5),
    "Q8_0": BlockFormat(bits=8, zero=128),
    "Q4_K": BlockFormat(bits=4, num_groups=8),
    "Q5_K": BlockFormat(bits=5, num_groups=8),
    "Q6_K": BlockFormat(bits=6, zero=32, num_groups=8, num_scales=2),
}
"""Types of blocks that the kernel computes with, by their names in GGUF files."""


def read_blocks(kind: str, raw: Tensor) -> Blocks:  # [O, bytes]
    """Values and scales of blocks of type `kind`, one of `FORMATS`, as the file has them."""
    size = _BLOCK_BYTES[kind]
    return _READERS[kind](raw.view(raw.shape[0], -1, size))


def _halves(raw: Tensor) -> Tensor:  # [O, B, 2] -> [O, B] float16
    return raw.contiguous().view(torch.float16)[..., 0]


def _nibbles(raw: Tensor) -> Tensor:  # [..., n] -> [..., 2 n]: all low halves, then all high ones
    return torch.cat([raw & 15, raw >> 4], dim=-1)


def _rows(raw: Tensor, num: int) -> Tensor:  # [..., num * n] -> [..., num, n]
    return raw.reshape(*raw.shape[:-1], num, -1)


def _q4(raw: Tensor) -> Blocks:
    start = raw.shape[-1] - 16
    leasts = _halves(raw[..., 2:4]) if start == 4 else None
    return Blocks(values=_nibbles(raw[..., start:]).flatten(1), scales=_halves(raw[..., :2]), leasts=leasts)


def _q5(raw: Tensor) -> Blocks:
    start = raw.shape[-1] - 20
    leasts = _halves(raw[..., 2:4]) if start == 4 else None
    fifth = (raw[..., start : start + 4, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)
    values = _nibbles(raw[..., start + 4 :]) | fifth << 4
    return Blocks(values=values.flatten(1), scales=_halves(raw[..., :2]), leasts=leasts)


def _q8(raw: Tensor) -> Blocks:
    return Blocks(values=(raw[..., 2:] ^ 128).flatten(1), scales=_halves(raw[..., :2]))


def _q4_k(raw: Tensor) -> Blocks:
    # 4 times 32 bytes: the low halves are a group, the high ones the next.
    values = _nibbles(_rows(raw[..., 16:], 4))
    return _with_leasts(raw, values)


def _q5_k(raw: Tensor) -> Blocks:
    fifth = raw[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1  # [O, B, 8 groups, 32]
    values = _rows(_nibbles(_rows(raw[..., 48:], 4)).flatten(-2), 8)
    return _with_leasts(raw, values | fifth << 4)


def _with_leasts(raw: Tensor, values: Tensor) -> Blocks:
    first, second, rest = torch.split(raw[..., 4:16], 4, dim=-1)
    scales = torch.cat([first & 63, rest & 15 | first >> 6 << 4], dim=-1)
    leasts = torch.cat([second & 63, rest >> 4 | second >> 6 << 4], dim=-1)
    return Blocks(
        values=values.flatten(1),
        scales=scales.flatten(1),
        leasts=leasts.flatten(1),
        factors=(_halves(raw[..., :2]), -_halves(raw[..., 2:4])),
    )


def _q6_k(raw: Tensor) -> Blocks:
    lower = _nibbles(_rows(raw[..., :128], 2))  # [O, B, 2, 4 x 32]
    pairs = _rows(raw[..., 128:192], 2)[..., None, :] >> torch.arange(0, 8, 2, dtype=torch.uint8)[:, None] & 3
    values = lower.flatten(-2) | pairs.flatten(-3) << 4
    return Blocks(values=values.flatten(1), scales=raw[..., 192:208].flatten(1), factors=(_halves(raw[..., 208:210]),))


_READERS: Mapping[str, Callable[[Tensor], Blocks]] = {
    "Q4_0": _q4,
    "Q4_1": _q4,
    "Q5_0": _q5,
    "Q5_1": _q5,
    "Q8_0": _q8,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
_BLOCK_BYTES = {
    "Q4_0": 18,
    "Q4_1": 20,
    "Q5_0": 22,
    "Q5_1": 24,
    "Q8_0": 34,
    "Q4_K": 144,
    "Q5_K": 176,
    "Q6_K": 210,
}
