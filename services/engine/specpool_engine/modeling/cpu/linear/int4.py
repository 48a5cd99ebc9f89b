"""4-bit weights, every 32 inputs of an output with a scale of their own, for a kernel of ours: `int4_linear.cpp`.

A draft's step takes about as long as reading its weights: these are half the bytes of int8.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specpool_engine.modeling.cpu.huge_pages import empty_in_huge_pages
from specpool_engine.modeling.cpu.linear.packed import PackedLinear
from specpool_engine.modeling.cpu.native import load_library

_GROUP = 32
"""Number of inputs that share a scale."""
_BLOCK = 32
"""Number of outputs whose weights lie together."""
_SCALE_BYTES = 2 * _BLOCK
_GROUP_BYTES = _SCALE_BYTES + _BLOCK * _GROUP // 2
_TRIED_SCALES = (1.0, 0.96, 0.92, 0.88, 0.84, 1.04, -1.0, -1.07, -1.14)
"""Factors, to be tried, of the scale that brings the largest weight to -8; a negative one brings it to the other end,
where 7 is the most."""


class Int4Linear(PackedLinear):
    """`nn.Linear`, approximately, for AVX2 or AVX-512 VNNI. Inputs are rounded to 8 bits, in the same groups."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._bias = None if linear.bias is None else linear.bias.detach().float().contiguous()
        self._weight = _in_blocks(linear.weight.detach())
        self._padding = -self.in_features % _GROUP
        self._kernel = load_library("int4_linear").specpool_int4_linear
        self._kernel.argtypes = (*[ctypes.c_void_p] * 4, *[ctypes.c_long] * 3, ctypes.c_int)
        self._kernel.restype = None

    def multiply(self, rows: Tensor) -> Tensor:
        """The product with the bias, of inputs that are rounded to 8 bits in groups."""
        inputs = rows.float().contiguous()
        if self._padding:
            inputs = F.pad(inputs, (0, self._padding))
        output = inputs.new_empty(rows.shape[0], self.out_features)
        bias = None if self._bias is None else self._bias.data_ptr()
        addresses = (inputs.data_ptr(), self._weight.data_ptr(), bias, output.data_ptr())
        self._kernel(*addresses, *inputs.shape, self.out_features, torch.get_num_threads())
        return output.to(rows.dtype)


def _in_blocks(weight: Tensor) -> Tensor:  # [O, I] -> flat bytes, see int4_linear.cpp
    out_features, in_features = weight.shape
    num_blocks, num_groups = -(-out_features // _BLOCK), -(-in_features // _GROUP)
    packed = empty_in_huge_pages(num_blocks * num_groups * _GROUP_BYTES, torch.uint8)
    blocks = packed.view(num_blocks, num_groups, _GROUP_BYTES)
    for block, rows in zip(blocks, torch.split(weight, _BLOCK), strict=True):
        filled = F.pad(rows.float(), (0, -in_features % _GROUP, 0, _BLOCK - rows.shape[0]))
        values, scales = round_to_4_bits(filled.view(_BLOCK, num_groups, _GROUP).transpose(0, 1))
        block[:, :_SCALE_BYTES] = scales.contiguous().view(torch.uint8)
        # [groups, 32 outputs, 32 inputs] -> [groups, 4, low or high half, 2 x 16 outputs, 4 inputs]
        parts = (values + 8).to(torch.uint8).view(num_groups, _BLOCK, 4, 2, 4).permute(0, 2, 3, 1, 4)
        block[:, _SCALE_BYTES:] = (parts[:, :, 0] | parts[:, :, 1] << 4).reshape(num_groups, -1)
    return packed


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
