"""Linear layers with weights laid out for the CPU: most of a decoding step is reading weights.

Formats:
    plain      as `transformers` made them
    prepacked  same numbers and data type, reordered once into oneDNN's blocked layout
    streamed   same numbers in bfloat16 for a kernel of our own, which reads them as one stream; for AVX-512 bf16
    int8       weights quantised per output channel, inputs per token; for drafts: it changes the model's output
    int4       weights quantised in groups of 32, for a kernel of our own and AVX-512 VNNI or AVX2; for drafts likewise
    gguf       weights as a GGUF file has them, for the same kernel, see `gguf`

In all but the first, layers of one parent that read the same input become one product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from specpool.errors import InvalidArgument
from specpool_engine.modeling.cpu.linear.fused import linear_groups, replace_group
from specpool_engine.modeling.cpu.linear.int4 import Int4Linear
from specpool_engine.modeling.cpu.linear.int8 import Int8Linear
from specpool_engine.modeling.cpu.linear.prepacked import PrepackedLinear
from specpool_engine.modeling.cpu.linear.streamed import StreamedLinear
from specpool_engine.modeling.files import Progress, no_progress

WEIGHT_FORMATS: Mapping[str, Callable[[Any], nn.Module] | None] = {
    "plain": None,
    "prepacked": PrepackedLinear,
    "streamed": StreamedLinear,
    "int8": Int8Linear,
    "int4": Int4Linear,
    "gguf": None,
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
    if name in ("int4", "gguf") and not can_use_int4():
        raise _refused(name, "it needs a CPU with AVX2 or AVX-512 VNNI instructions")
    if name == "streamed" and not can_stream(dtype):
        raise _refused(name, f"it needs bfloat16, not {dtype}, and a CPU with AVX-512 bf16 instructions")
    if name == "prepacked" and not _can_prepack(dtype):
        raise _refused(name, f"oneDNN of this build of torch or this CPU cannot do {dtype}")


def can_stream(dtype: torch.dtype) -> bool:
    """Whether this CPU can run `streamed`; it also needs a compiler, see `specpool_engine.modeling.cpu.native`."""
    return dtype is torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()


def can_use_int4() -> bool:
    """Whether this CPU can run `int4` and `gguf`, given a compiler: see `specpool_engine.modeling.cpu.native`."""
    return torch.cpu._is_avx2_supported()


def convert_linears(model: nn.Module, name: str, on_progress: Progress = no_progress) -> None:
    """Replace every linear layer of `model` in place; the old weights are freed one by one."""
    convert = WEIGHT_FORMATS[name]
    if convert is None:
        return
    previous_engine = torch.backends.quantized.engine
    if name == "int8":
        torch.backends.quantized.engine = "fbgemm"
    groups = list(linear_groups(model))
    try:
        for done, (parent, names) in enumerate(groups, start=1):
            replace_group(parent, names, convert)
            on_progress("pack weights", done, len(groups))
    finally:
        torch.backends.quantized.engine = previous_engine


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
