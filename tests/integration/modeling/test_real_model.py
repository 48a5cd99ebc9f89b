"""SmolLM2 through the paged cache against `transformers` `generate`, float32."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from specpool_engine.modeling.detokenizer import IncrementalDetokenizer
from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.load_model import load_model
from specpool_engine.modeling.paged_kv import SequenceKV
from specpool_engine.modeling.text_codec import TextCodec
from specpool_engine.modeling.tokenizer import load_tokenizer

pytestmark = pytest.mark.models

NUM_TOKENS = 24
PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Water boils at")


@pytest.fixture(scope="module")
def directory() -> Path:
    folder = os.environ.get("SPECPOOL_TEST_MODELS")
    path = Path(folder or ".") / "smollm2-135m-instruct"
    if folder is None or not path.is_dir():
        pytest.skip("SPECPOOL_TEST_MODELS names no folder with smollm2-135m-instruct")
    return path


@pytest.mark.parametrize("weights", ["plain", "prepacked"])
def test_batched_greedy_generation_equals_generate(directory: Path, weights: str) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(str(directory))
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    model = load_model(str(directory), dtype="float32", kv_cache_bytes=1 << 26, weights=weights)
    tables = [(SequenceKV(model.pool), list(prompt)) for prompt in prompts]
    for _ in range(NUM_TOKENS):
        logits = model.forward([Segment(kv=kv, tokens=tokens[kv.length :]) for kv, tokens in tables])
        for (_, tokens), token in zip(tables, logits.argmax(-1).tolist(), strict=True):
            tokens.append(token)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for prompt, (_, tokens) in zip(prompts, tables, strict=True):
        expected = plain.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        assert tokens == expected[0].tolist()


def test_streamed_text_equals_decoded_text(directory: Path) -> None:
    tokenizer = load_tokenizer(str(directory))
    text = "Naïve café, 東京 😀 and 1\u00a0000 spaces.\n"
    tokens = tokenizer.encode(text)
    detokenizer = IncrementalDetokenizer(TextCodec(tokenizer).decode)
    pieces = [detokenizer.push([token]).text for token in tokens]
    assert "".join(pieces) + detokenizer.finish().text == text
