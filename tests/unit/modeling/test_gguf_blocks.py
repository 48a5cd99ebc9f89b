"""The blocks of GGUF files as weights: every value, scale and product is the file's."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from specpool import native as compiling
from specpool.native import has_compiler
from specpool_engine.modeling.cpu import native
from specpool_engine.modeling.cpu.linear import can_use_int4
from specpool_engine.modeling.cpu.linear.gguf_blocks import FORMATS, read_blocks
from specpool_engine.modeling.cpu.linear.quantised import CHUNK, Blocks, QuantisedLinear

needs_kernel = pytest.mark.skipif(not can_use_int4() or not has_compiler(), reason="needs AVX2 and a C++ compiler")
SOURCE = str(Path(native.__file__).parent / "quantised_linear.cpp")
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2]}
"""Where a block has numbers in float16."""


def random_blocks(kind: str, num_rows: int, num_inputs: int, seed: int = 0) -> np.ndarray:
    """Any bytes, but for the numbers in float16, which are of a usual size and either sign."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    draw = np.random.default_rng(seed)
    raw = draw.integers(0, 256, (num_rows, num_inputs // block, size), dtype=np.uint8)
    for offset in HALVES.get(kind, [208]):
        numbers = draw.normal(0, 0.01, raw.shape[:2]).astype(np.float16)
        raw[..., offset : offset + 2] = numbers[..., None].view(np.uint8)
    return raw.reshape(num_rows, -1)


def dequantised(kind: str, raw: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]))


def weights_of(kind: str, blocks: Blocks) -> torch.Tensor:
    """[O, I] in float32, by the definition in `Blocks`."""
    form = FORMATS[kind]

    def spread(numbers: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
        numbers = (numbers.view(torch.int8) if factors is not None else numbers).float()
        if factors is not None:
            numbers = numbers * factors.float().repeat_interleave(numbers.shape[1] // factors.shape[1], 1)
        return numbers.repeat_interleave(blocks.values.shape[1] // numbers.shape[1], 1)

    scales = spread(blocks.scales, blocks.factors[0] if blocks.factors else None)
    weights = scales * (blocks.values.float() - form.zero)
    if blocks.leasts is not None:
        weights = weights + spread(blocks.leasts, blocks.factors[1] if blocks.factors else None)
    return weights


def layer_of(
    kind: str, raw: np.ndarray, num_inputs: int, *, bias: bool = False
) -> tuple[torch.nn.Linear, QuantisedLinear]:
    layer = torch.nn.Linear(num_inputs, len(raw), bias=bias)
    layer.weight.data = dequantised(kind, raw)
    chunks = (read_blocks(kind, chunk) for chunk in torch.from_numpy(raw).split(CHUNK))
    return layer, QuantisedLinear(layer, FORMATS[kind], chunks)


@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_are_what_the_format_says(kind: str) -> None:
    raw = random_blocks(kind, 7, 768)
    actual = weights_of(kind, read_blocks(kind, torch.from_numpy(raw)))
    torch.testing.assert_close(actual, dequantised(kind, raw), rtol=1e-6, atol=1e-6)


@needs_kernel
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("num_rows", [45, CHUNK + 33])
def test_products_are_those_of_the_files_weights(kind: str, num_rows: int) -> None:
    torch.manual_seed(0)
    layer, packed = layer_of(kind, random_blocks(kind, num_rows, 768), 768, bias=True)
    x = torch.randn(19, 768)
    with torch.inference_mode():
        expected, actual = layer(x), packed(x)
        assert all(packed(x[:rows]).equal(actual[:rows]) for rows in range(1, len(x)))
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 0.02, "inputs are rounded to 8 bits"


@needs_kernel
@pytest.mark.parametrize("flags", [("-march=native",), ("-march=haswell",)])
@pytest.mark.parametrize("kind", FORMATS)
def test_products_are_exact_within_groups_by_all_instructions(
    kind: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    """Powers of two as scales leave nothing to round; extreme values and inputs may not saturate any sum."""
    raw = random_blocks(kind, 45, 512).reshape(45, -1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
    for offset in HALVES.get(kind, [208]):
        raw[..., offset : offset + 2] = np.array([1.0], np.float16).view(np.uint8)
    raw[0, :, 16 if raw.shape[2] > 100 else 4 :] = 255  # the largest values
    raw[1, :, 16 if raw.shape[2] > 100 else 4 :] = 0
    if kind == "Q6_K":
        raw[:2, :, 208:] = np.array([1.0], np.float16).view(np.uint8)
    if kind == "Q8_0":
        raw[0, :, 2:], raw[1, :, 2:] = 128, 127
    layer, packed = layer_of(kind, raw.reshape(45, -1), 512)
    library = tmp_path / "kernel.so"
    defines = [f"-D{name}={value}" for name, value in FORMATS[kind].defines]
    command = [str(compiling._compiler()), *compiling._FLAGS, *flags, *defines, SOURCE, "-o", str(library)]
    compiling._compile(command)
    kernel = ctypes.CDLL(str(library)).specpool_quantised_linear
    kernel.argtypes, kernel.restype = packed._kernel.argtypes, None
    packed._kernel = kernel
    x = torch.randint(-127, 128, (8, 512)).float()
    x[0], x[1] = 127.0, -127.0
    x[:, ::32] = 127.0
    expected = x.double() @ layer.weight.data.double().T
    for num_rows in range(1, 9):
        torch.testing.assert_close(packed.multiply(x[:num_rows]).double(), expected[:num_rows], rtol=1e-6, atol=1.0)
