"""Tensors that stay where they are and get new contents before each use: what a CUDA graph reads.

All tensors of one `StaticTensors` are parts of one buffer, so that filling them costs one copy to the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16
"""Alignment of tensors, in elements: kernels load several at once."""


class StaticTensors:
    """Named integer tensors on a device, and their contents on the host in memory that the device can read itself."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype, device: torch.device) -> None:
        sizes = {name: -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT for name, shape in shapes.items()}
        total = sum(sizes.values())
        self._host = torch.zeros(total, dtype=dtype, pin_memory=device.type == "cuda")
        self._device = torch.zeros(total, dtype=dtype, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call, unused-ignore]
        self._arrays: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        start = 0
        for name, shape in shapes.items():
            part = slice(start, start + math.prod(shape))
            self._arrays[name] = self._host[part].view(shape).numpy()
            self._tensors[name] = self._device[part].view(shape)
            start += sizes[name]

    def __getitem__(self, name: str) -> Tensor:
        """The tensor on the device: the same one for ever."""
        return self._tensors[name]

    def wait(self) -> None:
        """Wait until the last upload has read the host's memory: to be called before anything is put there."""
        if self._copied is not None:
            self._copied.synchronize()  # type: ignore[no-untyped-call, unused-ignore]

    def put(self, name: str, values: Sequence[int], *, padding: int = 0) -> None:
        """Put new contents into a one-dimensional tensor, on the host; the rest of it becomes `padding`."""
        array = self._arrays[name]
        array[: len(values)] = values
        array[len(values) :] = padding

    def put_rows(self, name: str, rows: Sequence[Sequence[int]]) -> None:
        """Put new beginnings of the first rows into a two-dimensional tensor, on the host; everything else stays."""
        array = self._arrays[name]
        for index, row in enumerate(rows):
            array[index, : len(row)] = row

    def upload(self) -> None:
        """Start the copy of everything to the device, in the order of its current stream."""
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device.device))  # type: ignore[no-untyped-call, unused-ignore]
