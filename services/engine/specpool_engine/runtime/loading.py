"""What the processes of both engines do before they serve: process set-up, the model and its share of the device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Final

from specpool.process import set_cpu_affinity, set_num_threads
from specpool.v1 import types_pb2
from specpool_engine.distributions.transport import offered
from specpool_engine.modeling.attention import get_backend
from specpool_engine.modeling.cuda_graphs import describe_graphs
from specpool_engine.modeling.device_sharing import (
    DeviceShare,
    StreamPriority,
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

_SWITCH_INTERVAL_S: Final = 0.0005
"""How long one thread may keep the interpreter from the other; the default of 5 ms would show in every round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """The slice of a target's and a speculator's settings that is about the model and its process; equally named."""

    model: str
    model_name: str
    dtype: str
    device: str
    device_memory_share: float
    sm_share: float = 1.0
    stream_priority: StreamPriority
    tensor_parallel: int
    follower_start_timeout_s: float
    follower_step_timeout_s: float
    weights: str
    compile: bool
    draft_vocab_size: int = 0
    attention_backend: str
    cuda_graphs: str
    kv_cache_bytes: int
    num_kv_blocks: int
    block_size: int
    num_threads: int
    cpu_affinity: tuple[int, ...]
    distribution_transport: str

    @classmethod
    def of(cls, config: object) -> EngineSettings:
        """Taken from the settings of a service, which may lack those that have a default here."""
        names = [field.name for field in fields(cls) if hasattr(config, field.name)]
        return cls(**{name: getattr(config, name) for name in names})

    @property
    def share(self) -> DeviceShare:
        """What this process takes of its device."""
        return DeviceShare(
            memory=self.device_memory_share, multiprocessors=self.sm_share, priority=self.stream_priority
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedEngine:
    """A model that is ready to compute, and what belongs to it."""

    model: CausalModel
    tokenizer: Any
    info: types_pb2.ModelInfo
    """What peers and users learn of it."""
    prepare_thread: Callable[[], None]
    """To be called on the engine's thread: what torch and CUDA keep per thread."""


def prepare_process(settings: EngineSettings) -> None:
    """Before anything is loaded: refuse what cannot be had, and set cores, threads and the interpreter's switching."""
    offered(settings.distribution_transport, settings.device)
    set_cpu_affinity(settings.cpu_affinity)
    set_num_threads(settings.num_threads)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def load_engine(settings: EngineSettings, on_progress: Progress = no_progress) -> LoadedEngine:
    """Load model and tokenizer; takes as long as it takes."""
    await_mps(settings.device)
    stream = open_stream(parse_device(settings.device), settings.share)
    spec = ModelSpec.parse(settings.model)
    tokenizer = load_tokenizer(spec, on_progress=on_progress)
    model = load_model(
        spec,
        dtype=settings.dtype,
        device=settings.device,
        num_blocks=settings.num_kv_blocks or None,
        kv_cache_bytes=settings.kv_cache_bytes or None,
        memory_share=settings.device_memory_share,
        block_size=settings.block_size,
        attention_backend=settings.attention_backend,
        weights=settings.weights,
        compile_model=settings.compile,
        cuda_graphs=settings.cuda_graphs,
        num_frequent_tokens=settings.draft_vocab_size,
        other_tokens=tokenizer.all_special_ids,
        tensor_parallel=TensorParallelism(
            size=settings.tensor_parallel,
            start_timeout_s=settings.follower_start_timeout_s,
            step_timeout_s=settings.follower_step_timeout_s,
        ),
        stream=stream,
        on_progress=on_progress,
    )

    def prepare_thread() -> None:
        set_num_threads(settings.num_threads)
        use_stream(model.device, stream)

    info = _describe(settings, model, tokenizer)
    return LoadedEngine(model=model, tokenizer=tokenizer, info=info, prepare_thread=prepare_thread)


def _describe(settings: EngineSettings, model: CausalModel, tokenizer: Any) -> types_pb2.ModelInfo:
    return types_pb2.ModelInfo(
        name=settings.model_name or default_model_name(settings.model),
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        dtype=settings.dtype,
        attention_backend=settings.attention_backend,
        weights=settings.weights if ModelSpec.parse(settings.model).kind is ModelKind.TRANSFORMERS else "",
        cuda_graphs=describe_graphs(settings.cuda_graphs, model, get_backend(settings.attention_backend)),
        device=describe_device(model.device, settings.tensor_parallel) + describe_sharing(settings.share),
    )


def default_model_name(model: str) -> str:
    """Last part of the id or path."""
    spec = ModelSpec.parse(model)
    return spec.kind.value if spec.kind is not ModelKind.TRANSFORMERS else spec.source.rstrip("/").rsplit("/", 1)[-1]
