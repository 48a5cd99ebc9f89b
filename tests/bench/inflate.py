"""Embed a small model in a larger one that computes the same function.

    python tests/bench/inflate.py smollm2-135m-instruct /data/smollm2-like-8b --like 8b

A forward of the result reads as many bytes and multiplies as much as one of the larger shape, with the text, and the
agreement between draft and target, of the small model: so a large target can be timed without its weights. How:

- Widths are padded with zeros; the channels that are added stay zero all through the model.
- RMSNorm takes its mean over the larger width N instead of n: weights are scaled by sqrt(n / N), epsilon by n / N.
- Heads are added next to the old ones, so that every key/value head still serves the query heads it did; their values
  are zero. The head dimension, and with it the rotary embedding, stays.
- Layers are added that add zero to the residual stream.

Equal in exact arithmetic and within rounding in float32; in bfloat16 the scaled weights of norms, written in float32,
round once more.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from specpool_engine.modeling.files import no_progress, resolve_model_directory

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Of a `transformers` configuration."""
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        )

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads


LIKE = {
    # attention width and key/value width are what counts: heads are as many as fill them
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "attention": 4096, "kv": 1024},
    "32b": {"hidden_size": 5120, "intermediate_size": 27648, "num_layers": 64, "attention": 5120, "kv": 1024},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_layers": 80, "attention": 8192, "kv": 1024},
}


def shape_like(name: str, head_dim: int) -> Shape:
    """The shape of a well-known size, in heads of `head_dim`."""
    sizes = LIKE[name]
    return Shape(
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_layers"],
        num_heads=sizes["attention"] // head_dim,
        num_kv_heads=sizes["kv"] // head_dim,
        head_dim=head_dim,
    )


def check(small: Shape, large: Shape) -> None:
    """Raise ValueError if `small` does not fit into `large`."""
    for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        least, given = getattr(small, name), getattr(large, name)
        if given < least:
            raise ValueError(f"{name} must be at least the model's own {least}, got {given}")
    if large.head_dim != small.head_dim:
        raise ValueError(f"head_dim must stay {small.head_dim}, got {large.head_dim}")
    if large.hidden_size % large.num_heads:
        raise ValueError(
            f"hidden_size must be a multiple of num_heads, got {large.hidden_size} and {large.num_heads}: "
            "transformers refuses others"
        )
    if large.num_heads % large.num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got {large.num_heads} and {large.num_kv_heads}"
        )
    if large.group < small.group:
        raise ValueError(
            f"each key/value head must serve at least {small.group} query heads as in the model, got {large.group}: "
            f"num_heads must be at least {small.group * large.num_kv_heads}"
        )


def head_rows(small: Shape, large: Shape, *, of_queries: bool) -> Tensor:
    """Where the rows of the small model's heads go: query head j of group i to head j of the larger group i."""
    heads = torch.arange(small.num_heads if of_queries else small.num_kv_heads)
    if of_queries:
        heads = heads // small.group * large.group + heads % small.group
    return (heads[:, None] * small.head_dim + torch.arange(small.head_dim)).flatten()


def place(tensor: Tensor, shape: tuple[int, ...], rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """`tensor` in a larger tensor of zeros: at `rows` and `columns`, by default the first ones."""
    result = tensor.new_zeros(shape)
    rows = torch.arange(tensor.shape[0]) if rows is None else rows
    if tensor.dim() == 1:
        result[rows] = tensor
        return result
    columns = torch.arange(tensor.shape[1]) if columns is None else columns
    result[rows[:, None], columns] = tensor
    return result


def inflate_tensor(name: str, tensor: Tensor, small: Shape, large: Shape) -> Tensor:
    """One parameter of the larger model. Raises ValueError for one whose role is not known."""
    module, kind = name.split(".")[-2:]
    hidden, inner = large.hidden_size, large.intermediate_size
    if module in ("embed_tokens", "lm_head"):
        return place(tensor, (tensor.shape[0], hidden))
    if module in ("q_norm", "k_norm"):
        return tensor  # over a head's dimension, which stays
    if module.endswith("norm"):
        return place(tensor.float() * math.sqrt(small.hidden_size / hidden), (hidden,))
    if module in ("q_proj", "k_proj", "v_proj"):
        is_query = module == "q_proj"
        num_rows = (large.num_heads if is_query else large.num_kv_heads) * large.head_dim
        shape = (num_rows,) if kind == "bias" else (num_rows, hidden)
        return place(tensor, shape, rows=head_rows(small, large, of_queries=is_query))
    if kind == "weight" and module == "o_proj":
        shape = (hidden, large.num_heads * large.head_dim)
        return place(tensor, shape, columns=head_rows(small, large, of_queries=True))
    if kind == "weight" and module in ("gate_proj", "up_proj"):
        return place(tensor, (inner, hidden))
    if kind == "weight" and module == "down_proj":
        return place(tensor, (hidden, inner))
    if kind == "bias" and module in ("o_proj", "down_proj"):
        return place(tensor, (hidden,))
    if kind == "bias" and module in ("gate_proj", "up_proj"):
        return place(tensor, (inner,))
    raise ValueError(f"parameter {name} has no known role; accepted architectures: {', '.join(ARCHITECTURES)}")


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a model directory."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def inflate(source: Path, output: Path, large: Shape) -> None:
    """Write the larger model's directory, a file per layer, so that memory holds one layer at a time."""
    config = AutoConfig.from_pretrained(source)
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"{config.model_type} is not supported; accepted: {', '.join(ARCHITECTURES)}")
    small = Shape.of(config)
    check(small, large)
    output.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".txt", ".model", ".jinja") and not path.name.startswith(("model", "config")):
            shutil.copy(path, output / path.name)
    by_file: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(source):
        by_file.setdefault(_file_of(name), {})[name] = tensor
    files: dict[str, str] = {}
    for file, tensors in by_file.items():
        _write(output / file, {n: inflate_tensor(n, t, small, large) for n, t in tensors.items()}, files)
    last = by_file[_file_of(f"model.layers.{small.num_layers - 1}.")]
    for index in range(small.num_layers, large.num_layers):
        added = {n.replace(f".{small.num_layers - 1}.", f".{index}.", 1): torch.zeros_like(t) for n, t in last.items()}
        inflated = {n: inflate_tensor(n, t, small, large) for n, t in added.items()}
        _write(output / _file_of(f"model.layers.{index}."), inflated, files)
    (output / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    _write_config(config, output, small, large)


def _file_of(name: str) -> str:
    parts = name.split(".")
    return f"layer-{parts[2]}.safetensors" if parts[:2] == ["model", "layers"] else "rest.safetensors"


def _write(path: Path, tensors: dict[str, Tensor], files: dict[str, str]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    files.update(dict.fromkeys(tensors, path.name))


def _write_config(config: Any, output: Path, small: Shape, large: Shape) -> None:
    config.rms_norm_eps *= small.hidden_size / large.hidden_size
    config.hidden_size, config.intermediate_size = large.hidden_size, large.intermediate_size
    config.num_attention_heads, config.num_key_value_heads = large.num_heads, large.num_kv_heads
    config.head_dim, config.num_hidden_layers = large.head_dim, large.num_layers
    if getattr(config, "layer_types", None):
        config.layer_types += config.layer_types[-1:] * (large.num_layers - small.num_layers)
    config.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="hub id, directory or name of `specpool models list`")
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--like", choices=sorted(LIKE), help="a well-known shape; the options below replace parts of it"
    )
    for name in ("hidden-size", "intermediate-size", "num-layers", "num-heads", "num-kv-heads"):
        parser.add_argument(f"--{name}", type=int, help="default: as in the model, or in --like")
    arguments = parser.parse_args()
    source = resolve_model_directory(arguments.source, no_progress)
    own = Shape.of(AutoConfig.from_pretrained(source))
    base = shape_like(arguments.like, own.head_dim) if arguments.like else own
    given = {name: getattr(arguments, name) for name in vars(own) if getattr(arguments, name, None) is not None}
    try:
        inflate(source, arguments.output, Shape(**{**vars(base), **given}))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
