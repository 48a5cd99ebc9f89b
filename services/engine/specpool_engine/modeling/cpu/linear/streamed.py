"""Weights in bfloat16 that a kernel of our own, `streamed_linear.cpp`, reads as one stream."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specpool_engine.modeling.cpu.huge_pages import empty_in_huge_pages
from specpool_engine.modeling.cpu.linear.packed import PackedLinear
from specpool_engine.modeling.cpu.native import load_library

_BLOCK = 32
"""Number of outputs whose weights lie together."""


class StreamedLinear(PackedLinear):
    """`nn.Linear` in bfloat16, on CPUs with AVX-512 bf16.

    A row's result does not depend on the number of rows: prefill, one token and a verification round alike.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._bias = None if linear.bias is None else linear.bias.detach().float().contiguous()
        self._weight = _in_blocks(linear.weight.detach())
        self._kernel = load_library("streamed_linear").specpool_streamed_linear
        self._kernel.argtypes = (*[ctypes.c_void_p] * 4, *[ctypes.c_long] * 3, ctypes.c_int)
        self._kernel.restype = None

    def multiply(self, rows: Tensor) -> Tensor:
        """The product with the bias; a row's result does not depend on the other rows."""
        num_rows = rows.shape[0]
        rows = rows.contiguous()
        if self.in_features % 2:
            rows = F.pad(rows, (0, 1))
        output = rows.new_empty(num_rows, self.out_features)
        bias = None if self._bias is None else self._bias.data_ptr()
        addresses = (rows.data_ptr(), self._weight.data_ptr(), bias, output.data_ptr())
        self._kernel(*addresses, num_rows, rows.shape[1], self.out_features, torch.get_num_threads())
        return output


def _in_blocks(weight: Tensor) -> Tensor:  # [O, I] -> flat [O / 32, I / 2, 32, 2], filled up with zeros
    out_features, in_features = weight.shape
    num_blocks, num_pairs = -(-out_features // _BLOCK), -(-in_features // 2)
    packed = empty_in_huge_pages(num_blocks * num_pairs * _BLOCK * 2, weight.dtype)
    blocks = packed.view(num_blocks, num_pairs, _BLOCK, 2)
    for block, rows in zip(blocks, torch.split(weight, _BLOCK), strict=True):
        filled = F.pad(rows, (0, in_features % 2, 0, _BLOCK - rows.shape[0]))
        block.copy_(filled.view(_BLOCK, num_pairs, 2).transpose(0, 1))
    return packed
