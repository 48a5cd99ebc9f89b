"""Weights in oneDNN's blocked layout: same numbers, same data type, reordered once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specpool_engine.modeling.cpu.linear.packed import PackedLinear

_PACKING_ROWS = 8
"""Number of rows that oneDNN chooses the blocked layout for; the layout then serves any number of rows."""
_MIN_ROWS = 4
"""Least rows of a product, to which fewer are padded: oneDNN is slower for one to three rows than for four. Padding
also makes one token and the few tokens of a verification go through one kernel, so that they round alike."""


class PrepackedLinear(PackedLinear):
    """`nn.Linear` through oneDNN with the weight in its blocked layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _PACKING_ROWS)

    def multiply(self, rows: Tensor) -> Tensor:
        """The product with the bias; few rows are padded, so that all numbers of rows go through one kernel."""
        num_rows = rows.shape[0]
        if num_rows < _MIN_ROWS:
            rows = F.pad(rows, (0, 0, 0, _MIN_ROWS - num_rows))
        output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return output[:num_rows]
