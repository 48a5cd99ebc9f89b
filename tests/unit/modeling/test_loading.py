"""Model specifications and loading: what is accepted, and exactly what a user is told otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from specpool.errors import InvalidArgument, ModelNotFound
from specpool.native import has_compiler
from specpool_engine.modeling.cpu.linear import (
    can_stream,
    can_use_int4,
)
from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.load_model import load_model
from specpool_engine.modeling.model import TransformersModel
from specpool_engine.modeling.paged_kv import SequenceKV
from specpool_engine.modeling.spec import ModelKind, ModelSpec

VOCAB_SIZE = 61

needs_streaming = pytest.mark.skipif(
    not can_stream(torch.bfloat16) or not has_compiler(), reason="needs AVX-512 bf16 and a C++ compiler"
)
needs_int4 = pytest.mark.skipif(not can_use_int4() or not has_compiler(), reason="needs AVX2 and a C++ compiler")


def logits_of(model: TransformersModel, tokens: list[int]) -> torch.Tensor:
    return model.forward([Segment(kv=SequenceKV(model.pool), tokens=tokens, num_logits=len(tokens))])


def test_specifications() -> None:
    assert ModelSpec.parse("org/name").kind is ModelKind.TRANSFORMERS
    assert ModelSpec.parse("/a/b#layers=20").num_layers == 20
    nested = ModelSpec.parse("random#like=toy#vocab=9,seed=2")
    assert (nested.kind, nested.source) == (ModelKind.RANDOM, "toy#vocab=9,seed=2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty model specification"),
        ("a#layer=3", "unknown option 'layer=3' in model specification 'a#layer=3'; .* accepts layers"),
        ("a#layers=0", "option 'layers' of 'a#layers=0' must be an integer >= 1, got '0'"),
        ("random", "needs like=MODEL"),
        ("toy#agreement=1.5", r"must be a number in \[0, 1.0\], got '1.5'"),
        ("toy#vocab=1", "must be an integer >= 2, got '1'"),
    ],
)
def test_bad_specifications(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        load_model(text)


@pytest.mark.parametrize(
    ("name", "tried"),
    [("missing/dir/x", "there is no directory"), ("missing.gguf", "there is no file"), ("", "has no config.json")],
)
def test_unknown_model_names_what_was_tried_and_the_accepted_forms(tmp_path: Path, name: str, tried: str) -> None:
    with pytest.raises(ModelNotFound, match=tried) as caught:
        load_model(str(tmp_path / name))
    assert "Accepted: a Hugging Face hub id" in str(caught.value)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECPOOL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "junk.gguf").write_bytes(b"junk")
    with pytest.raises(ModelNotFound, match="cannot read the GGUF file"):
        load_model(str(tmp_path / "junk.gguf"))
    assert not list((tmp_path / "cache" / "converted").iterdir())


def test_bad_options_name_the_accepted_ones(directory: Path) -> None:
    with pytest.raises(InvalidArgument, match="unknown dtype 'int3'; accepted: float32, bfloat16, float16"):
        load_model(str(directory), dtype="int3")
    with pytest.raises(InvalidArgument, match="unknown device 'tpu9'"):
        load_model(str(directory), device="tpu9")
    with pytest.raises(InvalidArgument, match=r"'int5' cannot be used: accepted: plain, .*, int8, int4, gguf"):
        load_model(str(directory), weights="int5")
    with pytest.raises(InvalidArgument, match="kv_cache_bytes 10 is less than one block"):
        load_model(str(directory), kv_cache_bytes=10)
    with pytest.raises(InvalidArgument, match="asks for 9 layers; the model has 4"):
        load_model(f"{directory}#layers=9")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_not_replaced(directory: Path) -> None:
    with pytest.raises(InvalidArgument, match="not available: 0 CUDA devices"):
        load_model(str(directory), device="cuda")


def test_kv_cache_size_follows_the_bytes(directory: Path) -> None:
    # 4 layers x 2 heads x 16 x (key and value) x 4 bytes = 1024 bytes per token
    model = load_model(str(directory), dtype="float32", kv_cache_bytes=1 << 20, block_size=16)
    assert model.pool.num_blocks == 64
    assert (model.vocab_size, model.max_context) == (VOCAB_SIZE, 128)


def test_layers_keeps_the_first_ones(directory: Path) -> None:
    tokens = [1, 2, 3]
    whole = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    hidden = whole.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[2]
    expected = whole.lm_head(whole.model.norm(hidden))[0].detach()
    actual = logits_of(load_model(f"{directory}#layers=2", dtype="float32", num_blocks=4), tokens)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_progress_reports_begin_and_end(directory: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    load_model(str(directory), num_blocks=4, on_progress=lambda *call: calls.append(call))
    assert calls == [("load", 0, 1), ("load", 1, 1), ("allocate", 0, 1), ("allocate", 1, 1)]


def test_random_draft_depends_on_last_token_and_position_only() -> None:
    model = load_model("random#like=toy#vocab=64", num_blocks=16)
    other = load_model("random#like=toy#vocab=64", num_blocks=16)
    first = logits_of(model, [5, 6, 7, 6])
    torch.testing.assert_close(logits_of(other, [9, 6, 7]), torch.cat([other._row(9, 0)[None], first[1:3]]))
    assert first[1].argmax() != first[3].argmax()


def test_toy_draft_agrees_as_often_as_asked() -> None:
    target = load_model("toy#vocab=32,seed=3", num_blocks=64)
    draft = load_model("toy#vocab=32,seed=3,agreement=0.7", num_blocks=64)
    tokens = torch.randint(32, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    same = logits_of(target, tokens).argmax(-1) == logits_of(draft, tokens).argmax(-1)
    assert 0.62 < same.float().mean().item() < 0.80
