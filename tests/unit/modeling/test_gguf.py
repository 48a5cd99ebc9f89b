"""A model with the weights of a GGUF file: names, types, the order of rows, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specpool.errors import InvalidArgument
from specpool.native import has_compiler
from specpool_engine.modeling.cpu.linear import can_use_int4
from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.load_model import load_model
from specpool_engine.modeling.model import TransformersModel
from specpool_engine.modeling.paged_kv import SequenceKV

pytestmark = pytest.mark.skipif(not can_use_int4() or not has_compiler(), reason="needs AVX2 and a C++ compiler")

SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 320, "num_hidden_layers": 2}
NUM_HEADS, NUM_KV_HEADS = 4, 2
KINDS = {"v_proj": "Q6_K", "down_proj": "Q8_0", "o_proj": "Q5_0", "gate_proj": "Q4_1", "embed_tokens": "Q6_K"}
"""Types of layers; all others are in Q4_K."""
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def blocks(kind: str, num_rows: int, num_inputs: int, draw: np.random.Generator) -> np.ndarray:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = draw.integers(0, 256, (num_rows, num_inputs // block, size), dtype=np.uint8)
    offsets = {"Q6_K": [208], "Q4_K": [0, 2], "Q4_1": [0, 2]}.get(kind, [0])
    for offset in offsets:
        numbers = draw.normal(0, 1e-4 if kind.endswith("K") else 1e-3, raw.shape[:2]).astype(np.float16)
        raw[..., offset : offset + 2] = numbers[..., None].view(np.uint8)
    return raw.reshape(num_rows, -1)


def rotated(raw: np.ndarray, num_heads: int) -> np.ndarray:
    """The order in which llama.cpp's converter writes the rows of queries and keys."""
    return raw.reshape(num_heads, 2, -1, raw.shape[1]).swapaxes(1, 2).reshape(raw.shape)


def write_model(directory: Path, *, seed: int = 0, kinds: Mapping[str, str] = KINDS, left_out: str = "") -> Path:
    """A small model whose 16-bit weights are those of its file `weights.gguf`."""
    draw = np.random.default_rng(seed)
    config = LlamaConfig(
        **SIZES, num_attention_heads=NUM_HEADS, num_key_value_heads=NUM_KV_HEADS, tie_word_embeddings=True
    )
    model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(directory / "weights.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)

    def add(module: torch.nn.Module, path: str, name: str) -> None:
        last = path.rpartition(".")[2]
        kind = kinds.get(last, "Q4_K")
        if kind == "F16":
            writer.add_tensor(f"{name}.weight", module.weight.detach().half().numpy())
            return
        raw = blocks(kind, *module.weight.shape, draw)
        module.weight.data = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]))
        heads = {"q_proj": NUM_HEADS, "k_proj": NUM_KV_HEADS}.get(last)
        if name != left_out:
            written = raw if heads is None else rotated(raw, heads)
            writer.add_tensor(f"{name}.weight", written, raw_dtype=gguf.GGMLQuantizationType[kind])

    add(model.model.embed_tokens, "model.embed_tokens", "token_embd")
    for number, layer in enumerate(model.model.layers):
        for path, name in NAMES.items():
            add(layer.get_submodule(path), path, f"blk.{number}.{name}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.save_pretrained(directory)
    return directory


def loaded(directory: Path, **settings: object) -> TransformersModel:
    return load_model(str(directory), dtype="float32", num_blocks=16, **settings)


def test_every_layer_computes_with_the_files_weights(tmp_path: Path) -> None:
    directory = write_model(tmp_path)
    plain, packed = loaded(directory).model, loaded(directory, weights="gguf").model
    layers = {name: module for name, module in plain.named_modules() if type(module) is torch.nn.Linear}
    assert len(layers) == 15
    with torch.inference_mode():
        for name, layer in layers.items():
            x = torch.randn(3, layer.in_features)
            expected, actual = layer(x), packed.get_submodule(name)(x)
            assert (actual - expected).norm() < 0.02 * expected.norm(), name
    assert not [name for name, module in packed.named_modules() if type(module) is torch.nn.Linear]
    torch.testing.assert_close(packed.model.embed_tokens.weight, plain.model.embed_tokens.weight)


def test_a_token_is_computed_alike_however_many_are_computed_with_it(tmp_path: Path) -> None:
    model = loaded(write_model(tmp_path), weights="gguf", attention_backend="native")
    tokens = torch.randint(300, (23,), generator=torch.Generator().manual_seed(3)).tolist()
    at_once = model.forward([Segment(kv=SequenceKV(model.pool), tokens=tokens, num_logits=len(tokens))])
    for size in (1, 2, 7):
        kv, parts = SequenceKV(model.pool), []
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            parts.append(model.forward([Segment(kv=kv, tokens=part, num_logits=len(part))]))
        assert torch.cat(parts).equal(at_once), size
        kv.free()


def test_fewer_layers_and_a_cut_vocabulary_take_their_part_of_the_file(tmp_path: Path) -> None:
    directory = write_model(tmp_path)
    tokens = [5, 6, 7]

    def logits(**settings: object) -> torch.Tensor:
        model = load_model(f"{directory}#layers=1", dtype="float32", num_blocks=16, weights="gguf", **settings)
        return model.forward([Segment(kv=SequenceKV(model.pool), tokens=tokens, num_logits=3)])

    full, cut = logits(), logits(num_frequent_tokens=40, other_tokens=(300, 77))
    kept = [*range(40), 77, 300]
    assert cut[:, kept].equal(full[:, kept])
    assert cut.isfinite().sum() == 3 * len(kept)


def other_weights(directory: Path) -> None:
    write_model(directory)
    file = (directory / "weights.gguf").read_bytes()
    write_model(directory, seed=1)
    (directory / "weights.gguf").write_bytes(file)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda path: (write_model(path) / "weights.gguf").unlink(),
            r"'gguf' needs a model from a GGUF file: .* there is",
        ),
        (
            lambda path: write_model(path, kinds={**KINDS, "down_proj": "F16"}),
            r"layers\.0\.mlp\.down_proj is in F16; accepted: Q4_0, .*Q6_K",
        ),
        (
            lambda path: write_model(path, left_out="blk.1.ffn_up"),
            r"no tensor for the layer model\.layers\.1\.mlp\.up_proj",
        ),
        (other_weights, r"rows of the layer .* are not those of the model"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, write: Callable[[Path], object], message: str) -> None:
    write(tmp_path)
    with pytest.raises(InvalidArgument, match=message):
        loaded(tmp_path, weights="gguf")


@pytest.mark.parametrize("size", [0, 3, 30, 200, 3000, 100_000])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, size: int) -> None:
    file = write_model(tmp_path) / "weights.gguf"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InvalidArgument, match=r"'gguf' cannot be used with .*weights\.gguf: it cannot be read: "):
        loaded(tmp_path, weights="gguf")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (write_model(tmp_path) / "weights.gguf").write_bytes(b"not a model" * 1000)
    with pytest.raises(InvalidArgument, match="it cannot be read"):
        loaded(tmp_path, weights="gguf")


@pytest.mark.models
def test_a_fetched_file_gives_the_models_logits(smollm2_path: Path) -> None:
    if not (smollm2_path / "weights.gguf").is_file():
        pytest.skip("the model came from the hub, without a GGUF file")
    tokens = list(range(1000, 1064))
    logits = []
    for weights in ("plain", "gguf"):
        model = loaded(smollm2_path, weights=weights)
        segment = Segment(kv=SequenceKV(model.pool), tokens=tokens, num_logits=len(tokens))
        logits.append(model.forward([segment]).log_softmax(-1))
    divergence = torch.nn.functional.kl_div(logits[1], logits[0], reduction="none", log_target=True).sum(-1).mean()
    assert divergence < 0.02
