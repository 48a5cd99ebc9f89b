"""The compiled decoder against the same decoder as it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from specpool.errors import ConfigError
from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.load_model import load_model
from specpool_engine.modeling.paged_kv import SequenceKV

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("model")
    transformers.Qwen2ForCausalLM(config).save_pretrained(path)
    return path


def run(model: Any) -> list[torch.Tensor]:
    """Prefill, single tokens, drafts and branches: forwards of 1 to 17 tokens."""
    first, second = SequenceKV(model.pool), SequenceKV(model.pool)
    outputs = [model.forward([Segment(kv=first, tokens=list(range(17)), num_logits=0)])]
    outputs.append(model.forward([Segment(kv=first, tokens=[5])]))
    outputs.append(model.forward([Segment(kv=second, tokens=[1, 2, 3], num_logits=2)]))
    branches = [first.fork(18) for _ in range(3)]
    segments = [Segment(kv=kv, tokens=[index, 40], num_logits=2) for index, kv in enumerate(branches)]
    outputs.append(model.forward([*segments, Segment(kv=second, tokens=[9])]))
    return outputs


@needs_compiler
@pytest.mark.parametrize("weights", ["plain", "prepacked", "int8"])
def test_compiled_model_computes_the_same_with_one_graph(
    directory: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings: dict[str, Any] = {"dtype": "float32", "num_blocks": 32, "block_size": 4, "weights": weights}
    plain = run(load_model(str(directory), **settings))
    stages: list[str] = []
    model = load_model(
        str(directory), **settings, compile_model=True, on_progress=lambda stage, *_: stages.append(stage)
    )
    assert stages[-1] == "compile"
    assert model.pool.num_used == 0
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert num_graphs == 1
    # A quantised input may fall on either side of a step.
    tolerance = 0.05 if weights == "int8" else 1e-5
    for compiled, expected in zip(run(model), plain, strict=True):
        torch.testing.assert_close(compiled, expected, atol=tolerance, rtol=tolerance)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs


@needs_compiler
def test_each_of_two_compiled_models_runs_its_own_graph(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    sources = (str(directory), f"{directory}#layers=2")
    plain = [run(load_model(source, dtype="float32", num_blocks=32, block_size=4)) for source in sources]
    models = [
        load_model(source, dtype="float32", num_blocks=32, block_size=4, compile_model=True) for source in sources
    ]
    for index in (0, 1, 0):
        for compiled, expected in zip(run(models[index]), plain[index], strict=True):
            torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-5)


def test_without_a_compiler_the_error_says_what_to_do(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(ConfigError) as caught:
        load_model(str(directory), num_blocks=8, compile_model=True)
    assert str(caught.value) == ("compile needs a C++ compiler and none was found: install g++, or leave compile off")
    assert caught.value.reason == "COMPILER_MISSING"
