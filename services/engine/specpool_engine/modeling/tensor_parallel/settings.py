"""How a model is split, and what can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from specpool.errors import InvalidArgument
from specpool_engine.modeling.spec import ModelKind, ModelSpec

_HEAD_PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj")
"""Names of layers that the model's split must be by columns: only then has each rank its own heads, and a cache of its
own for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorParallelism:
    """Over how many devices a model is split, and how long the processes may take."""

    size: int = 1
    """Number of devices, and of processes: 1 is no split."""
    start_timeout_s: float = 1800.0
    """Longest time in seconds that followers may take to load their part."""
    step_timeout_s: float = 120.0
    """Longest time in seconds that one forward may take."""

    def devices(self, first: torch.device) -> list[torch.device]:
        """The devices of all ranks: `first` and those after it; a CPU is shared by all."""
        if first.type == "cpu":
            return [first] * self.size
        return [torch.device(first.type, (first.index or 0) + rank) for rank in range(self.size)]


SINGLE: Final = TensorParallelism()


def describe_device(first: torch.device, size: int) -> str:
    """The device as status and metrics show it, and with how many others it computes."""
    return str(first) if size == 1 else f"{first}, tensor parallel over {size}"


def check_tensor_parallel(
    spec: ModelSpec,
    parallelism: TensorParallelism,
    *,
    device: torch.device,
    weights: str,
    compile_model: bool,
    cuda_graphs: str,
    num_frequent_tokens: int,
) -> None:
    """Refuse settings with which no model can be split.

    Raises:
        InvalidArgument: TENSOR_PARALLEL_UNAVAILABLE, naming the setting that is in the way.
    """
    refusals = (
        (spec.kind is not ModelKind.TRANSFORMERS, f"{spec.text!r} has no weights to split"),
        (weights != "plain", f"weights are {weights}, and only plain ones can be split"),
        (compile_model, "compile is on: only the whole decoder can be compiled"),
        (cuda_graphs == "on", "cuda_graphs is on: a graph would hold the exchange with the other processes"),
        (num_frequent_tokens > 0, "draft_vocab_size is set, and a cut head cannot be split"),
    )
    for is_refused, why in refusals:
        if is_refused:
            raise refused(parallelism.size, why)
    _check_devices(parallelism, device)


def _check_devices(parallelism: TensorParallelism, device: torch.device) -> None:
    num_devices = torch.cuda.device_count()
    if device.type == "cuda":
        last = parallelism.devices(device)[-1]
        if (last.index or 0) >= num_devices:
            raise refused(
                parallelism.size, f"it needs the devices up to {last}, and {num_devices} CUDA devices are visible"
            )
    elif num_devices:
        # `transformers` takes the accelerator where there is one.
        raise refused(parallelism.size, f"device is {device}, and a CUDA device is visible: hide it or use it")


def check_model(config: Any, parallelism: TensorParallelism) -> None:
    """Refuse a model that cannot be split into so many parts.

    Args:
        config: its `transformers` text configuration.
        parallelism: how it is to be split.

    Raises:
        InvalidArgument: TENSOR_PARALLEL_UNAVAILABLE with the numbers that do not divide.
    """
    size = parallelism.size
    plan = getattr(config, "base_model_tp_plan", None) or {}
    styles = {name.rpartition(".")[2]: style for name, style in plan.items()}
    if any(styles.get(name) != "colwise" for name in _HEAD_PROJECTIONS):
        raise refused(size, f"transformers has no plan for {config.model_type} that splits its attention heads")
    heads = config.num_attention_heads
    counts = {
        "attention heads": heads,
        "key/value heads": getattr(config, "num_key_value_heads", None) or heads,
    }
    for what, count in counts.items():
        if count % size:
            raise refused(size, f"{config.model_type} has {count} {what}, which {size} does not divide")


def refused(size: int, why: str) -> InvalidArgument:
    """The error for a split that cannot be had."""
    return InvalidArgument(
        f"tensor_parallel {size} cannot be used: {why}",
        reason="TENSOR_PARALLEL_UNAVAILABLE",
        metadata={"field": "tensor_parallel", "value": size, "why": why},
    )
