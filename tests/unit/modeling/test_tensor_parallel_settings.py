"""Splitting a model: what is refused and with which words, and what rank 0 tells its followers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config

from specpool.errors import InvalidArgument
from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.load_model import load_model
from specpool_engine.modeling.paged_kv import BlockPool, SequenceKV
from specpool_engine.modeling.tensor_parallel.messages import decode_step, encode_step
from specpool_engine.modeling.tensor_parallel.settings import TensorParallelism, check_model, describe_device

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@needs_no_gpu
@pytest.mark.parametrize(
    ("model", "settings", "why"),
    [
        ("toy#vocab=8", {}, "'toy#vocab=8' has no weights to split"),
        ("some/model", {"weights": "prepacked", "dtype": "float32"}, "weights are prepacked"),
        ("some/model", {"compile_model": True}, "compile is on"),
        ("some/model", {"cuda_graphs": "on"}, "cuda_graphs is on"),
        ("some/model", {"num_frequent_tokens": 9}, "draft_vocab_size is set"),
    ],
)
def test_settings_that_exclude_a_split_are_refused(model: str, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidArgument, match=f"tensor_parallel 2 cannot be used: {why}") as caught:
        load_model(model, tensor_parallel=TensorParallelism(size=2), **settings)
    assert caught.value.reason == "TENSOR_PARALLEL_UNAVAILABLE"
    assert caught.value.metadata["field"] == "tensor_parallel"


def test_too_few_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(InvalidArgument, match="needs the devices up to cuda:4, and 3 CUDA devices are visible"):
        load_model("some/model", device="cuda:1", tensor_parallel=TensorParallelism(size=4))
    with pytest.raises(InvalidArgument, match="device is cpu, and a CUDA device is visible"):
        load_model("some/model", tensor_parallel=TensorParallelism(size=2))


@pytest.mark.parametrize(
    ("config", "size", "why"),
    [
        (
            LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3),
            2,
            "9 attention heads, which 2 does not divide",
        ),
        (LlamaConfig(num_attention_heads=8, num_key_value_heads=2), 4, "2 key/value heads, which 4 does not divide"),
        (Phi3Config(pad_token_id=0), 2, "no plan for phi3 that splits its attention heads"),
    ],
)
def test_models_that_cannot_be_split_are_refused(config: Any, size: int, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        check_model(config, TensorParallelism(size=size))


def test_models_that_can_be_split_are_not() -> None:
    config = LlamaConfig(num_attention_heads=32, num_key_value_heads=8)
    for size in (2, 4, 8):
        check_model(config, TensorParallelism(size=size))


def test_devices_follow_the_first_one() -> None:
    pair = TensorParallelism(size=2)
    assert pair.devices(torch.device("cuda")) == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert pair.devices(torch.device("cuda", 3)) == [torch.device("cuda", 3), torch.device("cuda", 4)]
    assert pair.devices(torch.device("cpu")) == [torch.device("cpu")] * 2
    assert describe_device(torch.device("cuda", 0), 1) == "cuda:0"
    assert describe_device(torch.device("cuda", 0), 4) == "cuda:0, tensor parallel over 4"


def test_a_step_arrives_as_it_was_sent() -> None:
    pool, elsewhere = BlockPool(16, 4), BlockPool(16, 4)
    trunk = SequenceKV(pool)
    trunk.reserve(6)
    trunk.advance(6)
    branch = trunk.fork(5)
    segments = [
        Segment(kv=trunk, tokens=[5, 6, 7], num_logits=3),
        Segment(kv=branch, tokens=[8], num_logits=0),
        Segment(kv=SequenceKV(pool), tokens=list(range(9)), num_logits=1),
    ]
    for segment in segments:
        segment.kv.reserve(len(segment.tokens))
    copies = pool.take_copies()
    assert copies[0], "the fork makes a copy"
    received, their_copies = decode_step(encode_step(segments, copies), elsewhere)
    assert their_copies == copies
    for sent, other in zip(segments, received, strict=True):
        assert (other.kv.length, other.kv.block_ids) == (sent.kv.length, sent.kv.block_ids)
        assert (other.tokens, other.num_logits) == (sent.tokens, sent.num_logits)
    assert elsewhere.num_used == 0
    assert decode_step(encode_step([], ([], [])), elsewhere) == ([], ([], []))
