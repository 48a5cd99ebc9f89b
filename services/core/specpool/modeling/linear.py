"""Linear layers with weights laid out for the CPU: most of a decoding step is reading weights.

Formats:
    plain      as `transformers` made them
    prepacked  same numbers and data type, reordered once into oneDNN's blocked layout
    streamed   same numbers in bfloat16 for a kernel of our own, which reads them as one stream; for AVX-512 bf16
    int8       weights quantised per output channel, inputs per token; for drafts: it changes the model's output

In all but the first, layers of one parent that read the same input become one product: with few rows, a layer costs
about as much to start as to read.

Shapes: M = rows, I = input features, O = output features.
"""

from __future__ import annotations

import ctypes
import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specpool.errors import InvalidArgument
from specpool.modeling.files import Progress, no_progress
from specpool.modeling.huge_pages import empty_in_huge_pages
from specpool.modeling.native import load_library
from specpool.modeling.operators import define_operator

_PACKING_ROWS = 8
"""Rows that oneDNN chooses the blocked layout for; the layout then serves any number of rows."""

MIN_ROWS = 4
"""oneDNN is slower for one to three rows than for four: fewer rows are padded. It also makes one token and the few
tokens of a verification go through one kernel, so that they round alike."""

_STREAMED_BLOCK = 64
"""Outputs whose weights lie together in the layout of `streamed_linear.cpp`."""

_SHARE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names, in `transformers`, of layers that read the same input."""


_packed_layers: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()
_next_id = itertools.count()


class PackedLinear(nn.Module, ABC):
    """A linear layer whose weight is in a layout that only its own kernel knows.

    Its product is an operator that looks the layer up by number, so that a compiler leaves it as it is.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._id = next(_next_id)
        _packed_layers[self._id] = self

    def product(self, rows: Tensor) -> Tensor:  # [M, I] -> [M, O]
        """`multiply`, as an operator."""
        return _multiply(rows, self._id, self.out_features)

    @abstractmethod
    def multiply(self, rows: Tensor) -> Tensor:  # [M, I] -> [M, O]
        """What the kernel computes."""


_multiply = define_operator(
    "packed_linear(Tensor rows, int layer, int out_features) -> Tensor",
    lambda rows, layer, out_features: _packed_layers[layer].multiply(rows),
    fake=lambda rows, layer, out_features: rows.new_empty(rows.shape[0], out_features),
)


class PrepackedLinear(PackedLinear):
    """`nn.Linear` through oneDNN with the weight in its blocked layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _PACKING_ROWS)

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        """The same product."""
        return self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def multiply(self, rows: Tensor) -> Tensor:
        """With the bias."""
        num_rows = rows.shape[0]
        if num_rows < MIN_ROWS:
            rows = F.pad(rows, (0, 0, 0, MIN_ROWS - num_rows))
        output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return output[:num_rows]


class StreamedLinear(PackedLinear):
    """`nn.Linear` in bfloat16 through `streamed_linear.cpp`.

    A row's result does not depend on the number of rows: prefill, one token and a verification round alike.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._bias = None if linear.bias is None else linear.bias.detach().float().contiguous()
        self._weight = _in_blocks(linear.weight.detach())
        self._kernel = load_library("streamed_linear").specpool_streamed_linear
        self._kernel.argtypes = (*[ctypes.c_void_p] * 4, *[ctypes.c_long] * 3, ctypes.c_int)
        self._kernel.restype = None

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        """The same product."""
        return self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def multiply(self, rows: Tensor) -> Tensor:
        """With the bias."""
        num_rows = rows.shape[0]
        rows = rows.contiguous()
        if self.in_features % 2:
            rows = F.pad(rows, (0, 1))
        output = rows.new_empty(num_rows, self.out_features)
        bias = None if self._bias is None else self._bias.data_ptr()
        addresses = (rows.data_ptr(), self._weight.data_ptr(), bias, output.data_ptr())
        self._kernel(*addresses, num_rows, rows.shape[1], self.out_features, torch.get_num_threads())
        return output


def _in_blocks(weight: Tensor) -> Tensor:  # [O, I] -> flat [O / 64, I / 2, 64, 2], filled up with zeros
    out_features, in_features = weight.shape
    num_blocks, num_pairs = -(-out_features // _STREAMED_BLOCK), -(-in_features // 2)
    packed = empty_in_huge_pages(num_blocks * num_pairs * _STREAMED_BLOCK * 2, weight.dtype)
    blocks = packed.view(num_blocks, num_pairs, _STREAMED_BLOCK, 2)
    for block, rows in zip(blocks, torch.split(weight, _STREAMED_BLOCK), strict=True):
        filled = F.pad(rows, (0, in_features % 2, 0, _STREAMED_BLOCK - rows.shape[0]))
        block.copy_(filled.view(_STREAMED_BLOCK, num_pairs, 2).transpose(0, 1))
    return packed


class Int8Linear(PackedLinear):
    """`nn.Linear` with int8 weights and inputs through FBGEMM."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp_min(1e-12) / 127.0
        zero_points = torch.zeros(self.out_features, dtype=torch.long)
        with warnings.catch_warnings():
            # torch deprecates quantised tensors, yet FBGEMM's prepacking, its fastest kernel here, takes nothing else.
            warnings.simplefilter("ignore", UserWarning)
            quantised = torch.quantize_per_channel(weight, scales, zero_points, 0, torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.bias = bias
        self._weight = torch.ops.quantized.linear_prepack(quantised, None)
        # Without VNNI instructions FBGEMM saturates 16-bit sums unless the inputs have 7 bits.
        self._reduce_range = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        """The product, approximately."""
        rows = x.reshape(-1, self.in_features).float()
        # FBGEMM quantises all rows with one scale: bring every row to the same range first, or one row with large
        # values would take the precision of all others.
        scale = rows.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
        output = self.product(rows / scale) * scale
        if self.bias is not None:
            output = output + self.bias
        return output.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def multiply(self, rows: Tensor) -> Tensor:
        """Without scale and bias."""
        output: Tensor = torch.ops.quantized.linear_dynamic(rows, self._weight, self._reduce_range)
        return output


class FusedLinear:
    """Layers over the same input as one product: the first of them to be called runs it for all."""

    def __init__(self, product: nn.Module, sizes: Sequence[int]) -> None:
        self._product = product
        self._sizes = list(sizes)
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def part(self, x: Tensor, index: int) -> Tensor:  # [..., I] -> [..., sizes[index]]
        """Output of one layer. A result is handed out once, and only for the very tensor it was computed from."""
        if self._input is not x or self._outputs[index] is None:
            self._input, self._outputs = x, list(self._product(x).split(self._sizes, dim=-1))
        output = self._outputs[index]
        assert output is not None
        self._outputs[index] = None
        if not any(part is not None for part in self._outputs):
            self._input = None
        return output


class LinearPart(nn.Module):
    """One layer of a `FusedLinear`, in the place where the model looks for it."""

    def __init__(self, fused: FusedLinear, index: int) -> None:
        super().__init__()
        self._fused = fused
        self._index = index

    def forward(self, x: Tensor) -> Tensor:  # [..., I] -> [..., O]
        """The layer's output."""
        return self._fused.part(x, self._index)


WEIGHT_FORMATS: Mapping[str, Callable[[Any], nn.Module] | None] = {
    "plain": None,
    "prepacked": PrepackedLinear,
    "streamed": StreamedLinear,
    "int8": Int8Linear,
}


def check_weight_format(name: str, *, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a format that is unknown or that this machine cannot run."""
    if name not in WEIGHT_FORMATS:
        raise _refused(name, f"accepted: {', '.join(WEIGHT_FORMATS)}")
    if name == "plain":
        return
    if device.type != "cpu":
        raise _refused(name, f"it is for the CPU only, and the device is {device}")
    if name == "int8" and "fbgemm" not in torch.backends.quantized.supported_engines:
        raise _refused(name, "this build of torch has no FBGEMM")
    if name == "streamed" and not can_stream(dtype):
        raise _refused(name, f"it needs bfloat16, not {dtype}, and a CPU with AVX-512 bf16 instructions")
    if name == "prepacked" and not _can_prepack(dtype):
        raise _refused(name, f"oneDNN of this build of torch or this CPU cannot do {dtype}")


def convert_linears(model: nn.Module, name: str, on_progress: Progress = no_progress) -> None:
    """Replace every linear layer of `model` in place; the old weights are freed one by one."""
    convert = WEIGHT_FORMATS[name]
    if convert is None:
        return
    previous_engine = torch.backends.quantized.engine
    if name == "int8":
        torch.backends.quantized.engine = "fbgemm"
    groups = list(_groups(model))
    try:
        for done, (parent, names) in enumerate(groups, start=1):
            _convert_group(parent, names, convert)
            on_progress("pack weights", done, len(groups))
    finally:
        torch.backends.quantized.engine = previous_engine


def _groups(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Every linear layer once: parent, and the names of those that share an input."""
    for parent in model.modules():
        names = [name for name, child in parent.named_children() if type(child) is nn.Linear]
        for group in _SHARE_INPUT:
            if set(group) <= set(names) and len({parent.get_submodule(name).in_features for name in group}) == 1:
                yield parent, group
                names = [name for name in names if name not in group]
        yield from ((parent, (name,)) for name in names)


def _convert_group(parent: nn.Module, names: Sequence[str], convert: Callable[[Any], nn.Module]) -> None:
    layers: list[Any] = [parent.get_submodule(name) for name in names]
    if len(layers) == 1:
        setattr(parent, names[0], convert(layers[0]))
        return
    fused = FusedLinear(convert(_concatenated(layers)), [layer.out_features for layer in layers])
    for index, name in enumerate(names):
        setattr(parent, name, LinearPart(fused, index))


def _concatenated(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer with the outputs of all."""
    size = sum(layer.out_features for layer in layers)
    joined = nn.Linear(layers[0].in_features, size, bias=any(layer.bias is not None for layer in layers), device="meta")
    joined.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
    if joined.bias is not None:
        biases = [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
        joined.bias = nn.Parameter(torch.cat([bias.detach() for bias in biases]), requires_grad=False)
    return joined


def can_stream(dtype: torch.dtype) -> bool:
    """Whether this CPU can run `streamed`; it also needs a compiler, see `specpool.modeling.native`."""
    return dtype is torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()


def _can_prepack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call, unused-ignore]
        return False
    supported: Mapping[torch.dtype, Callable[[], Any]] = {
        torch.float32: lambda: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return bool(supported[dtype]())


def _refused(name: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"weights format {name!r} cannot be used: {why}", metadata={"field": "weights", "value": name}
    )
