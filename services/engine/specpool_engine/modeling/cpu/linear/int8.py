"""int8 weights, quantised per output channel, through FBGEMM; inputs are quantised per token."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from specpool_engine.modeling.cpu.linear.packed import PackedLinear


class Int8Linear(PackedLinear):
    """`nn.Linear` with weights rounded to 8 bits, one scale per output, and inputs rounded on the way."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp_min(1e-12) / 127.0
        zero_points = torch.zeros(self.out_features, dtype=torch.long)
        with warnings.catch_warnings():
            # torch deprecates quantised tensors, yet FBGEMM's prepacking, its fastest kernel here, takes nothing else.
            warnings.simplefilter("ignore", UserWarning)
            quantised = torch.quantize_per_channel(weight, scales, zero_points, 0, torch.qint8)
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self._weight = torch.ops.quantized.linear_prepack(quantised, None)
        # Without VNNI instructions FBGEMM saturates 16-bit sums unless the inputs have 7 bits.
        self._reduce_range = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        """The layer's output, approximately: every row is scaled on its own before it is rounded."""
        rows = x.reshape(-1, self.in_features).float()
        # FBGEMM quantises all rows with one scale: bring every row to the same range first, or one row with large
        # values would take the precision of all others.
        scale = rows.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
        output = self.product(rows / scale) * scale
        if self.bias is not None:
            output = output + self.bias
        return output.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def multiply(self, rows: Tensor) -> Tensor:
        """The product of rows that are scaled already, without the bias."""
        output: Tensor = torch.ops.quantized.linear_dynamic(rows, self._weight, self._reduce_range)
        return output
