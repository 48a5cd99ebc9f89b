"""Settings of `specpool up`."""

from __future__ import annotations

from typing import Final, Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from specpool.config import Settings, Share
from specpool.config.settings import grpc_collector
from specpool.errors import ConfigError
from specpool_engine.distributions.choices import TransportChoice
from specpool_tools.local.awake import can_keep_awake
from specpool_tools.local.cores import parse_affinity

MEMORY_SHARE: Final = 0.75
"""Share of the GPU's memory for a target and its KV cache, which are the larger ones."""
DRAFT_MEMORY_SHARE: Final = 0.2
"""Share of the GPU's memory for a draft; what both leave is for what CUDA takes for each process itself."""


class UpConfig(Settings):
    """Options of `specpool up` (section `up` of the settings file)."""

    target: str = ""
    """Target model: catalogue name, hub id, directory, or GGUF file."""
    draft: str = ""
    """Draft model; empty or `none` runs without a speculator."""
    targets: PositiveInt = 1
    """Number of target processes."""
    dtype: str = ""
    """Data type of the target and, unless `draft_dtype` is given, of the draft; empty for the services' default."""
    draft_dtype: str = ""
    """Data type of the draft."""
    device: str = ""
    """Torch device of the targets; empty for the services' default."""
    draft_device: str = ""
    """Torch device of the draft; empty: as `device`, or the one after those of the targets if they are several."""
    tensor_parallel: PositiveInt = 1
    """Devices that each target is split over: those from `device` on, the next target's behind them."""
    colocated: bool = False
    """Target and draft on one GPU, which must be given as `device`: each has its share of the memory, and the target's
    kernels go first. Start `nvidia-cuda-mps-control -d` before, or they compute in turns."""
    memory_share: Share = MEMORY_SHARE
    """`colocated`: the target's share of the GPU's memory, weights and KV cache."""
    draft_memory_share: Share = DRAFT_MEMORY_SHARE
    """`colocated`: the draft's share of the GPU's memory."""
    draft_sm_share: Share = 1.0
    """`colocated`: share of the GPU's multiprocessors that draft steps use; below 1 it needs green contexts and MPS."""
    weights: str = ""
    """Weight format of the targets: plain, prepacked, streamed, int4, which changes the text a little, or
    gguf: a GGUF file as it is."""
    draft_weights: str = ""
    """Weight format of the draft: plain, prepacked, streamed, int8, int4 or gguf."""
    attention_backend: str = ""
    """Attention of the targets: sdpa, native, flex or flash; empty for the services' default."""
    draft_attention_backend: str = ""
    """Attention of the draft; empty for the services' default."""
    compile: bool = False
    """Compile target and draft: faster steps, a start that takes minutes longer the first time."""
    draft_vocab_size: NonNegativeInt = 0
    """Tokens that are drafted, the first ones of the vocabulary; 0: all."""
    lookahead: NonNegativeInt = 0
    """Largest lookahead K; 0 for the services' default."""
    row_budget: NonNegativeInt = 0
    """Branch rows per draft step; 0 for the speculator's default."""
    fan_out: NonNegativeInt = 0
    """Guesses per round (B); 0 for the speculator's default."""
    distribution_transport: TransportChoice | Literal[""] = ""
    """How the targets want draft distributions of rejection verification: grpc, gloo, nccl or auto; empty for the
    services' default."""
    listen: str = "127.0.0.1:0"
    """Address of the router; port 0 takes any free one."""
    affinity: str = ""
    """Cores per role, such as `target=0;speculator=1` or `target-0=0,1;target-1=2,3`; empty shares all cores."""
    keep_awake: bool = False
    """Let none of these cores sleep: in a virtual machine the host may otherwise move target and draft together, where
    they share their way to memory. Whatever else runs on them goes first. Linux."""
    session_store: str = ""
    """redis://..., or memory://; empty starts an embedded Valkey."""
    tenants_file: str = ""
    """YAML file of tenants; empty: one tenant, without credentials."""
    otlp_endpoint: str = ""
    """OTLP collector for traces of all processes, HOST:PORT or URL of its gRPC port (usually 4317); empty is off."""
    log_dir: str = ""
    """Folder of the processes' logs; empty for `logs` in the cache directory."""
    ready_file: str = ""
    """File that gets the router's endpoint once everything is up."""
    ready_timeout_s: PositiveFloat = 1800.0
    """Give up when not everything is up by then."""

    _otlp_is_grpc = field_validator("otlp_endpoint")(grpc_collector)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.target:
            raise ConfigError("target is required: give --target MODEL", metadata={"field": "target"})
        parse_affinity(self.affinity, self.targets)
        if self.keep_awake and not can_keep_awake():
            raise ConfigError("keep_awake needs Linux", metadata={"field": "keep_awake"})
        _check_colocation(self)
        return self

    @property
    def has_speculator(self) -> bool:
        """Whether a draft was given."""
        return self.draft.strip().lower() not in ("", "none")


def _check_colocation(config: UpConfig) -> None:
    """Refuse what contradicts one GPU for one target and one draft.

    Raises:
        ConfigError: COLOCATION_UNAVAILABLE, naming the setting that is in the way.
    """
    for name, default in (
        ("memory_share", MEMORY_SHARE),
        ("draft_memory_share", DRAFT_MEMORY_SHARE),
        ("draft_sm_share", 1.0),
    ):
        value = getattr(config, name)
        if value != default and not config.colocated:
            raise ConfigError(f"{name} is {value:g}, which only colocated uses", metadata={"field": name})
    if config.colocated:
        _check_one_device(config)


def _check_one_device(config: UpConfig) -> None:
    device, total = config.device, config.memory_share + config.draft_memory_share
    contradictions = (
        ("device", not _is_cuda(device), f"needs one CUDA device, and device is {device or 'not given'}"),
        ("draft", not config.has_speculator, "needs a draft"),
        ("targets", config.targets > 1, f"is for one target, and targets is {config.targets}"),
        ("tensor_parallel", config.tensor_parallel > 1, f"uses one device, and each target {config.tensor_parallel}"),
        (
            "draft_device",
            config.draft_device not in ("", device),
            f"puts both on {device}, and draft_device is {config.draft_device}",
        ),
        (
            "distribution_transport",
            config.distribution_transport in ("nccl", "auto"),
            f"cannot use NCCL, which refuses two processes on one GPU, and distribution_transport is "
            f"{config.distribution_transport}: set grpc or gloo",
        ),
        ("memory_share", total > 1, f"shares one memory: memory_share and draft_memory_share add up to {total:g}"),
    )
    for name, is_contradiction, why in contradictions:
        if is_contradiction:
            raise ConfigError(f"colocated {why}", reason="COLOCATION_UNAVAILABLE", metadata={"field": name})


def _is_cuda(device: str) -> bool:
    kind, colon, index = device.partition(":")
    return kind == "cuda" and (not colon or index.isdecimal())
