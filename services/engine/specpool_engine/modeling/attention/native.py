"""Attention on CPUs by a kernel of our own, which reads keys and values in the blocks where they lie.

A query's result depends on its own query, position and sequence only, bit for bit: not on what else is in the forward,
on the number of threads, or on where the blocks lie. So one token and a verification of several round alike. How, and
how branches share reads, is told in `paged_attention.cpp`.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specpool_engine.modeling.attention.interface import KVStorage, PackedAttention, PackedSegment, unavailable
from specpool_engine.modeling.cpu.native import load_library
from specpool_engine.modeling.paged_kv import num_blocks_for

NAME = "native"
DTYPES = (torch.float32, torch.bfloat16)


class NativeBackend:
    """Attention by our own C++ kernel for CPUs, over the blocks where they lie."""

    name = NAME
    has_static_attention = False

    def check(self, *, dtype: torch.dtype, device: torch.device, block_size: int, head_dim: int | None = None) -> None:
        """Raise `InvalidArgument` unless it runs here: a CPU, a data type that the kernel knows, and a compiler."""
        if device.type != "cpu":
            raise unavailable(NAME, f"it is for the CPU only, and the device is {device}", accepted="cpu")
        if dtype not in DTYPES:
            raise unavailable(NAME, f"it needs float32 or bfloat16, got {dtype}", accepted="float32, bfloat16")
        _kernel()
        _write_kernel()

    def prepare(self, segments: Sequence[PackedSegment], storage: KVStorage) -> PackedAttention:
        """Make the block tables of the segments, in the layout that the kernel reads."""
        return NativeAttention(segments, storage)

    def write(self, storage: KVStorage, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Copy token by token, head by head: in a small forward torch's indexed copies take as long as attention."""
        write = _write_kernel()
        for cache, states in ((storage.keys, key), (storage.values, value)):
            rows = states.to(cache.dtype)
            if rows.stride(-1) != 1:
                rows = rows.contiguous()
            _, num_heads, num_tokens, head_dim = rows.shape
            write(
                rows.data_ptr(),
                cache.data_ptr() + layer * cache.stride(0) * cache.itemsize,
                slots.data_ptr(),
                num_tokens,
                num_heads,
                rows.stride(1) * cache.itemsize,
                rows.stride(2) * cache.itemsize,
                head_dim * cache.itemsize,
            )

    def static_attention(self, storage: KVStorage, *, max_tokens: int, max_context: int) -> None:
        """Return None: CPUs have no CUDA graphs."""


class _Forward(ctypes.Structure):
    """The C struct `SpecpoolAttentionForward` of `paged_attention.cpp`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("segments", "tables", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("num_segments", "layer_size", "block_size", "num_kv_heads", "head_dim")),
        ("is_bfloat16", ctypes.c_int64),
    )


class _Call(ctypes.Structure):
    """The C struct `SpecpoolAttentionCall` of `paged_attention.cpp`, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "output")),
        *((name, ctypes.c_int64) for name in ("layer", "head_stride", "token_stride", "element_stride")),
        *((name, ctypes.c_int64) for name in ("num_heads", "sliding_window", "num_threads")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
    )


class NativeAttention:
    """Block tables of one forward, for the kernel; made once, used by every layer."""

    def __init__(self, segments: Sequence[PackedSegment], storage: KVStorage) -> None:
        assert storage.keys.is_contiguous()
        assert storage.values.is_contiguous()
        _, num_blocks, block_size, num_kv_heads, head_dim = storage.keys.shape
        # Arrays rather than tensors: they are made faster. The structure holds addresses only, so they are kept here.
        self._segments, self._tables = array("i"), array("i")
        for segment in segments:
            self._segments.extend((segment.offset, segment.num_tokens, segment.kv.length, len(self._tables)))
            self._tables.extend(segment.kv.block_ids[: num_blocks_for(segment.end, block_size)])
        self._storage = storage
        self._dtype = storage.keys.dtype
        self._forward = _Forward(
            self._segments.buffer_info()[0],
            self._tables.buffer_info()[0],
            storage.keys.data_ptr(),
            storage.values.data_ptr(),
            len(segments),
            num_blocks * block_size * num_kv_heads * head_dim,
            block_size,
            num_kv_heads,
            head_dim,
            self._dtype is torch.bfloat16,
        )
        self._kernel = _kernel()

    def attend(
        self,
        layer: int,
        query: Tensor,  # [1, H, T, D]
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:  # [1, T, H, D]
        """Attend by one call of the kernel, for all segments and heads."""
        rows = query if query.dtype is self._dtype else query.to(self._dtype)
        _, num_heads, num_tokens, head_dim = rows.shape
        output = rows.new_empty(1, num_tokens, num_heads, head_dim)
        call = _Call(
            rows.data_ptr(),
            output.data_ptr(),
            layer,
            *rows.stride()[1:],
            num_heads,
            sliding_window or 0,
            torch.get_num_threads(),
            scaling,
            softcap or 0.0,
        )
        self._kernel(self._forward, call)
        return output if rows is query else output.to(query.dtype)


@functools.cache
def _write_kernel() -> Any:
    kernel = load_library("kv_write").specpool_write_kv
    kernel.argtypes = (*[ctypes.c_void_p] * 3, *[ctypes.c_long] * 5)
    kernel.restype = None
    return kernel


def _kernel() -> Any:
    kernel = load_library("paged_attention").specpool_attend
    kernel.argtypes = (ctypes.POINTER(_Forward), ctypes.POINTER(_Call))
    kernel.restype = None
    return kernel
