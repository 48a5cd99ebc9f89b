"""Formats of weights: each computes what the plain one does, as nearly as it says, and says where it cannot run."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from specpool import native as compiling
from specpool.errors import ConfigError, InvalidArgument
from specpool.native import has_compiler
from specpool_engine.modeling.cpu import native
from specpool_engine.modeling.cpu.linear import (
    Int4Linear,
    Int8Linear,
    PrepackedLinear,
    StreamedLinear,
    can_stream,
    can_use_int4,
    convert_linears,
    streamed,
)
from specpool_engine.modeling.cpu.linear.fused import FusedLinear, LinearPart
from specpool_engine.modeling.cpu.linear.int4 import INT4, round_to_4_bits
from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.load_model import load_model
from specpool_engine.modeling.model import TransformersModel
from specpool_engine.modeling.paged_kv import SequenceKV
from specpool_engine.modeling.vocabulary import keep_frequent_tokens

VOCAB_SIZE = 61
KERNEL_SOURCE = str(Path(native.__file__).parent / "quantised_linear.cpp")

needs_streaming = pytest.mark.skipif(
    not can_stream(torch.bfloat16) or not has_compiler(), reason="needs AVX-512 bf16 and a C++ compiler"
)
needs_int4 = pytest.mark.skipif(not can_use_int4() or not has_compiler(), reason="needs AVX2 and a C++ compiler")


def logits_of(model: TransformersModel, tokens: list[int]) -> torch.Tensor:
    return model.forward([Segment(kv=SequenceKV(model.pool), tokens=tokens, num_logits=len(tokens))])


@pytest.mark.parametrize(("kind", "tolerance"), [(PrepackedLinear, 1e-4), (Int8Linear, 0.12)])
@pytest.mark.parametrize("num_rows", [1, 3, 4, 9])
def test_linear_replacements(kind: type, tolerance: float, num_rows: int) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48)
    x = torch.randn(1, num_rows, 64)
    x[0, 0] *= 100  # a row of large values must not cost the others their precision
    with torch.inference_mode():
        expected, actual = layer(x), kind(layer)(x)
    scale = expected.abs().amax(dim=-1, keepdim=True)
    torch.testing.assert_close(actual / scale, expected / scale, atol=tolerance, rtol=0)


@needs_streaming
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 128), (63, 100), (32, 17)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_streamed_rows_do_not_depend_on_their_number(in_features: int, out_features: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(in_features, out_features, bias=has_bias, dtype=torch.bfloat16)
    x = torch.randn(33, in_features, dtype=torch.bfloat16)
    with torch.inference_mode():
        streamed = StreamedLinear(layer)
        exact = layer.double()(x.double())
        outputs = {num_rows: streamed(x[:num_rows]) for num_rows in range(1, len(x) + 1)}
    for num_rows, output in outputs.items():
        assert output.shape == (num_rows, out_features)
        # Sums in float32, rounded once: at most half a unit of bfloat16's eighth bit, and what cancelled before it.
        torch.testing.assert_close(output.double(), exact[:num_rows], rtol=2**-8, atol=1e-4)
        assert output.equal(outputs[33][:num_rows])


@needs_streaming
def test_a_streamed_model_computes_what_the_plain_one_does(directory: Path) -> None:
    model = load_model(str(directory), dtype="bfloat16", num_blocks=16, weights="streamed")
    plain = load_model(str(directory), dtype="bfloat16", num_blocks=16)
    tokens = list(range(20))
    torch.testing.assert_close(logits_of(model, tokens), logits_of(plain, tokens), atol=0.05, rtol=0.05)
    one_by_one = []
    for each in (model, plain):
        kv = SequenceKV(each.pool)
        one_by_one.append(torch.cat([each.forward([Segment(kv=kv, tokens=[token], num_logits=1)]) for token in tokens]))
    torch.testing.assert_close(*one_by_one, atol=0.05, rtol=0.05)


@needs_int4
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 128), (100, 45), (31, 17), (1, 1), (1536, 33)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_int4_products_are_those_of_the_rounded_weights(in_features: int, out_features: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(in_features, out_features, bias=has_bias)
    x = torch.randn(1, 19, in_features)
    x[0, 0] *= 100  # a row of large values must not cost the others their precision
    padded = torch.nn.functional.pad(layer.weight.detach(), (0, -in_features % 32))
    values, scales = round_to_4_bits(padded.view(out_features, -1, 32))
    rounded = (values * scales.float()[..., None]).flatten(1)[:, :in_features]
    with torch.inference_mode():
        packed = Int4Linear(layer)
        actual, exact = packed(x)[0], layer(x)[0]
        expected = torch.nn.functional.linear(x[0], rounded, layer.bias)
        assert all(packed(x[:, :num_rows])[0].equal(actual[:num_rows]) for num_rows in range(1, len(x[0])))
    norm = expected.norm(dim=1)
    assert ((actual - expected).norm(dim=1) / norm).max() < 0.02, "inputs are rounded to 8 bits"
    assert ((actual - exact).norm(dim=1) / norm).max() < 0.15, "weights to 4"


@needs_int4
@pytest.mark.parametrize("flags", [("-march=native",), ("-march=haswell",)])
def test_int4_products_are_exact_within_groups_by_all_instructions(flags: tuple[str, ...], tmp_path: Path) -> None:
    """The largest weights and inputs of either sign included: no sum within a group may saturate."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 45, bias=False)
    layer.weight.data = torch.randint(-8, 8, (45, 96)).float()
    layer.weight.data[:16] = -8.0
    layer.weight.data[1] = 7.0
    layer.weight.data[:, ::32] = -8.0  # so that every scale is 1
    x = torch.randint(-127, 128, (8, 96)).float()
    x[0] = 127.0
    x[1] = -127.0
    x[2:, ::32] = 127.0
    library = tmp_path / "kernel.so"
    defines = [f"-D{name}={value}" for name, value in INT4.defines]
    command = [str(compiling._compiler()), *compiling._FLAGS, *flags, *defines, KERNEL_SOURCE, "-o", str(library)]
    compiling._compile(command)
    packed = Int4Linear(layer)
    kernel = ctypes.CDLL(str(library)).specpool_quantised_linear
    kernel.argtypes, kernel.restype = packed._kernel.argtypes, None
    packed._kernel = kernel
    for num_rows in range(1, 9):
        assert packed.multiply(x[:num_rows]).equal(x[:num_rows] @ layer.weight.data.T), num_rows


def test_rounding_to_4_bits_takes_any_weights() -> None:
    groups = torch.zeros(4, 32)
    groups[1] = 3.0
    groups[2, 5] = -1e-30
    groups[3] = torch.linspace(-1, 0.5, 32)
    values, scales = round_to_4_bits(groups)
    assert -8 <= values.min() <= values.max() <= 7
    torch.testing.assert_close(values * scales.float()[:, None], groups, atol=0.07, rtol=0)


def test_streamed_weights_need_bfloat16(directory: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"'streamed' cannot be used: it needs bfloat16, not torch\.float32"):
        load_model(str(directory), dtype="float32", weights="streamed")


@needs_streaming
def test_without_a_compiler_streamed_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_compiler", lambda: None)
    monkeypatch.setattr(streamed, "load_library", native.load_library.__wrapped__)
    with pytest.raises(ConfigError, match=r"install g\+\+, or use another weights format"):
        StreamedLinear(torch.nn.Linear(4, 4, dtype=torch.bfloat16))


def test_prepacked_weights_give_the_same_logits_in_float32(directory: Path) -> None:
    tokens = list(range(20))
    plain = logits_of(load_model(str(directory), dtype="float32", num_blocks=8), tokens)
    packed = logits_of(load_model(str(directory), dtype="float32", num_blocks=8, weights="prepacked"), tokens)
    torch.testing.assert_close(packed, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
def test_layers_over_one_input_become_one_product(biases: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    parent = torch.nn.Module()
    layers = [torch.nn.Linear(64, size, bias=bias) for size, bias in zip((48, 16, 16), biases, strict=True)]
    for name, layer in zip(("q_proj", "k_proj", "v_proj"), layers, strict=True):
        parent.add_module(name, layer)
    convert_linears(parent, "prepacked")
    parts = [parent.q_proj, parent.k_proj, parent.v_proj]
    assert all(type(part) is LinearPart for part in parts)
    with torch.inference_mode():
        for _ in range(2):
            x = torch.randn(1, 5, 64)
            for part, layer in zip(parts, layers, strict=True):
                torch.testing.assert_close(part(x), layer(x), atol=1e-5, rtol=1e-4)


def test_a_fused_product_is_never_handed_to_another_input() -> None:
    products: list[torch.Tensor] = []

    class Product(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            products.append(x)
            return torch.cat([x, 2 * x], dim=-1)

    fused = FusedLinear(Product(), [3, 3])
    first, second = torch.ones(1, 3), torch.full((1, 3), 5.0)
    assert fused.part(first, 0).equal(first)
    assert fused.part(second, 1).equal(2 * second)
    assert fused.part(first, 1).equal(2 * first)
    assert fused.part(first, 1).equal(2 * first), "the same part again is computed again"
    assert len(products) == 4


@pytest.mark.parametrize("weights", ["int8", pytest.param("int4", marks=needs_int4)])
def test_quantising_converts_every_linear_layer(directory: Path, weights: str) -> None:
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    convert_linears(model, weights)
    assert not [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]


@pytest.mark.parametrize("weights", ["plain", "prepacked", "int8"])
def test_a_head_over_frequent_tokens_knows_only_these(directory: Path, weights: str) -> None:
    tokens = list(range(20))
    full = logits_of(load_model(str(directory), dtype="float32", num_blocks=8, weights=weights), tokens)
    model = load_model(
        str(directory),
        dtype="float32",
        num_blocks=8,
        weights=weights,
        num_frequent_tokens=16,
        other_tokens=(3, 40, 10**9),
    )
    cut = logits_of(model, tokens)
    kept = [*range(16), 40]
    assert cut.shape == full.shape
    torch.testing.assert_close(cut[:, kept], full[:, kept], atol=1e-4, rtol=1e-4)
    left_out = [token for token in range(full.shape[1]) if token not in kept]
    assert left_out
    assert cut[:, left_out].eq(-torch.inf).all()


def test_a_head_over_more_than_the_vocabulary_is_the_whole_head(directory: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(directory)
    head = model.get_output_embeddings()
    keep_frequent_tokens(model, 10**6, ())
    assert model.get_output_embeddings() is head


@needs_int4
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_int4_model_computes_a_token_alike_however_many_are_computed_with_it(directory: Path, dtype: str) -> None:
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(60, (23,), generator=draw).tolist()
    model = load_model(
        str(directory), dtype=dtype, num_blocks=64, block_size=4, weights="int4", attention_backend="native"
    )
    at_once = model.forward([Segment(kv=SequenceKV(model.pool), tokens=tokens, num_logits=len(tokens))])
    for size in (1, 2, 5, 7):
        kv, others = SequenceKV(model.pool), [SequenceKV(model.pool) for _ in range(size)]
        parts = []
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            segments = [Segment(kv=kv, tokens=part, num_logits=len(part))]
            segments += [Segment(kv=other, tokens=part[:1], num_logits=0) for other in others]
            parts.append(model.forward(segments))
        assert torch.cat(parts).equal(at_once), size
        for one in (kv, *others):
            one.free()
