"""A small model on disk, and the helper module of these tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Under --import-mode=importlib a folder of tests is no package: its helper module is loaded by path.
if "small_tokenizers" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("small_tokenizers", Path(__file__).with_name("small_tokenizers.py"))
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["small_tokenizers"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["small_tokenizers"])

VOCAB_SIZE = 61


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a Llama of 4 layers with random weights."""
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path
