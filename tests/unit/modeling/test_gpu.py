"""On a CUDA device: every attention backend, and CUDA graphs, against `sdpa` without graphs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.load_model import load_model
from specpool_engine.modeling.paged_kv import SequenceKV

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
needs_flash = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")

VOCAB_SIZE = 512
PREFIX = 700
ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "mistral with a sliding window": (
        transformers.MistralConfig,
        transformers.MistralForCausalLM,
        {"sliding_window": 90},
    ),
    "gemma2 with softcaps": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM, {"sliding_window": 90}),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config_class, model_class, options = ARCHITECTURES[request.param]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.05,
        **options,
    )
    path = tmp_path_factory.mktemp("model")
    model_class(config).to(torch.bfloat16).save_pretrained(path)
    return path


def run(model: Any) -> list[torch.Tensor]:
    """A long prefill, single tokens, verification, and branches with different tails beside another sequence."""
    tokens = torch.randint(VOCAB_SIZE, (PREFIX,), generator=torch.Generator().manual_seed(1)).tolist()
    trunk, other = SequenceKV(model.pool), SequenceKV(model.pool)
    outputs = [model.forward([Segment(kv=trunk, tokens=tokens, num_logits=3)])]
    outputs.append(model.forward([Segment(kv=other, tokens=tokens[:9])]))
    outputs.append(model.forward([Segment(kv=trunk, tokens=[5]), Segment(kv=other, tokens=[6])]))
    outputs.append(model.forward([Segment(kv=trunk, tokens=[1, 2, 3, 4, 5], num_logits=5)]))
    branches = [trunk.fork(trunk.length - index % 3) for index in range(6)]
    for step in range(2):
        segments = [Segment(kv=kv, tokens=[10 + step + index, 20], num_logits=2) for index, kv in enumerate(branches)]
        outputs.append(model.forward([*segments, Segment(kv=other, tokens=[7 + step])]))
    return [output.cpu() for output in outputs]


def settings(**changes: Any) -> dict[str, Any]:
    return {"dtype": "bfloat16", "device": "cuda", "num_blocks": 64, "block_size": 256, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_backend": "flex"},
        {"attention_backend": "flex", "block_size": 16, "num_blocks": 1024},
        pytest.param({"attention_backend": "flash", "cuda_graphs": "off"}, marks=needs_flash),
        pytest.param({"attention_backend": "flash", "cuda_graphs": "on"}, marks=needs_flash),
    ],
)
def test_backends_compute_the_same(directory: Path, changes: dict[str, Any]) -> None:
    expected = run(load_model(str(directory), **settings()))
    actual = run(load_model(str(directory), **settings(**changes)))
    for one, other in zip(actual, expected, strict=True):
        scale = other.abs().amax(dim=-1, keepdim=True)
        torch.testing.assert_close(one / scale, other / scale, atol=0.05, rtol=0)  # bfloat16


@needs_flash
def test_a_replay_equals_the_same_forward_without_a_graph(directory: Path) -> None:
    graphed = load_model(str(directory), **settings(attention_backend="flash", cuda_graphs="on"))
    eager = load_model(str(directory), **settings(attention_backend="flash", cuda_graphs="off"))
    for one, other in zip(run(graphed), run(eager), strict=True):
        scale = other.abs().amax(dim=-1, keepdim=True)
        torch.testing.assert_close(one / scale, other / scale, atol=0.03, rtol=0)
    assert getattr(graphed, "graphs", None) is not None
