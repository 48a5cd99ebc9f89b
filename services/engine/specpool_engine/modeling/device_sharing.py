"""Two engines on one GPU: what each may take of it.

Memory is divided by shares of the whole. Time is shared by the GPU: in turns, or at once where both processes are
clients of CUDA's multi-process service (MPS). Then streams of high priority go first, and a green context keeps an
engine to some of the multiprocessors. Nothing here has a meaning on CPUs, where it is refused.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch

from specpool.errors import ConfigError, InvalidArgument

StreamPriority = Literal["normal", "high"]

MPS_DIRECTORY: Final = "CUDA_MPS_PIPE_DIRECTORY"
"""Environment variable with the folder of an MPS daemon's pipes."""
_DEFAULT_MPS_DIRECTORY: Final = "/tmp/nvidia-mps"
"""Folder where CUDA looks for the pipes without that variable."""
_THREAD_PERCENTAGE: Final = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
_MPS_START_S: Final = 10.0
_POLL_S: Final = 0.05
_HIGH_PRIORITY: Final = -1
_SM_GRANULARITY: Final = 8
"""Size of the groups in which multiprocessors are handed out; eight suits every generation with green contexts."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceShare:
    """What one process takes of a GPU that another one uses too."""

    memory: float = 1.0
    """Share of the device's memory, weights included; 1 is no limit."""
    multiprocessors: float = 1.0
    """Share of the multiprocessors; 1 is no limit."""
    priority: StreamPriority = "normal"
    """Whether this process's kernels go before those of others: `high` or `normal`."""

    @property
    def settings(self) -> dict[str, float | str]:
        """The settings that differ from having the device alone, by name."""
        given: dict[str, float | str] = {
            "device_memory_share": self.memory,
            "sm_share": self.multiprocessors,
            "stream_priority": self.priority,
        }
        return {name: value for name, value in given.items() if value not in (1.0, "normal")}


def find_mps(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Folder of the MPS daemon that CUDA would use; None if there is none."""
    directory = Path(environment.get(MPS_DIRECTORY) or _DEFAULT_MPS_DIRECTORY)
    return directory if (directory / "control").exists() else None


def await_mps(device: str, environment: Mapping[str, str] = os.environ, timeout_s: float = _MPS_START_S) -> None:
    """Wait for the daemon that the environment names: CUDA would go on without it and say nothing.

    Raises:
        ConfigError: MPS_UNAVAILABLE if it is not there in time.
    """
    directory = environment.get(MPS_DIRECTORY)
    if not directory or not device.startswith("cuda"):
        return
    deadline_s = time.monotonic() + timeout_s
    while find_mps(environment) is None:
        if time.monotonic() > deadline_s:
            raise ConfigError(
                f"{MPS_DIRECTORY} is {directory}, and no nvidia-cuda-mps-control answers there",
                reason="MPS_UNAVAILABLE",
                metadata={"field": MPS_DIRECTORY, "value": directory},
            )
        time.sleep(_POLL_S)


def check_share(device: torch.device, share: DeviceShare, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a share that cannot be had.

    Raises:
        InvalidArgument: DEVICE_SHARING_UNAVAILABLE for a share of a CPU; GREEN_CONTEXTS_UNAVAILABLE, naming what is
            missing, for a share of the multiprocessors.
    """
    for name, value in share.settings.items():
        if device.type != "cuda":
            raise InvalidArgument(
                f"{name} is {value}, and the device is {device}: only a GPU is shared out",
                reason="DEVICE_SHARING_UNAVAILABLE",
                metadata={"field": name, "value": value},
            )
    if share.multiprocessors < 1.0:
        _check_green_contexts(share.multiprocessors, environment)


def _check_green_contexts(share: float, environment: Mapping[str, str]) -> None:
    module = _green_contexts()
    percentage = environment.get(_THREAD_PERCENTAGE, "")
    if not getattr(module, "SUPPORTED", False):
        raise _no_green_context(share, f"torch {torch.__version__} has no green contexts")
    if not hasattr(module.GreenContext, "Stream"):
        raise _no_green_context(share, f"torch {torch.__version__} gives no stream of a green context")
    if find_mps(environment) is None:
        raise _no_green_context(share, "no nvidia-cuda-mps-control answers, so processes use the GPU in turns")
    if percentage.strip() not in ("", "100"):
        raise _no_green_context(share, f"{_THREAD_PERCENTAGE} is {percentage}, which overrides green contexts")


def limit_memory(device: torch.device, share: float) -> None:
    """Keep this process to a share of a GPU's memory; 1 is no limit."""
    if device.type == "cuda" and share < 1.0:
        torch.cuda.set_per_process_memory_fraction(share, device)


def num_multiprocessors(total: int, share: float) -> int:
    """The number of multiprocessors of a green context: whole groups, at least one, no more than there are."""
    return min(total, max(_SM_GRANULARITY, int(total * share) // _SM_GRANULARITY * _SM_GRANULARITY))


def open_stream(device: torch.device, share: DeviceShare) -> Any:
    """The stream of an engine with this share; None stands for the one that every thread begins with.

    CUDA graphs must be captured on it too: their kernels keep priority and context of the stream of the capture.

    Raises:
        InvalidArgument: as `check_share`; GREEN_CONTEXTS_UNAVAILABLE also if the driver has none.
    """
    check_share(device, share)
    if share.multiprocessors < 1.0:
        return _green_stream(device, share.multiprocessors)
    if share.priority == "high":
        make_stream: Any = torch.cuda.Stream
        return make_stream(device, priority=_HIGH_PRIORITY)
    return None


def use_stream(device: torch.device, stream: Any) -> None:
    """Have what this thread computes from now on run on `stream`: to be called on the engine's thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread begins with the first
    if stream is not None:
        torch.cuda.synchronize(device)  # the weights were loaded on another stream
        torch.cuda.set_stream(stream)


def describe_sharing(share: DeviceShare, environment: Mapping[str, str] = os.environ) -> str:
    """The words on sharing that status shows behind the device's name; empty for a device that is not shared."""
    if not share.settings:
        return ""
    how = "by MPS" if find_mps(environment) is not None else "in turns, without MPS"
    return f", shared {how}, {share.memory:.0%} of its memory"


def _green_stream(device: torch.device, share: float) -> Any:
    total = torch.cuda.get_device_properties(device).multi_processor_count
    num_sms = num_multiprocessors(total, share)
    try:
        context = _green_contexts().GreenContext.create(num_sms=num_sms, device_id=device.index or 0)
        stream = context.Stream()
    except RuntimeError as error:
        raise _no_green_context(share, str(error).splitlines()[0]) from error
    _entered.append(context)
    _logger.info("this engine uses %d of %d multiprocessors", num_sms, total)
    return stream


_entered: Final[list[Any]] = []
"""Green contexts in use: they end with their last reference."""


def _green_contexts() -> Any:
    try:
        from torch.cuda import green_contexts
    except ImportError:
        return None
    return green_contexts


def _no_green_context(share: float, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"sm_share {share:g} cannot be used: {why}",
        reason="GREEN_CONTEXTS_UNAVAILABLE",
        metadata={"field": "sm_share", "value": share, "accepted": 1.0, "why": why},
    )
