"""Weights of 4 to 8 bits in groups of 32 inputs with scales of their own, for a kernel of ours: `quantised_linear.cpp`.

Shapes: O = output features, I = input features, G = I / 32 groups, S = super-blocks, of `num_groups` groups each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specpool_engine.modeling.cpu.huge_pages import empty_in_huge_pages
from specpool_engine.modeling.cpu.linear.packed import PackedLinear
from specpool_engine.modeling.cpu.native import load_library

GROUP = 32
"""Number of inputs of a group."""
CHUNK = 128
"""Number of outputs to lay out at a time, a multiple of those that lie together: what lies in a core's cache."""
_BLOCK = 32
"""Number of outputs whose weights lie together."""


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """How the weights of a group are written down; `quantised_linear.cpp` says it in full."""

    bits: int
    """Bits of a value: 4, 5, 6 or 8."""
    zero: int = 0
    """Value that stands for a weight of 0; 0 where groups have a least weight of their own instead."""
    num_groups: int = 1
    """Groups of a super-block: 1 where there are none."""
    num_scales: int = 1
    """Scales of a group: 2 where each half has its own."""

    @property
    def multiple(self) -> int:
        """What the number of inputs is a multiple of."""
        return GROUP * self.num_groups

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        """The constants of the kernel for this format."""
        values = {"BITS": self.bits, "ZERO": self.zero, "GROUPS": self.num_groups, "SCALES": self.num_scales}
        return tuple((f"SPECPOOL_{name}", value) for name, value in values.items())


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Weights of some outputs: `scale * (value - zero)`, or `scale * value + least`.

    Without super-blocks `scales` and `leasts` are [O, G] in float16. With them both are 8-bit integers, [O, G * scales
    of a group] and [O, G], which `factors` [O, S] in float16 multiply, one tensor for the scales, one for the leasts.
    """

    values: Tensor
    """[O, I], 8 bits without a sign."""
    scales: Tensor
    """Scale of every group, or of each half of it."""
    leasts: Tensor | None = None
    """Least weight of every group."""
    factors: tuple[Tensor, ...] = ()
    """Of super-blocks, [O, S] each."""


class QuantisedLinear(PackedLinear):
    """`nn.Linear` with given quantised weights, for AVX2 or AVX-512 VNNI. Inputs are rounded to 8 bits, in groups.

    A row's result does not depend on the number of rows.
    """

    def __init__(self, linear: nn.Linear, block_format: BlockFormat, chunks: Iterable[Blocks]) -> None:
        """`linear` has the sizes and the bias; `chunks` are its weights, `CHUNK` outputs at a time."""
        super().__init__(linear)
        self._bias = None if linear.bias is None else linear.bias.detach().float().contiguous()
        self._padding = -self.in_features % block_format.multiple
        self._weight = _in_blocks(chunks, block_format, self.out_features, self.in_features + self._padding)
        self._kernel = load_library("quantised_linear", block_format.defines).specpool_quantised_linear
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


def _in_blocks(chunks: Iterable[Blocks], form: BlockFormat, out_features: int, in_features: int) -> Tensor:
    """All weights as one stream of bytes, see quantised_linear.cpp."""
    packed: Tensor | None = None
    start = 0
    for chunk in chunks:
        blocks = _laid_out(chunk, form)  # [blocks of outputs, bytes]
        if packed is None:
            packed = empty_in_huge_pages(-(-out_features // _BLOCK) * blocks.shape[1], torch.uint8)
        flat = blocks.flatten()
        packed[start : start + len(flat)] = flat
        start += len(flat)
    if packed is None or start != len(packed):
        raise ValueError(f"the weights are not those of {out_features} outputs and {in_features} inputs")
    return packed


def _laid_out(chunk: Blocks, form: BlockFormat) -> Tensor:  # [blocks of outputs, bytes]
    missing = -chunk.values.shape[0] % _BLOCK
    num_supers = chunk.values.shape[1] // form.multiple

    def blocks(tensor: Tensor, *inner: int) -> Tensor:  # [O, n] -> [blocks, S, *inner, 32]
        return F.pad(tensor, (0, 0, 0, missing)).view(-1, _BLOCK, num_supers, *inner).movedim(1, -1)

    def as_bytes(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(torch.uint8)

    num_groups = form.num_groups
    scales_inner = (num_groups,) if form.num_scales == 1 else (num_groups, form.num_scales)
    of_group = [as_bytes(blocks(chunk.scales, *scales_inner)).flatten(3)]
    if chunk.leasts is not None:
        of_group.append(as_bytes(blocks(chunk.leasts, num_groups)))
    # [blocks, S, groups, 4 parts, 2, 4 inputs, 32 outputs] -> outputs before the 4 inputs
    values = blocks(chunk.values, num_groups, 4, 2, 4).transpose(-1, -2)
    if form.bits == 8:
        of_group.append(values.flatten(3))
    else:
        of_group.append((values[..., 0, :, :] & 15 | values[..., 1, :, :] << 4).flatten(3))
    if 4 < form.bits < 8:
        num_bits = form.bits - 4
        together = (values >> 4).reshape(*values.shape[:3], -1, 8 // num_bits, 64)
        of_group.append(sum(together[..., n, :] << num_bits * n for n in range(8 // num_bits)).flatten(3))  # type: ignore[union-attr]
    of_super = [as_bytes(blocks(factor)) for factor in chunk.factors]
    return torch.cat([*of_super, torch.cat(of_group, dim=-1).flatten(2)], dim=-1).flatten(1)
