"""Settings of the target service."""

from __future__ import annotations

import socket
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from specpool.config import Settings, Share, invalid
from specpool_engine.distributions.choices import TransportChoice

Fallback = Literal["auto", "wait", "backup"]
CudaGraphs = Literal["auto", "on", "off"]
StreamPriority = Literal["normal", "high"]


def _default_id() -> str:
    return f"{socket.gethostname()}-target"


class TargetConfig(Settings):
    """One target process."""

    model: str
    """Target model: hub id, directory, GGUF file, optionally with #layers=N."""
    id: str = Field(default_factory=_default_id)
    """Stable name of this process; default: host name and role."""
    listen: str = "127.0.0.1:0"
    """host:port to listen on; port 0 takes any free one."""
    advertise: str = ""
    """Endpoint that others dial; empty for the bound one."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of the Prometheus endpoint; 0 takes any free one, unset is off."""
    otlp_endpoint: str = ""
    """OTLP collector for traces; empty is off."""
    trace_sampling_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of traces started here that are recorded; a parent's decision wins."""
    drain_grace_s: NonNegativeFloat = 30.0
    """How long a graceful stop waits for running sequences."""
    log_level: str = "info"
    """debug, info, warning or error."""
    model_name: str = ""
    """Name under which the model is served; empty for the last part of `model`."""
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
    weights: Literal["plain", "prepacked", "streamed"] = "plain"
    """How linear layers hold their weights."""
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
    max_batch_size: PositiveInt = 32
    """Sequences in the batch at once; more wait."""
    max_batch_tokens: PositiveInt = 512
    """Tokens of one forward; longer prompts are prefilled in chunks."""
    max_waiting: NonNegativeInt = 256
    """Sequences that may wait for admission; more are refused."""
    max_context: NonNegativeInt = 0
    """Longest sequence, prompt and output; 0 for the model's own limit."""
    max_lookahead: PositiveInt = 8
    """Largest K: draft tokens per round."""
    speculation_deadline_ms: NonNegativeFloat = 1000.0
    """Upper bound of any wait for a speculation; then the sequence goes on without."""
    distribution_transport: TransportChoice = "grpc"
    """How draft distributions of rejection verification come: `grpc` is sparse, inside the stream; `gloo` and `nccl`
    are dense, over a process group per speculator; `auto` is the first of nccl, gloo, grpc that both sides have. A
    speculator that does not have what is named here is not used."""
    distribution_deadline_ms: NonNegativeFloat = 20.0
    """Longest wait, after the forward, for draft distributions of rejection verification."""
    speculators: str = "router"
    """Where speculators are found: `router` (what routers tell), `static:HOST:PORT,...`, `dns:NAME:PORT` (all addresses
    of a name) or `kubernetes:NAMESPACE/LABELS`."""
    connect_deadline_ms: NonNegativeFloat = 250.0
    """Longest wait of a request for the first connection to a speculator nobody used before."""
    fallback: Fallback = "auto"
    """After a miss: `auto` waits for the speculator where that is expected to be faster, `wait` always does, `backup`
    never."""
    backup_ngram: NonNegativeInt = 3
    """Longest n-gram of the prompt-lookup backup; 0 is no backup."""
    stall_timeout_s: PositiveFloat = 300.0
    """Longest that one step of the engine may take, a forward and what belongs to it; then the engine hangs, and this
    process ends with an error, to be started anew. A warm-up may take six times as long."""
    num_threads: NonNegativeInt = 0
    """Compute threads; 0 leaves torch's default."""
    cpu_affinity: tuple[int, ...] = ()
    """Cores the engine's threads are bound to; empty for all."""

    @model_validator(mode="after")
    def _check_contradictions(self) -> Self:
        if self.stream_priority != "normal" and self.tensor_parallel > 1:
            raise invalid("stream_priority", self.stream_priority, "normal where tensor_parallel is not 1")
        return self
