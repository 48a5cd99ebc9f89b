"""How many blocks a KV cache gets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specpool.errors import InvalidArgument

CPU_KV_CACHE_BYTES = 1 << 30
GPU_KV_CACHE_SHARE = 0.85
"""Of the memory that is left after the weights are loaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KVBudget:
    """Size of one KV cache: a number of blocks, or of bytes, or what the device has."""

    num_blocks: int | None = None
    """Set: the number of blocks, whatever they need."""
    num_bytes: int | None = None
    """Set: bytes of all blocks together."""
    block_size: int = 16
    """Tokens per block."""

    def blocks(self, bytes_per_token: int, device: torch.device) -> int:
        """How many blocks there may be. Without a number this reads what is free, so the weights must be there.

        Raises:
            InvalidArgument: if not even one block fits.
        """
        if self.num_blocks is not None:
            return self.num_blocks
        block_bytes = bytes_per_token * self.block_size
        num_bytes = self.num_bytes or _default_bytes(device)
        if num_bytes < block_bytes:
            raise InvalidArgument(
                f"kv_cache_bytes {num_bytes} is less than one block of {block_bytes} bytes",
                metadata={"field": "kv_cache_bytes", "value": num_bytes},
            )
        return num_bytes // block_bytes


def _default_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_KV_CACHE_BYTES
    num_free_bytes, _ = torch.cuda.mem_get_info(device)
    return int(num_free_bytes * GPU_KV_CACHE_SHARE)
