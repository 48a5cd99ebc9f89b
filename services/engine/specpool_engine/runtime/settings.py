"""Settings that targets and speculators share. Imports no torch: the command line reads them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from specpool.config import ServiceSettings, Share, invalid
from specpool.rpc.checks import MAX_DRAFT_TOKENS

CudaGraphs = Literal["auto", "on", "off"]
StreamPriority = Literal["normal", "high"]


class EngineConfig(ServiceSettings):
    """What every process with a model has."""

    model: str
    """Model: hub id, directory, GGUF file, optionally with #layers=N."""
    model_name: str = ""
    """Name under which the model is known; empty for the last part of `model`."""
    dtype: str = "bfloat16"
    """float32, bfloat16 or float16."""
    device: str = "cpu"
    """Torch device."""
    device_memory_share: Share = 1.0
    """Share of the GPU's memory for this process, weights and KV cache; below 1 where another process uses it too."""
    stream_priority: StreamPriority = "normal"
    """`high`: this process's kernels go first on a GPU that is shared by CUDA's multi-process service."""
    tensor_parallel: PositiveInt = 1
    """Split the model over so many devices of this machine, `device` and those after it, with a process for each."""
    follower_start_timeout_s: PositiveFloat = 1800.0
    """`tensor_parallel`: longest that the other processes may take to load their part."""
    follower_step_timeout_s: PositiveFloat = 120.0
    """`tensor_parallel`: longest that one forward may take; then this process ends."""
    compile: bool = False
    """Compile the decoder: faster steps, a start that takes a minute longer the first time."""
    attention_backend: str = "sdpa"
    """Attention over the paged cache: `sdpa` runs everywhere; the others read blocks where they lie, once for all
    branches that share them: `native` on CPUs, with a C++ compiler, `flex`, and `flash` on GPUs. `flash` needs
    flash-attn and a `block_size` that is a multiple of 256."""
    cuda_graphs: CudaGraphs = "auto"
    """Replay small forwards as CUDA graphs: `auto` does so on CUDA with `flash`, `on` insists, `off` does not."""
    kv_cache_bytes: NonNegativeInt = 0
    """Size of the KV cache; 0 takes the default of the device."""
    num_kv_blocks: NonNegativeInt = 0
    """Size of the KV cache in blocks; 0 computes it from the bytes."""
    block_size: PositiveInt = 16
    """Tokens per KV block."""
    max_lookahead: int = Field(default=8, ge=1, le=MAX_DRAFT_TOKENS)
    """Largest K: draft tokens per round."""
    stall_timeout_s: PositiveFloat = 300.0
    """Longest that one step of the engine may take, a forward and what belongs to it; then the engine hangs, and this
    process ends with an error, to be started anew. A warm-up may take six times as long."""
    num_threads: NonNegativeInt = 0
    """Compute threads; 0 leaves torch's default."""
    cpu_affinity: tuple[int, ...] = ()
    """Cores the engine's threads are bound to; empty for all."""

    @model_validator(mode="after")
    def _check_priority(self) -> Self:
        if self.stream_priority != "normal" and self.tensor_parallel > 1:
            raise invalid("stream_priority", self.stream_priority, "normal where tensor_parallel is not 1")
        return self
