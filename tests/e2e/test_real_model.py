"""`specpool up` on SmolLM2: greedy SSD equals plain decoding, token for token, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specpool.native import has_compiler
from specpool_engine.modeling.cpu.linear import can_use_int4

PROMPT = "The three laws of thermodynamics are"


@pytest.mark.models
@pytest.mark.timeout(600)
@pytest.mark.parametrize("weights", ["plain", "gguf"])
def test_greedy_ssd_equals_plain_decoding(start_system: Callable[..., Any], smollm2_path: Path, weights: str) -> None:
    if weights == "gguf" and not (can_use_int4() and has_compiler() and (smollm2_path / "weights.gguf").is_file()):
        pytest.skip("needs AVX2, a C++ compiler, and the model's GGUF file")
    packed = ("--weights", weights, "--draft-weights", weights, "--attention-backend", "native")
    system = start_system(
        *(packed if weights == "gguf" else ()),
        *("--target", str(smollm2_path), "--draft", f"{smollm2_path}#layers=20"),
        *("--dtype", "float32", "--lookahead", "3", "--session-store", "memory://"),
    )
    system.wait_ready()
    off, ssd = (system.generate(PROMPT, "--max-tokens", "32", "--mode", mode) for mode in ("off", "ssd"))
    assert ssd["token_ids"] == off["token_ids"]
    assert ssd["text"] == off["text"]
    assert len(ssd["token_ids"]) == 32
    assert ssd["stats"]["draft_tokens"] > 0
