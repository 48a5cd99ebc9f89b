"""4-bit weights, every 32 inputs of an output with a scale of their own, rounded here: see `quantised`.

A draft's step takes about as long as reading its weights: these are half the bytes of int8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specpool_engine.modeling.cpu.linear.quantised import CHUNK, GROUP, BlockFormat, Blocks, QuantisedLinear

INT4 = BlockFormat(bits=4, zero=8)
"""The format of `int4`, which is GGUF's Q4_0."""
_TRIED_SCALES = (1.0, 0.96, 0.92, 0.88, 0.84, 1.04, -1.0, -1.07, -1.14)
"""Factors, to be tried, of the scale that brings the largest weight to -8; a negative one brings it to the other end,
where 7 is the most."""


class Int4Linear(QuantisedLinear):
    """`nn.Linear`, approximately: its weights are rounded to 4 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, INT4, map(_rounded, torch.split(linear.weight.detach(), CHUNK)))


def _rounded(rows: Tensor) -> Blocks:  # [O, I]
    filled = F.pad(rows.float(), (0, -rows.shape[1] % GROUP))
    values, scales = round_to_4_bits(filled.view(len(rows), -1, GROUP))
    return Blocks(values=(values + INT4.zero).to(torch.uint8).flatten(1), scales=scales)


def round_to_4_bits(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Integers from -8 to 7 and float16 scales [...] of `groups` [..., 32], with the least squared error tried."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = best_scale = least = None
    for share in _TRIED_SCALES:
        scale = (largest * (-share / 8)).half().float()
        scale = scale.where(scale != 0, 1.0)  # nothing but zeros, or as good as that
        values = (groups / scale).round_().clamp_(-8, 7)
        error = (values * scale - groups).square_().sum(-1, keepdim=True)
        if best is None or best_scale is None or least is None:
            best, best_scale, least = values, scale, error
        else:
            is_better = error < least
            best, best_scale = values.where(is_better, best), scale.where(is_better, best_scale)
            least = error.minimum(least)
    assert best is not None
    assert best_scale is not None
    return best, best_scale.squeeze(-1).half()
