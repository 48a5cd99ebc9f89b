"""`native` against `sdpa`, and bit for bit against itself: nothing but query, position and sequence may matter."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from specpool import native as compiling
from specpool.errors import ConfigError, InvalidArgument
from specpool.native import has_compiler
from specpool_engine.modeling.attention import KVStorage, PackedSegment, get_backend
from specpool_engine.modeling.attention import native as native_attention
from specpool_engine.modeling.cpu import native
from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.model import TransformersModel
from specpool_engine.modeling.paged_kv import BlockPool, SequenceKV

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
GEOMETRIES = [  # query heads, key/value heads, head dimension, block size
    (6, 2, 8, 4),
    (14, 2, 64, 16),
    (3, 3, 80, 16),
    (5, 1, 7, 3),
    (72, 1, 33, 300),
]
SPECIALS: list[dict[str, Any]] = [
    {"sliding_window": None, "softcap": None},
    {"sliding_window": None, "softcap": 5.0},
    {"sliding_window": 1, "softcap": None},
    {"sliding_window": 40, "softcap": 2.0},
]

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Cache:
    """Blocks in random order, and the attention and results of one layer over them. Unwritten slots are NaN."""

    def __init__(self, geometry: tuple[int, int, int, int], dtype: torch.dtype, num_slots: int = 8192) -> None:
        self.num_heads, num_kv_heads, self.head_dim, block_size = geometry
        self.pool = BlockPool(num_slots // block_size, block_size)
        random.Random(0).shuffle(self.pool._free)
        self.storage = KVStorage.allocate(
            num_layers=2,
            num_blocks=self.pool.num_blocks,
            block_size=block_size,
            num_kv_heads=num_kv_heads,
            head_dim=self.head_dim,
            dtype=dtype,
            device=CPU,
        )
        for cache in (self.storage.keys, self.storage.values):
            cache.fill_(torch.nan)

    def write(self, kv: SequenceKV, num_tokens: int, contents: Tensor) -> None:
        """Make room for tokens and write their keys and values, as a forward does; `contents` [2, positions, ...]."""
        kv.reserve(num_tokens)
        sources, destinations = self.pool.take_copies()
        if destinations:
            self.storage.copy_blocks(sources, destinations)
        size = self.pool.block_size
        for position in range(kv.length, kv.length + num_tokens):
            block, slot = kv.block_ids[position // size], position % size
            self.storage.keys[1, block, slot] = contents[0, position]
            self.storage.values[1, block, slot] = contents[1, position]

    def random_contents(self, num_tokens: int) -> Tensor:
        return torch.randn(2, num_tokens, *self.storage.keys.shape[3:]).to(self.storage.keys.dtype)

    def attend(self, backend: str, kvs: Sequence[SequenceKV], counts: Sequence[int], query: Tensor, **special: Any):
        packed, offset = [], 0
        for kv, count in zip(kvs, counts, strict=True):
            packed.append(PackedSegment(kv=kv, offset=offset, num_tokens=count))
            offset += count
        attention = get_backend(backend).prepare(packed, self.storage)
        return attention.attend(1, query, scaling=0.3, **{"sliding_window": None, "softcap": None, **special})

    def random_query(self, num_tokens: int) -> Tensor:  # [1, H, T, D], a view as models make it
        query = torch.randn(1, num_tokens, self.num_heads, self.head_dim).to(self.storage.keys.dtype)
        return query.transpose(1, 2)


def random_batch(cache: Cache, seed: int) -> tuple[list[SequenceKV], list[int]]:
    """Sequences of random lengths with branches that share prefixes, and how many tokens each of them adds."""
    choose = random.Random(seed)
    kvs, counts = [], []
    for _ in range(choose.randint(1, 3)):
        trunk, length = SequenceKV(cache.pool), choose.choice((1, 15, 40, 250, 300, 530))
        cache.write(trunk, length, cache.random_contents(length))
        trunk.advance(length)
        branches = [trunk.fork(choose.randint(length // 2, length)) for _ in range(choose.randint(0, 5))]
        kvs += branches
        if length % 2:
            kvs.append(trunk)
        else:
            trunk.free()
    kvs = kvs or [SequenceKV(cache.pool)]
    for kv in kvs:
        counts.append(choose.choice((1, 1, 3, 20)))
        cache.write(kv, counts[-1], cache.random_contents(kv.length + counts[-1]))
    return kvs, counts


@needs_compiler
@pytest.mark.parametrize("special", SPECIALS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_equals_sdpa(geometry: tuple[int, int, int, int], special: dict[str, Any]) -> None:
    torch.manual_seed(0)
    for seed in range(4):
        cache = Cache(geometry, torch.float32)
        kvs, counts = random_batch(cache, seed)
        query = cache.random_query(sum(counts))
        output = cache.attend("native", kvs, counts, query, **special)
        for states in (cache.storage.keys, cache.storage.values):
            states.nan_to_num_()
        torch.testing.assert_close(output, cache.attend("sdpa", kvs, counts, query, **special), atol=3e-6, rtol=2e-5)


@needs_compiler
@pytest.mark.parametrize("special", SPECIALS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_bfloat16_is_rounded_once(geometry: tuple[int, int, int, int], special: dict[str, Any]) -> None:
    torch.manual_seed(0)
    cache, exact = Cache(geometry, torch.bfloat16), Cache(geometry, torch.float32)
    kvs, counts = random_batch(cache, seed=1)
    exact.storage.keys.copy_(cache.storage.keys.nan_to_num())
    exact.storage.values.copy_(cache.storage.values.nan_to_num())
    query = cache.random_query(sum(counts))
    output = cache.attend("native", kvs, counts, query, **special)
    assert output.dtype is torch.bfloat16
    expected = exact.attend("sdpa", kvs, counts, query.float(), **special)
    torch.testing.assert_close(output.float(), expected, atol=1e-5, rtol=2**-8)


@needs_compiler
@pytest.mark.parametrize("special", SPECIALS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_result_does_not_depend_on_the_batch(
    geometry: tuple[int, int, int, int], dtype: torch.dtype, special: dict[str, Any]
) -> None:
    """One token at a time, eight at once, and as six branches beside other sequences: the same bits."""
    torch.manual_seed(0)
    for start in (1, 13, 251, 509):
        cache = Cache(geometry, dtype)
        contents, query = cache.random_contents(start + 8), cache.random_query(8)
        trunk, elsewhere = SequenceKV(cache.pool), SequenceKV(cache.pool)
        for kv in (trunk, elsewhere):
            cache.write(kv, start, contents)
            kv.advance(start)
        others, counts = random_batch(cache, start)
        cache.write(trunk, 8, contents)
        torch.set_num_threads(1)
        whole = cache.attend("native", [trunk], [8], query, **special)
        assert whole.isfinite().all()
        for index in range(8):
            position = start + index
            cache.write(elsewhere, 1, contents)
            row = query[:, :, index : index + 1]
            assert cache.attend("native", [elsewhere], [1], row, **special).equal(whole[:, index : index + 1])
            elsewhere.advance(1)
            if index % 3 == 0:
                forks = [elsewhere.fork(position) for _ in range(6)]
                for fork in forks:
                    cache.write(fork, 1, contents)
                rows = torch.cat([row.repeat(1, 1, 6, 1), cache.random_query(sum(counts))], dim=2)
                torch.set_num_threads(index + 1)
                batch = cache.attend("native", [*forks, *others], [1] * 6 + counts, rows, **special)
                torch.set_num_threads(1)
                assert batch[:, :6].equal(whole[:, index : index + 1].expand(-1, 6, -1, -1))
                for fork in forks:
                    fork.free()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_threads_nor_strides_matter(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cache = Cache((6, 2, 40, 16), dtype)
    kvs, counts = random_batch(cache, seed=2)
    query = cache.random_query(sum(counts))
    torch.set_num_threads(1)
    expected = cache.attend("native", kvs, counts, query)
    strided = torch.empty(*query.shape[:3], 2 * query.shape[3], dtype=dtype)[..., ::2].copy_(query)
    assert cache.attend("native", kvs, counts, strided).equal(expected)
    for num_threads in (2, 3, 64):
        torch.set_num_threads(num_threads)
        assert cache.attend("native", kvs, counts, query).equal(expected)


@needs_compiler
def test_a_query_of_another_type_keeps_it() -> None:
    cache = Cache((6, 2, 8, 4), torch.bfloat16)
    kvs, counts = random_batch(cache, seed=0)
    query = cache.random_query(sum(counts))
    output = cache.attend("native", kvs, counts, query.float())
    assert output.dtype is torch.float32
    assert output.equal(cache.attend("native", kvs, counts, query).float())


@needs_compiler
def test_nan_is_not_hidden() -> None:
    cache = Cache((2, 1, 8, 4), torch.float32)
    kv = SequenceKV(cache.pool)
    cache.write(kv, 20, cache.random_contents(20))
    query = cache.random_query(20)
    query[0, 1, 3, 2] = torch.nan
    output = cache.attend("native", [kv], [20], query)
    assert output[0, 3, 1].isnan().all()
    assert output.isnan().sum() == 8


def tiny_model(backend: str, dtype: torch.dtype) -> TransformersModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    model: Any = Qwen2ForCausalLM(config).to(dtype)
    return TransformersModel(model, pool=BlockPool(128, 4), backend=get_backend(backend))


@needs_compiler
@pytest.mark.parametrize("min_tokens", [1, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.5)])
def test_a_model_computes_what_it_does_with_sdpa(dtype: torch.dtype, tolerance: float, min_tokens: int) -> None:
    """Prefill, branches, and padding as compiled decoders have it."""
    logits = []
    for backend in ("sdpa", "native"):
        model = tiny_model(backend, dtype)
        model.min_tokens = min_tokens
        trunk = SequenceKV(model.pool)
        parts = [model.forward([Segment(kv=trunk, tokens=list(range(90)), num_logits=90)])]
        branches = [trunk.fork(length) for length in (90, 89, 50)]
        parts.append(model.forward([Segment(kv=kv, tokens=[7 + i]) for i, kv in enumerate(branches)]))
        parts.append(model.forward([Segment(kv=trunk, tokens=[3])]))
        logits.append(torch.cat(parts))
    torch.testing.assert_close(*logits, atol=tolerance, rtol=tolerance)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["fused", "permuted", "another type"])
def test_keys_and_values_are_written_where_the_slots_say(dtype: torch.dtype, layout: str) -> None:
    shape = {"num_layers": 3, "num_blocks": 4, "block_size": 4, "num_kv_heads": 2, "head_dim": 8}
    ours, expected = (KVStorage.allocate(**shape, dtype=dtype, device=CPU) for _ in range(2))
    key, value = torch.randn(1, 5, 2, 24).transpose(1, 2).to(dtype)[..., 8:].split(8, dim=-1)  # [1, Hkv, T, D]
    if layout == "permuted":
        key, value = (states.transpose(2, 3).contiguous().transpose(2, 3) for states in (key, value))
    if layout == "another type":
        key, value = key.double(), value.double()
    slots = torch.tensor([3, 15, 0, 7, 8])
    get_backend("native").write(ours, 1, key, value, slots)
    expected.write(1, key, value, slots)
    assert ours.keys.equal(expected.keys)
    assert ours.values.equal(expected.values)
    assert ours.keys[1].any()


@needs_compiler
def test_what_it_cannot_do_is_refused() -> None:
    backend = get_backend("native")
    backend.check(dtype=torch.bfloat16, device=CPU, block_size=3, head_dim=5)
    with pytest.raises(InvalidArgument, match="'native' cannot be used: it is for the CPU only") as caught:
        backend.check(dtype=torch.float32, device=torch.device("cuda"), block_size=16)
    assert caught.value.reason == "ATTENTION_BACKEND_UNAVAILABLE"
    with pytest.raises(InvalidArgument, match=r"it needs float32 or bfloat16, got torch\.float16"):
        backend.check(dtype=torch.float16, device=CPU, block_size=16)


def test_without_a_compiler_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_compiler", lambda: None)
    monkeypatch.setattr(native_attention, "load_library", native.load_library.__wrapped__)
    with pytest.raises(ConfigError, match=r"attention_backend 'native' .* install g\+\+, or use another") as caught:
        get_backend("native").check(dtype=torch.float32, device=CPU, block_size=16)
    assert caught.value.reason == "COMPILER_MISSING"
