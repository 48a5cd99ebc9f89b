"""Torch operators of our own: what a compiler of the model around them leaves as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library: Any = torch.library.Library("specpool", "FRAGMENT")  # type: ignore[no-untyped-call]


def define_operator(
    schema: str, implementation: Callable[..., Tensor], *, fake: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Register `specpool::NAME` of `schema`, NAME(types) -> Tensor, and return it.

    `fake` takes the same arguments and returns an empty tensor of the shape, strides and data type of the result.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"specpool::{name}", fake, lib=_library)
    operator: Callable[..., Tensor] = getattr(torch.ops.specpool, name).default
    return operator
