"""`specpool up --colocated true`: target and draft on one GPU, each with its share of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from specpool.errors import ConfigError

if TYPE_CHECKING:
    from specpool_tools.local.up_config import UpConfig

MEMORY_SHARE: Final = 0.75
"""Of a target and its KV cache, which are the larger ones."""
DRAFT_MEMORY_SHARE: Final = 0.2
"""What both leave is for what CUDA takes for each process itself."""


def check_colocation(config: UpConfig) -> None:
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


def target_share(config: UpConfig) -> dict[str, str | None]:
    """Flags of the target: what goes first, and its part of the memory."""
    if not config.colocated:
        return {}
    return {"device-memory-share": f"{config.memory_share:g}", "stream-priority": "high"}


def speculator_share(config: UpConfig) -> dict[str, str | None]:
    """Flags of the speculator."""
    if not config.colocated:
        return {}
    return {
        "device-memory-share": f"{config.draft_memory_share:g}",
        "stream-priority": "normal",
        "sm-share": f"{config.draft_sm_share:g}",
    }
