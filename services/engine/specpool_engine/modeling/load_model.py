"""Loading models: `load_model` turns a specification into a `CausalModel` with its own KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from specpool.errors import InvalidArgument
from specpool_engine.modeling.attention import get_backend
from specpool_engine.modeling.checkpoint import read_config, read_model
from specpool_engine.modeling.compiled_model import compile_decoder
from specpool_engine.modeling.cpu.linear import check_weight_format, convert_linears
from specpool_engine.modeling.cpu.linear.gguf import convert_from_gguf
from specpool_engine.modeling.cuda_graphs import capture_graphs, wants_graphs
from specpool_engine.modeling.device_sharing import limit_memory
from specpool_engine.modeling.files import Progress, find_gguf, no_progress, resolve_model_directory
from specpool_engine.modeling.interface import CausalModel
from specpool_engine.modeling.kv_budget import KVBudget
from specpool_engine.modeling.model import KVGeometry, TransformersModel
from specpool_engine.modeling.paged_kv import BlockPool
from specpool_engine.modeling.spec import ModelKind, ModelSpec
from specpool_engine.modeling.tensor_parallel.leader import load_tensor_parallel
from specpool_engine.modeling.tensor_parallel.settings import SINGLE, TensorParallelism, check_tensor_parallel
from specpool_engine.modeling.timed import TimedModel
from specpool_engine.modeling.toy import DraftTable, RandomModel, ToyModel, ToyTable
from specpool_engine.modeling.vocabulary import keep_frequent_tokens

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
TOY_NUM_BLOCKS = 4096


def load_model(
    spec: ModelSpec | str,
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    num_blocks: int | None = None,
    kv_cache_bytes: int | None = None,
    memory_share: float = 1.0,
    block_size: int = 16,
    attention_backend: str = "sdpa",
    weights: str = "plain",
    compile_model: bool = False,
    cuda_graphs: str = "auto",
    num_frequent_tokens: int = 0,
    other_tokens: Iterable[int] = (),
    tensor_parallel: TensorParallelism = SINGLE,
    stream: Any = None,
    on_progress: Progress = no_progress,
) -> CausalModel:
    """Load a model and allocate its KV cache of `num_blocks`, or of `kv_cache_bytes`, or of the default size.

    `memory_share` is what this process may use of a GPU's memory, and `stream` the one on which forwards will be
    called, if it is not the usual one: see `device_sharing`. `weights` is a format of `cpu.linear`. With
    `num_frequent_tokens` the head knows only that many first tokens and `other_tokens`, see `vocabulary`.
    `compile_model` compiles the decoder, see `compiled_model`; `cuda_graphs` is auto, on or off, see `cuda_graphs`.
    Models without weights ignore all of these. With `tensor_parallel` the model is split over processes, see
    `tensor_parallel`: what it returns is a `DistributedModel`, and the sizes are those of each part.
    """
    spec = ModelSpec.parse(spec) if isinstance(spec, str) else spec
    backend = get_backend(attention_backend)
    torch_dtype, torch_device = parse_dtype(dtype), parse_device(device)
    check_weight_format(weights, dtype=torch_dtype, device=torch_device)
    budget = KVBudget(num_blocks=num_blocks, num_bytes=kv_cache_bytes, block_size=block_size, memory_share=memory_share)
    if tensor_parallel.size > 1:
        check_tensor_parallel(
            spec,
            tensor_parallel,
            device=torch_device,
            weights=weights,
            compile_model=compile_model,
            cuda_graphs=cuda_graphs,
            num_frequent_tokens=num_frequent_tokens,
        )
        backend.check(dtype=torch_dtype, device=torch_device, block_size=block_size)
        return load_tensor_parallel(
            spec,
            tensor_parallel,
            dtype=torch_dtype,
            device=torch_device,
            backend=attention_backend,
            budget=budget,
            on_progress=on_progress,
        )
    if spec.kind in (ModelKind.TOY, ModelKind.TIMED):
        return _toy(spec, BlockPool(num_blocks or TOY_NUM_BLOCKS, block_size))
    if spec.kind is ModelKind.RANDOM:
        return _random(spec, BlockPool(num_blocks or TOY_NUM_BLOCKS, block_size), on_progress)
    limit_memory(torch_device, memory_share)
    with_graphs = wants_graphs(cuda_graphs, backend, torch_device)
    backend.check(dtype=torch_dtype, device=torch_device, block_size=block_size)
    directory = resolve_model_directory(spec.source, on_progress)
    on_progress("load", 0, 1)
    model = read_model(spec, directory, torch_dtype).to(torch_device)
    on_progress("load", 1, 1)
    if num_frequent_tokens:
        keep_frequent_tokens(model, num_frequent_tokens, other_tokens)
    if weights == "gguf":
        convert_from_gguf(model, find_gguf(spec.source, directory), on_progress)
    else:
        convert_linears(model, weights, on_progress)
    on_progress("allocate", 0, 1)
    bytes_per_token = KVGeometry.of(model.config.get_text_config()).bytes_per_token(torch_dtype)
    pool = BlockPool(budget.blocks(bytes_per_token, torch_device), block_size)
    result = TransformersModel(model, pool=pool, backend=backend)
    on_progress("allocate", 1, 1)
    if compile_model:
        compile_decoder(result, on_progress)
    if with_graphs:
        capture_graphs(result, on_progress, stream)
    return result


def parse_dtype(name: str) -> torch.dtype:
    """The torch data type of a name: float32, bfloat16 or float16. Raises InvalidArgument."""
    if name not in DTYPES:
        raise InvalidArgument(
            f"unknown dtype {name!r}; accepted: {', '.join(DTYPES)}",
            metadata={"field": "dtype", "value": name, "accepted": ", ".join(DTYPES)},
        )
    return DTYPES[name]


def parse_device(name: str) -> torch.device:
    """Torch device by name, on CUDA with its index; what is not there is an error, never replaced by another."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidArgument(f"unknown device {name!r}; accepted: cpu, cuda, cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidArgument(f"device {name!r} is not available: {torch.cuda.device_count()} CUDA devices are visible")
    return torch.device("cuda", 0) if device == torch.device("cuda") else device


def _toy(spec: ModelSpec, pool: BlockPool) -> CausalModel:
    table = ToyTable(
        spec.integer("vocab", 64, minimum=2) or 64,
        spec.integer("seed", 1) or 0,
        spec.number("sharpness", 3.0),
    )
    agreement = spec.number("agreement", 1.0, maximum=1.0)
    noise = spec.number("noise", 0.0)
    if agreement < 1.0 or noise:
        draft_seed = spec.integer("draft_seed", table.seed + 1) or 0
        table = DraftTable(table, agreement=agreement, draft_seed=draft_seed, noise=noise)
    return (TimedModel if spec.kind is ModelKind.TIMED else ToyModel)(
        table,
        pool,
        max_context=spec.integer("context", 4096, minimum=2) or 4096,
        step_ms=spec.number("step_ms", 0.0),
        row_ms=spec.number("row_ms", 0.0),
    )


def _random(spec: ModelSpec, pool: BlockPool, on_progress: Progress) -> RandomModel:
    like = ModelSpec.parse(spec.source)
    if like.kind is not ModelKind.TRANSFORMERS:
        model = load_model(like, num_blocks=1)
        return RandomModel(model.vocab_size, pool, max_context=model.max_context)
    config = read_config(like, resolve_model_directory(like.source, on_progress)).get_text_config()
    return RandomModel(config.vocab_size, pool, max_context=config.max_position_embeddings)
