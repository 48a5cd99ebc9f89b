"""Settings of the target service."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Literal, get_args

from specpool.errors import ConfigError
from specpool_engine.distributions.choices import TransportChoice, check_transport_choice

Fallback = Literal["auto", "wait", "backup"]
CudaGraphs = Literal["auto", "on", "off"]
StreamPriority = Literal["normal", "high"]


def _default_id() -> str:
    return f"{socket.gethostname()}-target"


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetConfig:
    """One target process."""

    model: str
    """Target model: hub id, directory, GGUF file, optionally with #layers=N."""
    id: str = field(default_factory=_default_id)
    """Stable name of this process; default: host name and role."""
    listen: str = "127.0.0.1:0"
    """host:port to listen on; port 0 takes any free one."""
    advertise: str = ""
    """Endpoint that others dial; empty for the bound one."""
    metrics_port: int | None = None
    """Port of the Prometheus endpoint; 0 takes any free one, unset is off."""
    otlp_endpoint: str = ""
    """OTLP collector for traces; empty is off."""
    trace_sampling_ratio: float = 1.0
    """Share of traces started here that are recorded; a parent's decision wins."""
    drain_grace_s: float = 30.0
    """How long a graceful stop waits for running sequences."""
    log_level: str = "info"
    """debug, info, warning or error."""
    model_name: str = ""
    """Name under which the model is served; empty for the last part of `model`."""
    dtype: str = "bfloat16"
    """float32, bfloat16 or float16."""
    device: str = "cpu"
    """Torch device."""
    device_memory_share: float = 1.0
    """Share of the GPU's memory for this process, weights and KV cache; below 1 where another process uses it too."""
    stream_priority: StreamPriority = "normal"
    """`high`: this process's kernels go first on a GPU that is shared by CUDA's multi-process service."""
    tensor_parallel: int = 1
    """Split the model over so many devices of this machine, `device` and those after it, with a process for each."""
    follower_start_timeout_s: float = 1800.0
    """`tensor_parallel`: longest that the other processes may take to load their part."""
    follower_step_timeout_s: float = 120.0
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
    kv_cache_bytes: int = 0
    """Size of the KV cache; 0 takes the default of the device."""
    num_kv_blocks: int = 0
    """Size of the KV cache in blocks; 0 computes it from the bytes."""
    block_size: int = 16
    """Tokens per KV block."""
    max_batch_size: int = 32
    """Sequences in the batch at once; more wait."""
    max_batch_tokens: int = 512
    """Tokens of one forward; longer prompts are prefilled in chunks."""
    max_waiting: int = 256
    """Sequences that may wait for admission; more are refused."""
    max_context: int = 0
    """Longest sequence, prompt and output; 0 for the model's own limit."""
    max_lookahead: int = 8
    """Largest K: draft tokens per round."""
    speculation_deadline_ms: float = 1000.0
    """Upper bound of any wait for a speculation; then the sequence goes on without."""
    distribution_transport: TransportChoice = "grpc"
    """How draft distributions of rejection verification come: `grpc` is sparse, inside the stream; `gloo` and `nccl`
    are dense, over a process group per speculator; `auto` is the first of nccl, gloo, grpc that both sides have. A
    speculator that does not have what is named here is not used."""
    distribution_deadline_ms: float = 20.0
    """Longest wait, after the forward, for draft distributions of rejection verification."""
    speculators: str = "router"
    """Where speculators are found: `router` (what routers tell), `static:HOST:PORT,...`, `dns:NAME:PORT` (all addresses
    of a name) or `kubernetes:NAMESPACE/LABELS`."""
    connect_deadline_ms: float = 250.0
    """Longest wait of a request for the first connection to a speculator nobody used before."""
    fallback: Fallback = "auto"
    """After a miss: `auto` waits for the speculator where that is expected to be faster, `wait` always does, `backup`
    never."""
    backup_ngram: int = 3
    """Longest n-gram of the prompt-lookup backup; 0 is no backup."""
    num_threads: int = 0
    """Compute threads; 0 leaves torch's default."""
    cpu_affinity: tuple[int, ...] = ()
    """Cores the engine's threads are bound to; empty for all."""

    def __post_init__(self) -> None:
        """Refuse values that can never work."""
        for name in ("tensor_parallel", "block_size", "max_batch_size", "max_batch_tokens", "max_lookahead"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("follower_start_timeout_s", "follower_step_timeout_s"):
            self._check(name, getattr(self, name) > 0, "more than 0")
        for name in (
            *("kv_cache_bytes", "num_kv_blocks", "max_waiting", "max_context", "backup_ngram", "num_threads"),
            *("speculation_deadline_ms", "distribution_deadline_ms", "connect_deadline_ms", "drain_grace_s"),
        ):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        self._check("device_memory_share", 0 < self.device_memory_share <= 1, "more than 0 and at most 1")
        self._check("stream_priority", self.stream_priority in get_args(StreamPriority), "normal or high")
        is_normal = self.stream_priority == "normal"
        self._check("stream_priority", is_normal or self.tensor_parallel == 1, "normal where tensor_parallel is not 1")
        self._check("trace_sampling_ratio", 0 <= self.trace_sampling_ratio <= 1, "between 0 and 1")
        check_transport_choice(self.distribution_transport)
        self._check("cuda_graphs", self.cuda_graphs in get_args(CudaGraphs), ", ".join(get_args(CudaGraphs)))
        self._check("weights", self.weights in ("plain", "prepacked", "streamed"), "plain, prepacked or streamed")
        self._check("fallback", self.fallback in get_args(Fallback), ", ".join(get_args(Fallback)))

    def _check(self, name: str, is_good: bool, accepted: str) -> None:
        if not is_good:
            value = getattr(self, name)
            raise ConfigError(
                f"{name} must be {accepted}, got {value}",
                metadata={"field": name, "value": value, "accepted": accepted},
            )
