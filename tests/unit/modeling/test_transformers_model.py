"""The paged forward equals the plain `transformers` forward in float32, whatever the batch looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from specpool.errors import InvalidArgument, KVCacheFull
from specpool.native import has_compiler
from specpool_engine.modeling.attention import AttentionBackend, get_backend
from specpool_engine.modeling.attention.flash import FlashBackend
from specpool_engine.modeling.attention.varlen import TorchVarlenKernel
from specpool_engine.modeling.cuda_graphs import BucketedForward
from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.model import TransformersModel
from specpool_engine.modeling.paged_kv import BlockPool, SequenceKV

VOCAB_SIZE = 97
LENGTH = 50
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "mistral with a sliding window": (MistralConfig, MistralForCausalLM, {"sliding_window": 9}),
    "gemma2 with softcaps": (Gemma2Config, Gemma2ForCausalLM, {"sliding_window": 9, "head_dim": 8}),
}
BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "sdpa": lambda: get_backend("sdpa"),
    "flex": lambda: get_backend("flex"),
    **({"native": lambda: get_backend("native")} if has_compiler() else {}),
    "flash with a kernel in plain torch": lambda: FlashBackend(TorchVarlenKernel()),
    "the same in buckets": lambda: FlashBackend(TorchVarlenKernel()),
}
BUCKETS = (1, 2, 4, 8, 16, 32)


class Case:
    """A tiny random model, tokens, and the plain forward's logits for them."""

    def __init__(self, architecture: str, backend: AttentionBackend) -> None:
        config_class, model_class, options = ARCHITECTURES[architecture]
        torch.manual_seed(0)
        config = config_class(
            vocab_size=VOCAB_SIZE,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.3,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
        plain: Any = model_class._from_config(config, attn_implementation="eager").eval()
        self.tokens: list[int] = torch.randint(1, VOCAB_SIZE, (LENGTH,)).tolist()
        prompt = torch.tensor([self.tokens])
        with torch.inference_mode():
            self.logits: Tensor = plain(prompt).logits[0]
            generated = plain.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=-1)
        self.continuation: list[int] = generated[0, LENGTH:].tolist()
        self.model = TransformersModel(plain, pool=BlockPool(64, 4), backend=backend)

    def prefilled(self, length: int) -> SequenceKV:
        kv = SequenceKV(self.model.pool)
        self.model.forward([Segment(kv=kv, tokens=self.tokens[:length], num_logits=0)])
        return kv

    def segment(self, kv: SequenceKV, num_tokens: int, num_logits: int | None = None) -> Segment:
        tokens = self.tokens[kv.length : kv.length + num_tokens]
        return Segment(kv=kv, tokens=tokens, num_logits=num_tokens if num_logits is None else num_logits)

    def expect(self, actual: Tensor, *ranges: tuple[int, int]) -> None:
        expected = torch.cat([self.logits[start:end] for start, end in ranges])
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=ARCHITECTURES)
def shared(request: pytest.FixtureRequest, backend: str) -> Case:
    case = Case(request.param, BACKENDS[backend]())
    if "in buckets" in backend:
        case.model.graphs = BucketedForward(case.model, BUCKETS)
    return case


@pytest.fixture
def case(shared: Case) -> Case:
    shared.model.pool = BlockPool(64, 4)
    shared.model.storage.keys.fill_(100.0)  # stale contents must not matter
    shared.model.storage.values.fill_(100.0)
    return shared


def test_chunked_prefill_equals_one_forward(case: Case) -> None:
    kv = SequenceKV(case.model.pool)
    parts = [case.model.forward([case.segment(kv, n)]) for n in (1, 16, 1, 13, 8, 11)]
    case.expect(torch.cat(parts), (0, LENGTH))


def test_verification_of_several_tokens_equals_single_steps(case: Case) -> None:
    kv = case.prefilled(30)
    case.expect(case.model.forward([case.segment(kv, 6)]), (30, 36))
    kv.truncate(32)
    case.expect(case.model.forward([case.segment(kv, 1)]), (32, 33))
    case.expect(case.model.forward([case.segment(kv, 6)]), (33, 39))


def test_only_requested_logits_are_returned(case: Case) -> None:
    first, second, third = (SequenceKV(case.model.pool) for _ in range(3))
    logits = case.model.forward([case.segment(first, 9, 2), case.segment(second, 5, 0), case.segment(third, 7, 1)])
    case.expect(logits, (7, 9), (6, 7))
    assert case.model.forward([case.segment(second, 2, 0)]).shape == (0, VOCAB_SIZE)


def test_branches_with_a_shared_prefix_beside_other_sequences(case: Case) -> None:
    trunk, decode = case.prefilled(30), case.prefilled(11)
    branches = [trunk.fork(length) for length in (30, 29, 28, 17, 5)]
    fresh = SequenceKV(case.model.pool)
    segments = [case.segment(kv, 3) for kv in branches]
    segments[2:2] = [case.segment(decode, 1), case.segment(fresh, 20)]
    case.expect(case.model.forward(segments), (30, 33), (29, 32), (11, 12), (0, 20), (28, 31), (17, 20), (5, 8))
    # Their own tails, which none of the others has overwritten.
    case.expect(case.model.forward([case.segment(kv, 1) for kv in branches[:3]]), (33, 34), (32, 33), (31, 32))


def test_different_tokens_in_branches_do_not_disturb_each_other(case: Case) -> None:
    trunk = case.prefilled(18)
    wrong, right = trunk.fork(), trunk.fork()
    case.model.forward(
        [Segment(kv=wrong, tokens=[case.tokens[18] ^ 1, 3, 4]), case.segment(right, 3), case.segment(trunk, 1)]
    )
    case.expect(case.model.forward([case.segment(right, 2), case.segment(trunk, 1)]), (21, 23), (19, 20))


def test_many_sequences_of_unequal_length(case: Case) -> None:
    lengths = (1, 2, 3, 5, 8, 13, 21, 34)
    kvs = [case.prefilled(length) for length in lengths]
    case.expect(
        case.model.forward([case.segment(kv, 1 + index % 3) for index, kv in enumerate(kvs)]),
        *((length, length + 1 + index % 3) for index, length in enumerate(lengths)),
    )


def test_a_cached_prefix_gives_the_same_logits(case: Case) -> None:
    kv = case.prefilled(30)
    kv.publish_prefix(case.tokens[:30], "tenant")
    kv.free()
    reused = SequenceKV.from_prefix(case.model.pool, case.tokens[:30], "tenant")
    assert reused.length == 28
    case.expect(case.model.forward([case.segment(reused, 5)]), (28, 33))


def test_greedy_generation_equals_generate(case: Case) -> None:
    kv, tokens = SequenceKV(case.model.pool), list(case.tokens)
    while len(tokens) < LENGTH + 20:
        logits = case.model.forward([Segment(kv=kv, tokens=tokens[kv.length :])])
        tokens.append(int(logits[0].argmax()))
    assert tokens[LENGTH:] == case.continuation


def test_full_cache_is_refused_before_anything_runs(case: Case) -> None:
    kv = SequenceKV(case.model.pool)
    with pytest.raises(KVCacheFull):
        case.model.forward([case.segment(kv, 10), *(case.segment(SequenceKV(case.model.pool), 50) for _ in range(5))])
    assert kv.length == 0
    assert case.model.pool.num_used == 0


def test_unknown_attention_backend_names_the_accepted_ones() -> None:
    with pytest.raises(InvalidArgument, match="unknown attention backend 'fast'; accepted: flash, flex, native, sdpa"):
        get_backend("fast")
