"""Loading models: `load_model` turns a specification into a `CausalModel` with its own KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from specpool.errors import InvalidArgument
from specpool.modeling.attention import get_backend
from specpool.modeling.compiling import compile_decoder
from specpool.modeling.cuda_graphs import capture_graphs, wants_graphs
from specpool.modeling.files import Progress, no_progress, quiet_transformers, resolve_model_directory
from specpool.modeling.interface import CausalModel
from specpool.modeling.linear import check_weight_format, convert_linears
from specpool.modeling.model import KVGeometry, TransformersModel
from specpool.modeling.paged_kv import BlockPool
from specpool.modeling.spec import ModelKind, ModelSpec
from specpool.modeling.toy import DraftTable, RandomModel, ToyModel, ToyTable
from specpool.modeling.vocabulary import keep_frequent_tokens

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
CPU_KV_CACHE_BYTES = 1 << 30
GPU_KV_CACHE_SHARE = 0.85
"""Of the memory that is free after the weights are loaded."""
TOY_NUM_BLOCKS = 4096


def load_model(
    spec: ModelSpec | str,
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    num_blocks: int | None = None,
    kv_cache_bytes: int | None = None,
    block_size: int = 16,
    attention_backend: str = "sdpa",
    weights: str = "plain",
    compile_model: bool = False,
    cuda_graphs: str = "auto",
    num_frequent_tokens: int = 0,
    other_tokens: Iterable[int] = (),
    on_progress: Progress = no_progress,
) -> CausalModel:
    """Load a model and allocate its KV cache of `num_blocks`, or of `kv_cache_bytes`, or of the default size.

    `weights` is a format of `specpool.modeling.linear`. With `num_frequent_tokens` the head knows only that many first
    tokens and `other_tokens`, see `specpool.modeling.vocabulary`. `compile_model` compiles the decoder, see
    `specpool.modeling.compiling`; `cuda_graphs` is auto, on or off, see `specpool.modeling.cuda_graphs`. Models without
    weights ignore all of these.
    """
    spec = ModelSpec.parse(spec) if isinstance(spec, str) else spec
    backend = get_backend(attention_backend)
    torch_dtype, torch_device = parse_dtype(dtype), parse_device(device)
    check_weight_format(weights, dtype=torch_dtype, device=torch_device)
    if spec.kind is ModelKind.TOY:
        return _toy(spec, BlockPool(num_blocks or TOY_NUM_BLOCKS, block_size))
    if spec.kind is ModelKind.RANDOM:
        return _random(spec, BlockPool(num_blocks or TOY_NUM_BLOCKS, block_size), on_progress)
    with_graphs = wants_graphs(cuda_graphs, backend, torch_device)
    backend.check(dtype=torch_dtype, device=torch_device, block_size=block_size)
    model = _transformers_model(spec, torch_dtype, torch_device, on_progress)
    if num_frequent_tokens:
        keep_frequent_tokens(model, num_frequent_tokens, other_tokens)
    convert_linears(model, weights, on_progress)
    on_progress("allocate", 0, 1)
    if num_blocks is None:
        geometry = KVGeometry.of(model.config.get_text_config())
        budget = kv_cache_bytes or _default_kv_cache_bytes(torch_device)
        num_blocks = _blocks_in(budget, geometry.bytes_per_token(torch_dtype) * block_size)
    result = TransformersModel(model, pool=BlockPool(num_blocks, block_size), backend=backend)
    on_progress("allocate", 1, 1)
    if compile_model:
        compile_decoder(result, on_progress)
    if with_graphs:
        capture_graphs(result, on_progress)
    return result


def parse_dtype(name: str) -> torch.dtype:
    """Torch data type by name."""
    if name not in DTYPES:
        raise InvalidArgument(
            f"unknown dtype {name!r}; accepted: {', '.join(DTYPES)}",
            metadata={"field": "dtype", "value": name, "accepted": ", ".join(DTYPES)},
        )
    return DTYPES[name]


def parse_device(name: str) -> torch.device:
    """Torch device by name; a device that is not there is an error, never replaced by another."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidArgument(f"unknown device {name!r}; accepted: cpu, cuda, cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidArgument(f"device {name!r} is not available: {torch.cuda.device_count()} CUDA devices are visible")
    return device


def _blocks_in(budget_bytes: int, block_bytes: int) -> int:
    if budget_bytes < block_bytes:
        raise InvalidArgument(
            f"kv_cache_bytes {budget_bytes} is less than one block of {block_bytes} bytes",
            metadata={"field": "kv_cache_bytes", "value": budget_bytes},
        )
    return budget_bytes // block_bytes


def _default_kv_cache_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_KV_CACHE_BYTES
    num_free_bytes, _ = torch.cuda.mem_get_info(device)
    return int(num_free_bytes * GPU_KV_CACHE_SHARE)


def _toy(spec: ModelSpec, pool: BlockPool) -> ToyModel:
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
    return ToyModel(
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
    config = _config(like, resolve_model_directory(like.source, on_progress)).get_text_config()
    return RandomModel(config.vocab_size, pool, max_context=config.max_position_embeddings)


def _config(spec: ModelSpec, directory: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory)
    except (ValueError, OSError, KeyError) as error:
        raise InvalidArgument(
            f"cannot use the configuration of {spec.text!r}: {error}", reason="MODEL_UNSUPPORTED"
        ) from error
    if spec.num_layers is not None:
        _keep_first_layers(spec, config.get_text_config())
    return config


def _keep_first_layers(spec: ModelSpec, config: Any) -> None:
    if spec.num_layers is None or spec.num_layers > config.num_hidden_layers:
        raise InvalidArgument(
            f"{spec.text!r} asks for {spec.num_layers} layers; the model has {config.num_hidden_layers}",
            metadata={"field": "layers", "value": spec.num_layers, "accepted": config.num_hidden_layers},
        )
    config.num_hidden_layers = spec.num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: spec.num_layers]


def _transformers_model(spec: ModelSpec, dtype: torch.dtype, device: torch.device, on_progress: Progress) -> Any:
    from transformers import AutoModelForCausalLM

    directory = resolve_model_directory(spec.source, on_progress)
    config = _config(spec, directory)
    on_progress("load", 0, 1)
    try:
        with quiet_transformers():  # it would report the layers left out on purpose
            model = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=dtype)
    except (ValueError, OSError) as error:
        raise InvalidArgument(
            f"cannot load the weights of {spec.text!r}: {error}", reason="MODEL_UNSUPPORTED"
        ) from error
    model = model.to(device)
    on_progress("load", 1, 1)
    return model
