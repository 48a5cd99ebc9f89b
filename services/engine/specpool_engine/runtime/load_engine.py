"""What the processes of both engines do before they serve: process set-up, the model and its share of the device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from specpool.process import set_cpu_affinity, set_num_threads
from specpool.v1 import types_pb2
from specpool_engine.distributions.transport import offered
from specpool_engine.modeling.attention import get_backend
from specpool_engine.modeling.cuda_graphs import describe_graphs
from specpool_engine.modeling.device_sharing import (
    DeviceShare,
    await_mps,
    describe_sharing,
    open_stream,
    use_stream,
)
from specpool_engine.modeling.files import Progress, no_progress
from specpool_engine.modeling.interface import CausalModel
from specpool_engine.modeling.load_model import load_model, parse_device
from specpool_engine.modeling.spec import ModelKind, ModelSpec
from specpool_engine.modeling.tensor_parallel.settings import TensorParallelism, describe_device
from specpool_engine.modeling.tokenizer import load_tokenizer, tokenizer_fingerprint
from specpool_engine.runtime.settings import EngineConfig

_SWITCH_INTERVAL_S: Final = 0.0005
"""Seconds that one thread may keep the interpreter from the other; the default of 5 ms would show in every round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedEngine:
    """A model that is ready to compute, and what belongs to it."""

    model: CausalModel
    tokenizer: Any
    info: types_pb2.ModelInfo
    """What peers and users learn of the model."""
    prepare_thread: Callable[[], None]
    """Sets what torch and CUDA keep per thread; to be called on the engine's thread."""


def prepare_process(config: EngineConfig, distribution_transport: str) -> None:
    """Refuse what cannot be had, before anything is loaded, and set cores, threads and the interpreter's switching."""
    offered(distribution_transport, config.device)
    set_cpu_affinity(config.cpu_affinity)
    set_num_threads(config.num_threads)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def load_engine(
    config: EngineConfig,
    on_progress: Progress = no_progress,
    *,
    weights: str,
    sm_share: float = 1.0,
    num_frequent_tokens: int = 0,
) -> LoadedEngine:
    """Load model and tokenizer; takes as long as it takes.

    Args:
        config: of the process.
        on_progress: told of download and load.
        weights: format of the weights.
        sm_share: of the GPU's multiprocessors.
        num_frequent_tokens: the head knows only so many, and the special ones; 0: all.
    """
    await_mps(config.device)
    share = DeviceShare(memory=config.device_memory_share, multiprocessors=sm_share, priority=config.stream_priority)
    stream = open_stream(parse_device(config.device), share)
    spec = ModelSpec.parse(config.model)
    tokenizer = load_tokenizer(spec, on_progress=on_progress)
    model = load_model(
        spec,
        dtype=config.dtype,
        device=config.device,
        num_blocks=config.num_kv_blocks or None,
        kv_cache_bytes=config.kv_cache_bytes or None,
        memory_share=config.device_memory_share,
        block_size=config.block_size,
        attention_backend=config.attention_backend,
        weights=weights,
        compile_model=config.compile,
        cuda_graphs=config.cuda_graphs,
        num_frequent_tokens=num_frequent_tokens,
        other_tokens=tokenizer.all_special_ids,
        tensor_parallel=TensorParallelism(
            size=config.tensor_parallel,
            start_timeout_s=config.follower_start_timeout_s,
            step_timeout_s=config.follower_step_timeout_s,
        ),
        stream=stream,
        on_progress=on_progress,
    )

    def prepare_thread() -> None:
        set_num_threads(config.num_threads)
        use_stream(model.device, stream)

    info = types_pb2.ModelInfo(
        name=config.model_name or default_model_name(spec),
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        dtype=config.dtype,
        attention_backend=config.attention_backend,
        weights=weights if spec.kind is ModelKind.TRANSFORMERS else "",
        cuda_graphs=describe_graphs(config.cuda_graphs, model, get_backend(config.attention_backend)),
        device=describe_device(model.device, config.tensor_parallel) + describe_sharing(share),
    )
    return LoadedEngine(model=model, tokenizer=tokenizer, info=info, prepare_thread=prepare_thread)


def default_model_name(spec: ModelSpec) -> str:
    """The last part of the model's id or path."""
    return spec.kind.value if spec.kind is not ModelKind.TRANSFORMERS else spec.source.rstrip("/").rsplit("/", 1)[-1]
