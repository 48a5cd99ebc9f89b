"""The weights of a GGUF file as they are: every linear layer computes with the file's own blocks.

Where a model was only published quantised, rounding its weights a second time would lose more for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specpool.errors import InvalidArgument
from specpool_engine.modeling.cpu.linear.fused import linear_groups, replace_group
from specpool_engine.modeling.cpu.linear.gguf_blocks import FORMATS, read_blocks
from specpool_engine.modeling.cpu.linear.quantised import CHUNK, QuantisedLinear
from specpool_engine.modeling.files import Progress, no_progress
from specpool_engine.modeling.vocabulary import FrequentTokensHead

_COMPARED_ROWS = 256
"""Rows of a layer that are compared with the model's: more than a head has, and order differs within heads only."""


class GgufFile:
    """The tensors of a file by the names that `transformers` gives them."""

    def __init__(self, path: Path) -> None:
        """Raises `InvalidArgument` for a file that cannot be read and an architecture that is unknown."""
        import gguf

        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            architecture = str(reader.fields["general.architecture"].contents())
            num_layers = int(reader.fields[f"{architecture}.block_count"].contents())
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise self.refused(f"it cannot be read: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        if architecture not in known:
            raise self.refused(f"its architecture {architecture!r} is unknown")
        self._names = gguf.get_tensor_name_map(known[architecture], num_layers)

    def tensor(self, name: str) -> Any:
        """The tensor of a layer; a head that is not there is the embedding."""
        found = self._tensors.get(f"{self._names.get_name(name)}.weight")
        if found is None and self._names.get_name(name) == "output":
            found = self._tensors.get("token_embd.weight")
        if found is None:
            raise self.refused(f"it has no tensor for the layer {name}")
        return found

    def refused(self, why: str) -> InvalidArgument:
        """The error that says why the file cannot be used as it is."""
        return InvalidArgument(
            f"weights format 'gguf' cannot be used with {self.path}: {why}",
            metadata={"field": "weights", "value": "gguf", "file": self.path},
        )


class _Rows:
    """Raw rows of one layer, in the model's order."""

    def __init__(self, file: GgufFile, name: str, layer: nn.Linear, kept: Tensor | None, head_size: int) -> None:
        tensor = file.tensor(name)
        self.kind = tensor.tensor_type.name
        if self.kind not in FORMATS:
            raise file.refused(f"the layer {name} is in {self.kind}; accepted: {', '.join(FORMATS)}")
        self._raw = tensor.data
        self._order = self._find_order(file, name, layer, kept, head_size)

    def _find_order(self, file: GgufFile, name: str, layer: nn.Linear, kept: Tensor | None, head_size: int) -> Tensor:
        """Some files have the rows of a head in the order that their own rotation wants: the model's weights tell."""
        every = torch.arange(self._raw.shape[0])
        orders = [every if kept is None else kept]
        if kept is None and len(every) % head_size == 0:
            orders.append(every.view(-1, head_size // 2, 2).transpose(1, 2).flatten())
        for order in orders:
            if len(order) != layer.out_features:
                continue
            ours = dequantised(self.kind, self._raw, order[:_COMPARED_ROWS])
            theirs = layer.weight.detach()[:_COMPARED_ROWS].float()
            if ours.shape == theirs.shape and (ours - theirs).norm() <= 0.01 * theirs.norm():
                return order
        raise file.refused(f"its rows of the layer {name} are not those of the model")

    def chunks(self) -> Iterator[Tensor]:
        """The raw rows, some at a time."""
        for rows in torch.split(self._order, CHUNK):
            yield _taken(self._raw, rows)


def _taken(raw: Any, rows: Tensor) -> Tensor:
    return torch.from_numpy(raw[rows.numpy()])


def dequantised(kind: str, raw: Any, rows: Tensor) -> Tensor:
    """Rows of a tensor in float32."""
    import gguf

    return torch.from_numpy(gguf.dequantize(raw[rows.numpy()], gguf.GGMLQuantizationType[kind]))


def convert_from_gguf(model: Any, path: Path, on_progress: Progress = no_progress) -> None:
    """Replace every linear layer of a `transformers` model in place by one with the file's weights, and its embedding.

    Raises `InvalidArgument` where a tensor is missing, of a type that is not in `FORMATS`, or not the model's.
    """
    file = GgufFile(path)
    config = model.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    names: Mapping[nn.Module, str] = {module: name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    groups = list(linear_groups(model))
    for done, (parent, children) in enumerate(groups, start=1):
        rows: dict[str, _Rows] = {}
        for child in children:
            layer: Any = parent.get_submodule(child)
            cut = parent if parent is head and isinstance(parent, FrequentTokensHead) else None
            name = f"{names[parent]}.{child}".lstrip(".") if cut is None else names[parent]
            rows[child] = _Rows(file, name, layer, cut.tokens if cut else None, head_size)
        for kind in sorted({each.kind for each in rows.values()}):
            _replace(parent, {child: each for child, each in rows.items() if each.kind == kind})
        on_progress("pack weights", done, len(groups))
    _fill_embedding(model, file)


def _replace(parent: nn.Module, rows: Mapping[str, _Rows]) -> None:
    """Layers of one type over one input become one product."""
    kind = next(iter(rows.values())).kind
    raw = torch.cat([chunk for each in rows.values() for chunk in each.chunks()])
    blocks = (read_blocks(kind, chunk) for chunk in torch.split(raw, CHUNK))
    replace_group(parent, list(rows), lambda joined: QuantisedLinear(joined, FORMATS[kind], blocks))


def _fill_embedding(model: Any, file: GgufFile) -> None:
    embedding = model.get_input_embeddings()
    tensor = file.tensor("model.embed_tokens")
    if tensor.tensor_type.name in FORMATS and tensor.data.shape[0] == embedding.num_embeddings:
        filled = torch.empty_like(embedding.weight)
        for rows in torch.split(torch.arange(embedding.num_embeddings), CHUNK):
            filled[rows] = dequantised(tensor.tensor_type.name, tensor.data, rows).to(filled.dtype)
        embedding.weight = nn.Parameter(filled, requires_grad=False)
