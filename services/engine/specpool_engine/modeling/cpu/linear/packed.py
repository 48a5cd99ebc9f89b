"""What all packed layers are: a product that a compiler of the model around it leaves as it is.

Shapes: M = rows, I = input features, O = output features.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from weakref import WeakValueDictionary

from torch import Tensor, nn

from specpool_engine.modeling.cpu.operators import define_operator

_layers: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()
_next_id = itertools.count()


class PackedLinear(nn.Module, ABC):
    """A linear layer whose weight is in a layout that only its own kernel knows.

    Its product is an operator that looks the layer up by number.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._id = next(_next_id)
        _layers[self._id] = self

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        """The layer's output for inputs of any shape that ends with I features."""
        return self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def product(self, rows: Tensor) -> Tensor:  # [M, I] -> [M, O]
        """What `multiply` computes, as an operator that a compiler can keep in its graph."""
        return _multiply(rows, self._id, self.out_features)

    @abstractmethod
    def multiply(self, rows: Tensor) -> Tensor:  # [M, I] -> [M, O]
        """Call the kernel: the product with the weight and, unless the layer says otherwise, the bias."""


_multiply = define_operator(
    "packed_linear(Tensor rows, int layer, int out_features) -> Tensor",
    lambda rows, layer, out_features: _layers[layer].multiply(rows),
    fake=lambda rows, layer, out_features: rows.new_empty(rows.shape[0], out_features),
)
