"""How many blocks a KV cache gets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specpool.errors import InvalidArgument

CPU_KV_CACHE_BYTES = 1 << 30
GPU_KV_CACHE_SHARE = 0.85
"""Share of the memory that is left after the weights are loaded."""
CUDA_CONTEXT_BYTES = 1 << 29
"""Bytes that a process needs on the device besides tensors, roughly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KVBudget:
    """Size of one KV cache: a number of blocks, or of bytes, or what the device has."""

    num_blocks: int | None = None
    """Number of blocks, whatever they need; None: by bytes."""
    num_bytes: int | None = None
    """Bytes of all blocks together; None: what the device has."""
    block_size: int = 16
    """Number of tokens per block."""
    memory_share: float = 1.0
    """Share of a GPU's memory that this process may use, weights included."""

    def blocks(self, bytes_per_token: int, device: torch.device) -> int:
        """The number of blocks there may be. Without one given this reads what is free, so the weights must be there.

        Raises:
            InvalidArgument: if not even one block fits.
        """
        if self.num_blocks is not None:
            return self.num_blocks
        block_bytes = bytes_per_token * self.block_size
        num_bytes = self.num_bytes or self._default_bytes(device)
        if num_bytes < block_bytes and self.memory_share < 1.0 and not self.num_bytes:
            raise InvalidArgument(
                f"device_memory_share {self.memory_share:g} has no room for a KV cache beside the weights",
                metadata={"field": "device_memory_share", "value": self.memory_share},
            )
        if num_bytes < block_bytes:
            raise InvalidArgument(
                f"kv_cache_bytes {num_bytes} is less than one block of {block_bytes} bytes",
                metadata={"field": "kv_cache_bytes", "value": num_bytes},
            )
        return num_bytes // block_bytes

    def _default_bytes(self, device: torch.device) -> int:
        if device.type != "cuda":
            return CPU_KV_CACHE_BYTES
        num_free, num_total = torch.cuda.mem_get_info(device)
        return bytes_left(
            total=num_total, free=num_free, used=torch.cuda.memory_reserved(device), share=self.memory_share
        )


def bytes_left(*, total: int, free: int, used: int, share: float) -> int:
    """The bytes that a process which has loaded its weights has for its KV cache.

    Args:
        total: of the device.
        free: on the device now, whoever uses the rest.
        used: by this process, its CUDA context excepted.
        share: of `total` that this process may use; below 1 it does not depend on who started first.
    """
    if share == 1.0:
        return int(free * GPU_KV_CACHE_SHARE)
    mine = int(share * total) - used - CUDA_CONTEXT_BYTES
    return max(0, int(min(free, mine) * GPU_KV_CACHE_SHARE))
