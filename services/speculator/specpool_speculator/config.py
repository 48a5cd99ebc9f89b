"""Settings of the speculator service."""

from __future__ import annotations

import socket
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from specpool.config import Settings, Share, invalid
from specpool_engine.distributions.choices import BodyType, TransportChoice

FanOutPolicy = Literal["best_first", "geometric", "uniform"]
CudaGraphs = Literal["auto", "on", "off"]
StreamPriority = Literal["normal", "high"]


def _default_id() -> str:
    return f"{socket.gethostname()}-speculator"


class SpeculatorConfig(Settings):
    """One speculator process."""

    model: str
    """Draft model: hub id, directory, GGUF file, optionally with #layers=N."""
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
    """How long a graceful stop waits for targets to move their sequences."""
    log_level: str = "info"
    """debug, info, warning or error."""
    model_name: str = ""
    """Name shown in status; empty for the last part of `model`."""
    dtype: str = "bfloat16"
    """float32, bfloat16 or float16."""
    device: str = "cpu"
    """Torch device."""
    device_memory_share: Share = 1.0
    """Share of the GPU's memory for this process, weights and KV cache; below 1 where another process uses it too."""
    stream_priority: StreamPriority = "normal"
    """`high`: this process's kernels go first on a GPU that is shared by CUDA's multi-process service."""
    sm_share: Share = 1.0
    """Share of the GPU's multiprocessors that draft steps use, by a green context: leaves the others to a target on the
    same GPU, where both are clients of CUDA's multi-process service."""
    tensor_parallel: PositiveInt = 1
    """Split the model over so many devices of this machine, `device` and those after it, with a process for each."""
    follower_start_timeout_s: PositiveFloat = 1800.0
    """`tensor_parallel`: longest that the other processes may take to load their part."""
    follower_step_timeout_s: PositiveFloat = 120.0
    """`tensor_parallel`: longest that one forward may take; then this process ends."""
    weights: Literal["plain", "prepacked", "streamed", "int8", "int4"] = "plain"
    """How linear layers hold their weights."""
    compile: bool = False
    """Compile the decoder: faster steps, a start that takes a minute longer the first time."""
    draft_vocab_size: NonNegativeInt = 0
    """Draft only the first so many tokens, in byte-pair vocabularies the frequent ones, and the special tokens; 0: all.
    A smaller head makes draft steps faster; what is generated stays the same."""
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
    max_lookahead: PositiveInt = 8
    """Largest K: draft tokens per round."""
    row_budget: PositiveInt = 16
    """Branch rows per draft step, shared by all sequences; at most so many with `plan_rows`."""
    plan_rows: bool = True
    """Leave out rows that would bring less than they delay the others, by measured step times."""
    fan_out_budget: PositiveInt = 12
    """Guesses of the verification outcome per sequence and round (B)."""
    fan_out_policy: FanOutPolicy = "best_first"
    """How guesses and rows are chosen: `best_first` by the draft's own calibrated probabilities, `geometric` by mean
    acceptance and miss rates, as in the paper, `uniform` the same number after every accepted length."""
    saguaro_constant: float = Field(default=1.0, ge=0, le=1)
    """C of Saguaro sampling for rejection verification, 0 to 1; 1 is off."""
    tune_saguaro: bool = False
    """Choose C online, for tokens per second, instead of `saguaro_constant`."""
    distribution_top_m: PositiveInt = 64
    """Rejection verification: the draft samples from its m most likely tokens."""
    distribution_transport: TransportChoice = "auto"
    """Rejection verification: how distributions may travel to targets. `grpc` is sparse, inside the stream; `gloo` and
    `nccl` are dense, over a process group per target; `auto` is whatever the target asks for and this process has."""
    distribution_dtype: BodyType = "float16"
    """Type in which dense distributions are held and sent; the draft samples from what it leaves of them."""
    distribution_memory_bytes: NonNegativeInt = 1 << 30
    """Most that dense distributions of all branches may take; beyond it branches have sparse ones."""
    max_prefill_tokens: PositiveInt = 512
    """Prompt and catch-up tokens per draft step."""
    max_sequences: PositiveInt = 256
    """Sequences held at once; more are refused, so that their targets take them elsewhere."""
    stall_timeout_s: PositiveFloat = 300.0
    """Longest that one step of the engine may take, a forward and what belongs to it; then the engine hangs, and this
    process ends with an error, to be started anew. A warm-up may take six times as long."""
    num_threads: NonNegativeInt = 0
    """Compute threads; 0 leaves torch's default."""
    cpu_affinity: tuple[int, ...] = ()
    """Cores the engine's threads are bound to; empty for all."""

    @model_validator(mode="after")
    def _check_contradictions(self) -> Self:
        is_split = self.tensor_parallel > 1
        if self.sm_share < 1 and self.stream_priority == "high":
            raise invalid("sm_share", self.sm_share, "1 where stream_priority is high")
        if self.sm_share < 1 and is_split:
            raise invalid("sm_share", self.sm_share, "1 where tensor_parallel is not 1")
        if self.stream_priority == "high" and is_split:
            raise invalid("stream_priority", self.stream_priority, "normal where tensor_parallel is not 1")
        return self
