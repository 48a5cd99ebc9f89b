"""Layers of one parent over the same input as one product: with few rows, a layer costs about as much to start as to
read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_SHARE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names, in `transformers`, of layers that read the same input."""


class FusedLinear:
    """Layers that share an input: the first of them to be called runs the product for all."""

    def __init__(self, product: nn.Module, sizes: Sequence[int]) -> None:
        self._product = product
        self._sizes = list(sizes)
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def part(self, x: Tensor, index: int) -> Tensor:  # [..., I] -> [..., sizes[index]]
        """Output of one layer. A result is handed out once, and only for the very tensor it was computed from."""
        if self._input is not x or self._outputs[index] is None:
            self._input, self._outputs = x, list(self._product(x).split(self._sizes, dim=-1))
        output = self._outputs[index]
        assert output is not None
        self._outputs[index] = None
        if not any(part is not None for part in self._outputs):
            self._input = None
        return output


class LinearPart(nn.Module):
    """One layer of a `FusedLinear`, in the place where the model looks for it."""

    def __init__(self, fused: FusedLinear, index: int) -> None:
        super().__init__()
        self._fused = fused
        self._index = index

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        """The layer's part of the fused product; computes the product if no other layer did for this input."""
        return self._fused.part(x, self._index)


def linear_groups(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Every linear layer once: its parent, and the names of those that share an input."""
    for parent in model.modules():
        names = [name for name, child in parent.named_children() if type(child) is nn.Linear]
        for group in _SHARE_INPUT:
            if set(group) <= set(names) and len({parent.get_submodule(name).in_features for name in group}) == 1:
                yield parent, group
                names = [name for name in names if name not in group]
        yield from ((parent, (name,)) for name in names)


def replace_group(parent: nn.Module, names: Sequence[str], convert: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace layers of `parent` over one input by what `convert` makes of all of them as one layer."""
    layers: list[Any] = [parent.get_submodule(name) for name in names]
    if len(layers) == 1:
        setattr(parent, names[0], convert(layers[0]))
        return
    fused = FusedLinear(convert(concatenated(layers)), [layer.out_features for layer in layers])
    for index, name in enumerate(names):
        setattr(parent, name, LinearPart(fused, index))


def concatenated(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer with the outputs of all `layers`."""
    size = sum(layer.out_features for layer in layers)
    joined = nn.Linear(layers[0].in_features, size, bias=any(layer.bias is not None for layer in layers), device="meta")
    joined.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
    if joined.bias is not None:
        biases = [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
        joined.bias = nn.Parameter(torch.cat([bias.detach() for bias in biases]), requires_grad=False)
    return joined
