"""A small model inside a larger one computes the same."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

_PATH = Path(__file__).parents[2] / "bench" / "inflate.py"
_SPEC = importlib.util.spec_from_file_location("inflate", _PATH)
inflate = importlib.util.module_from_spec(_SPEC)
sys.modules["inflate"] = inflate  # dataclasses look their module up
_SPEC.loader.exec_module(inflate)

SMALL = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=False),
    "qwen2, tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL),
}


def _logits(model, tokens):
    with torch.inference_mode():
        return model(tokens).logits


def _save_random(config, path: Path):
    """A model none of whose parameters is zero or one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 100, "intermediate_size": 130, "num_layers": 5, "num_heads": 20, "num_kv_heads": 4},
        {"hidden_size": 30, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2},
    ],
    ids=["larger in everything", "a little larger"],
)
def test_same_logits_in_float32(name, sizes, tmp_path) -> None:
    model = _save_random(CONFIGS[name], tmp_path / "small")
    shape = replace(inflate.Shape.of(model.config), **sizes)
    inflate.inflate(tmp_path / "small", tmp_path / "large", shape)
    large = AutoModelForCausalLM.from_pretrained(tmp_path / "large", dtype=torch.float32).eval()
    assert large.config.num_hidden_layers == sizes["num_layers"]
    assert large.model.embed_tokens.weight.shape[1] == sizes["hidden_size"]
    tokens = torch.randint(0, 50, (2, 17))
    expected = _logits(model, tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(_logits(large, tokens), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 20}, "hidden_size must be at least the model's own 24, got 20"),
        ({"num_layers": 1}, "num_layers must be at least"),
        ({"hidden_size": 27, "num_heads": 9, "num_kv_heads": 2}, "num_heads must be a multiple of num_kv_heads"),
        ({"hidden_size": 25}, "hidden_size must be a multiple of num_heads"),
        ({"num_heads": 8, "num_kv_heads": 4}, "num_heads must be at least 12"),
        ({"head_dim": 16}, "head_dim must stay 8"),
    ],
)
def test_shapes_that_cannot_hold_the_model_are_refused(sizes, message, tmp_path) -> None:
    model = _save_random(CONFIGS["qwen2"], tmp_path / "small")
    with pytest.raises(ValueError, match=message):
        inflate.inflate(tmp_path / "small", tmp_path / "large", replace(inflate.Shape.of(model.config), **sizes))


def test_other_architectures_are_refused(tmp_path) -> None:
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gpt2 is not supported; accepted: llama"):
        inflate.inflate(tmp_path, tmp_path / "out", inflate.shape_like("8b", 64))


def test_known_sizes_have_the_known_widths() -> None:
    shape = inflate.shape_like("8b", 128)
    assert (shape.num_heads, shape.num_kv_heads, shape.group) == (32, 8, 4)
    assert inflate.shape_like("32b", 64).num_heads == 80


@pytest.mark.models
def test_a_real_model_says_the_same(smollm2_path, tmp_path) -> None:
    small = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    own = inflate.Shape.of(small.config)
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_layers": own.num_layers + 2}
    inflate.inflate(smollm2_path, tmp_path, replace(own, **sizes, num_heads=16, num_kv_heads=4))
    large = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.arange(100, 140)[None]
    expected, found = _logits(small, tokens), _logits(large, tokens)
    assert (found - expected).abs().max() < 2e-3
    assert found.argmax(-1).equal(expected.argmax(-1))
