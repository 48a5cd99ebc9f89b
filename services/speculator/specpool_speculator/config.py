"""Settings of the speculator service."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Literal, get_args

from specpool.errors import ConfigError
from specpool_engine.distributions.choices import BodyType, TransportChoice, check_transport_choice

FanOutPolicy = Literal["best_first", "geometric", "uniform"]
CudaGraphs = Literal["auto", "on", "off"]
StreamPriority = Literal["normal", "high"]


def _default_id() -> str:
    return f"{socket.gethostname()}-speculator"


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculatorConfig:
    """One speculator process."""

    model: str
    """Draft model: hub id, directory, GGUF file, optionally with #layers=N."""
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
    """How long a graceful stop waits for targets to move their sequences."""
    log_level: str = "info"
    """debug, info, warning or error."""
    model_name: str = ""
    """Name shown in status; empty for the last part of `model`."""
    dtype: str = "bfloat16"
    """float32, bfloat16 or float16."""
    device: str = "cpu"
    """Torch device."""
    device_memory_share: float = 1.0
    """Share of the GPU's memory for this process, weights and KV cache; below 1 where another process uses it too."""
    stream_priority: StreamPriority = "normal"
    """`high`: this process's kernels go first on a GPU that is shared by CUDA's multi-process service."""
    sm_share: float = 1.0
    """Share of the GPU's multiprocessors that draft steps use, by a green context: leaves the others to a target on the
    same GPU, where both are clients of CUDA's multi-process service."""
    tensor_parallel: int = 1
    """Split the model over so many devices of this machine, `device` and those after it, with a process for each."""
    follower_start_timeout_s: float = 1800.0
    """`tensor_parallel`: longest that the other processes may take to load their part."""
    follower_step_timeout_s: float = 120.0
    """`tensor_parallel`: longest that one forward may take; then this process ends."""
    weights: Literal["plain", "prepacked", "streamed", "int8", "int4"] = "plain"
    """How linear layers hold their weights."""
    compile: bool = False
    """Compile the decoder: faster steps, a start that takes a minute longer the first time."""
    draft_vocab_size: int = 0
    """Draft only the first so many tokens, in byte-pair vocabularies the frequent ones, and the special tokens; 0: all.
    A smaller head makes draft steps faster; what is generated stays the same."""
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
    max_lookahead: int = 8
    """Largest K: draft tokens per round."""
    row_budget: int = 16
    """Branch rows per draft step, shared by all sequences; at most so many with `plan_rows`."""
    plan_rows: bool = True
    """Leave out rows that would bring less than they delay the others, by measured step times."""
    fan_out_budget: int = 12
    """Guesses of the verification outcome per sequence and round (B)."""
    fan_out_policy: FanOutPolicy = "best_first"
    """How guesses and rows are chosen: `best_first` by the draft's own calibrated probabilities, `geometric` by mean
    acceptance and miss rates, as in the paper, `uniform` the same number after every accepted length."""
    saguaro_constant: float = 1.0
    """C of Saguaro sampling for rejection verification, 0 to 1; 1 is off."""
    tune_saguaro: bool = False
    """Choose C online, for tokens per second, instead of `saguaro_constant`."""
    distribution_top_m: int = 64
    """Rejection verification: the draft samples from its m most likely tokens."""
    distribution_transport: TransportChoice = "auto"
    """Rejection verification: how distributions may travel to targets. `grpc` is sparse, inside the stream; `gloo` and
    `nccl` are dense, over a process group per target; `auto` is whatever the target asks for and this process has."""
    distribution_dtype: BodyType = "float16"
    """Type in which dense distributions are held and sent; the draft samples from what it leaves of them."""
    distribution_memory_bytes: int = 1 << 30
    """Most that dense distributions of all branches may take; beyond it branches have sparse ones."""
    max_prefill_tokens: int = 512
    """Prompt and catch-up tokens per draft step."""
    max_sequences: int = 256
    """Sequences held at once; more are not speculated for."""
    num_threads: int = 0
    """Compute threads; 0 leaves torch's default."""
    cpu_affinity: tuple[int, ...] = ()
    """Cores the engine's threads are bound to; empty for all."""

    def __post_init__(self) -> None:
        """Refuse values that can never work."""
        for name in ("max_lookahead", "row_budget", "fan_out_budget", "distribution_top_m", "max_prefill_tokens"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("follower_start_timeout_s", "follower_step_timeout_s"):
            self._check(name, getattr(self, name) > 0, "more than 0")
        self._check("tensor_parallel", self.tensor_parallel >= 1, "at least 1")
        self._check("max_sequences", self.max_sequences >= 1, "at least 1")
        self._check("draft_vocab_size", self.draft_vocab_size >= 0, "at least 0")
        self._check("distribution_memory_bytes", self.distribution_memory_bytes >= 0, "at least 0")
        self._check("block_size", self.block_size >= 1, "at least 1")
        self._check("saguaro_constant", 0 <= self.saguaro_constant <= 1, "between 0 and 1")
        self._check("device_memory_share", 0 < self.device_memory_share <= 1, "more than 0 and at most 1")
        self._check("stream_priority", self.stream_priority in get_args(StreamPriority), "normal or high")
        self._check("sm_share", 0 < self.sm_share <= 1, "more than 0 and at most 1")
        self._check("trace_sampling_ratio", 0 <= self.trace_sampling_ratio <= 1, "between 0 and 1")
        self._check("drain_grace_s", self.drain_grace_s >= 0, "at least 0")
        check_transport_choice(self.distribution_transport)
        types = get_args(BodyType)
        self._check("distribution_dtype", self.distribution_dtype in types, ", ".join(types))
        policies = get_args(FanOutPolicy)
        self._check("fan_out_policy", self.fan_out_policy in policies, ", ".join(policies))
        self._check("cuda_graphs", self.cuda_graphs in get_args(CudaGraphs), ", ".join(get_args(CudaGraphs)))
        formats = ("plain", "prepacked", "streamed", "int8", "int4")
        self._check("weights", self.weights in formats, ", ".join(formats))
        is_high, is_split = self.stream_priority == "high", self.tensor_parallel > 1
        self._check("sm_share", self.sm_share == 1 or not is_high, "1 where stream_priority is high")
        self._check("sm_share", self.sm_share == 1 or not is_split, "1 where tensor_parallel is not 1")
        self._check("stream_priority", not (is_high and is_split), "normal where tensor_parallel is not 1")

    def _check(self, name: str, is_good: bool, accepted: str) -> None:
        if not is_good:
            value = getattr(self, name)
            raise ConfigError(
                f"{name} must be {accepted}, got {value}",
                metadata={"field": name, "value": value, "accepted": accepted},
            )
