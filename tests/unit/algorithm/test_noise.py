"""The counter-based noise: pinned bits, good statistics, and a fast path equal to the exact one."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, gumbel_r, kstest
from torch import Tensor

from specpool.algorithm import noise
from specpool.algorithm.noise import Stream, gumbel, gumbel_argmax, gumbel_topk, uniform
from specpool.native import has_compiler

MASK = (1 << 64) - 1


def oracle_noise(seed: int, position: int, token: int, stream: int) -> float:
    """The noise once more, with Python's own integers and logarithms."""

    def mix(state: int) -> int:
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        return state ^ (state >> 31)

    def hash_of(key: int, number: int) -> int:
        return mix((key + (number + 1) * 0x9E3779B97F4A7C15) & MASK)

    def exponential(hashed: int) -> float:
        return -math.log1p(-(2 * (hashed >> 12) + 1) / 2**53)

    key = mix((seed + 0x9E3779B97F4A7C15) & MASK)
    key = mix((key + (stream + 1) * 0x8CB92BA72F3D8DD7) & MASK)
    key = mix((key + position * 0xD1B54A32D192ED03) & MASK)
    block = hash_of(key ^ 0xA0761D6478BD642F, token // 64)
    least = exponential(block) / 64
    return -math.log(least if block % 64 == token % 64 else least + exponential(hash_of(key, token)))


# never to change: they are what makes a seed mean the same text on every machine and in every release
GOLDEN = {
    (0, 0, 0, Stream.TARGET): "0x1.5bb9160faa4b3p-4",
    (1, 17, 151_935, Stream.TARGET): "-0x1.92ed0d007c270p-2",
    (-5, 4096, 1000, Stream.DRAFT): "-0x1.6993459c3170ap-2",
    (2**63 + 11, 2, 7, Stream.RECOVER): "0x1.d331a8c0fc156p-2",
    (123456789, 131_071, 32_000, Stream.ACCEPT): "-0x1.92fc669273df7p-1",
}


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_golden_values(key: tuple[int, int, int, Stream], device: str) -> None:
    seed, position, token, stream = key
    positions = torch.tensor([position], device=device)
    value = gumbel(seed, positions, torch.tensor([token], device=device), stream)
    assert float(value).hex() == GOLDEN[key]


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_golden_values_are_those_of_the_definition(key: tuple[int, int, int, Stream]) -> None:
    assert float.fromhex(GOLDEN[key]) == pytest.approx(oracle_noise(*key), rel=1e-13, abs=1e-13)


def test_all_tokens_of_a_block_are_those_of_the_definition() -> None:
    values = gumbel(11, torch.tensor([5]), 200)[0].tolist()
    assert values == pytest.approx([oracle_noise(11, 5, token, 0) for token in range(200)], rel=1e-12, abs=1e-12)


def test_own_logarithm_is_within_four_units_in_the_last_place() -> None:
    random = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = torch.cat((random, torch.logspace(-16, 2, 10_000, dtype=torch.float64)))
    x = torch.cat((x, 1 - torch.logspace(-16, -1, 1000, dtype=torch.float64)))
    x = x[(x > 0) & (x != 1)]
    expected = torch.tensor([math.log(value) for value in x.tolist()], dtype=torch.float64)
    assert float(((noise._log(x) - expected) / expected).abs().max()) < 4 * 2.0**-52


def test_noise_at_the_extremes_of_the_hash_is_in_range() -> None:
    hashes = torch.tensor([0, -1, 1 << 12, -(1 << 12), (1 << 63) - 1, -(1 << 63)])
    exponentials = noise._exponential(hashes)
    assert float(exponentials.min()) == pytest.approx(2**-53, rel=1e-12)
    assert float(exponentials.max()) == pytest.approx(53 * math.log(2), rel=1e-12)
    assert -float(noise._log(exponentials / 64).min()) < noise._MAX_NOISE


def test_a_block_bounds_its_tokens_and_one_of_them_reaches_the_bound() -> None:
    keys = torch.arange(7) << 50
    least, lanes = noise._least_of_block(keys[:, None], torch.arange(300))
    values = noise._noise(keys[:, None], torch.arange(300 * 64)).view(7, 300, 64)
    best = values.max(dim=2)
    assert best.indices.equal(lanes)
    assert best.values.equal(-noise._log(least))


@pytest.mark.parametrize(
    "vary",
    [
        lambda i: (3, i, 5, 0),
        lambda i: (3, 5, i, 0),
        lambda i: (i, 5, 3, 0),
        lambda i: (7, i // 256, i % 256, 3),
        lambda i: (i, i, i, 1),
        lambda i: (-i, i, 255 - i % 256, 2),
    ],
    ids=["positions", "tokens", "seeds", "positions-and-tokens", "diagonal", "antidiagonal"],
)
def test_neighbours_are_independent_and_gumbel(vary: object) -> None:
    keys = torch.tensor([vary(i) for i in range(65_536)])  # type: ignore[operator]
    stream = Stream(int(keys[0, 3]))
    values = gumbel(keys[:, 0], keys[:, 1], keys[:, 2:3], stream)[:, 0]
    assert kstest(values.numpy(), gumbel_r.cdf).pvalue > 1e-3
    ranks = values.argsort().argsort().double()
    for lag in (1, 2, 256):
        correlation = torch.corrcoef(torch.stack((ranks[:-lag], ranks[lag:])))[0, 1]
        assert abs(float(correlation)) < 4 / math.sqrt(len(ranks))


def test_streams_are_independent() -> None:
    positions = torch.arange(65_536)
    values = torch.stack([uniform(9, positions, stream) for stream in Stream])
    off_diagonal = torch.corrcoef(values) - torch.eye(len(Stream), dtype=torch.float64)
    assert float(off_diagonal.abs().max()) < 4 / math.sqrt(len(positions))


def test_uniform_is_uniform() -> None:
    counts = torch.histc(uniform(1, torch.arange(100_000)).float(), bins=64, min=0, max=1)
    assert chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("k", [1, 3, 16])
def test_fast_selection_equals_the_exact_one(spread: float, k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(64, 5_000, generator=generator) * spread
    scores[:, ::7] = -torch.inf
    positions = torch.arange(64)
    exact = (scores.double() + gumbel(11, positions, 5_000)).topk(k, dim=1).indices
    assert gumbel_topk(scores, 11, positions, k)[0].equal(exact)


def exact_topk(scores: Tensor, seed: int, positions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By exact noise over the whole vocabulary."""
    padded = torch.nn.functional.pad(scores.double(), (0, k), value=-torch.inf)
    best = (padded + gumbel(seed, positions, padded.shape[1])).topk(k, dim=1)
    return best.indices.masked_fill(best.values == -torch.inf, -1), best.values


def all_possible(scores: Tensor) -> Tensor:
    return scores


def every_third_possible(scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.arange(scores.shape[1], device=scores.device) % 3 != 1, -torch.inf)


def five_possible(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores < scores.topk(min(5, scores.shape[1]), dim=1).values[:, -1:], -torch.inf)


def first_row_impossible(scores: Tensor) -> Tensor:
    return torch.cat((torch.full_like(scores[:1], -torch.inf), scores[1:]))


def one_peak_per_block(scores: Tensor) -> Tensor:
    """Bounds that say nothing: the noise of the peaks is not that of the block's best token."""
    return torch.where(torch.arange(scores.shape[1], device=scores.device) % 64 == 5, 0, scores - 1000)


@pytest.fixture(params=["kernel", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which implementation finds the best tokens of float32 scores on a CPU."""
    if request.param == "torch":
        monkeypatch.setattr(noise, "_kernel", lambda: None)
    elif not has_compiler():
        pytest.skip("no C++ compiler")
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "pattern", [all_possible, every_third_possible, five_possible, first_row_impossible, one_peak_per_block]
)
def test_tokens_and_sums_are_those_of_brute_force(
    pattern: Callable[[Tensor], Tensor], dtype: torch.dtype, device: str
) -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = [(2, 1), (3, 64), (1, 100), (4, 1025), (3, 5000), (2, 30_001)]
    for (num_rows, vocab_size), temperature, k in product(shapes, [1e-3, 0.3, 1.0, 1e6], [1, 4, 17]):
        logits = 3 * torch.randn(num_rows, vocab_size, generator=generator)
        scores = pattern((logits / temperature).clamp(-6e4, 6e4).to(device, dtype))
        positions = torch.arange(num_rows, device=device) + vocab_size
        tokens, sums = gumbel_topk(scores, 13, positions, k)
        expected_tokens, expected_sums = exact_topk(scores, 13, positions, k)
        assert tokens.equal(expected_tokens), (vocab_size, temperature, k)
        assert sums.equal(expected_sums), (vocab_size, temperature, k)


@pytest.mark.usefixtures("way")
def test_equal_scores_and_no_rows() -> None:
    scores, positions = torch.zeros(5, 40_000), torch.arange(5)
    assert gumbel_topk(scores, 1, positions, 3)[0].equal(exact_topk(scores, 1, positions, 3)[0])
    assert gumbel_topk(scores[:0], 1, positions[:0], 3)[0].shape == (0, 3)


@pytest.mark.usefixtures("way")
def test_rows_that_are_not_contiguous() -> None:
    scores = torch.randn(40_000, 6, generator=torch.Generator().manual_seed(5)).t()[::2]
    positions = torch.arange(3)
    assert gumbel_topk(scores, 1, positions, 3)[0].equal(exact_topk(scores, 1, positions, 3)[0])


@pytest.mark.usefixtures("way")
def test_fast_selection_equals_the_exact_one_on_a_large_vocabulary() -> None:
    scores = torch.randn(3, 151_936, generator=torch.Generator().manual_seed(2)) * 4
    seeds, positions = torch.tensor([5, 5, -9]), torch.tensor([0, 1, 1])
    exact = (scores.double() + gumbel(seeds, positions, 151_936)).argmax(dim=1)
    assert gumbel_argmax(scores, seeds, positions).equal(exact)


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.one_of(st.floats(-1e4, 1e4, width=32), st.just(-math.inf)), min_size=1, max_size=12).filter(
        lambda row: max(row) > -math.inf
    ),
    seed=st.integers(-(2**63), 2**64 - 1),
    k=st.integers(1, 14),
)
def test_ranks_of_any_row(scores: list[float], seed: int, k: int) -> None:
    row, positions = torch.tensor([scores]), torch.tensor([3])
    exact = (row.double() + gumbel(seed, positions, len(scores)))[0].tolist()
    order = sorted((t for t in range(len(scores)) if scores[t] > -math.inf), key=lambda t: -exact[t])
    expected = (order + [-1] * k)[:k]
    assert gumbel_topk(row, seed, positions, k)[0][0].tolist() == expected


@pytest.mark.usefixtures("way")
def test_reach_leaves_out_only_unlikely_tokens() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = 2 * torch.randn(64, 5000, generator=generator)
    positions = torch.arange(64)
    full, short = (gumbel_topk(scores, 7, positions, 4, reach=reach)[0] for reach in (None, 9.0))
    assert (full[:, 0] == short[:, 0]).float().mean() > 0.9
    assert gumbel_topk(scores, 7, positions, 4, reach=1e9)[0].equal(full)
    best = scores.argmax(dim=1, keepdim=True)
    assert gumbel_topk(scores, 7, positions, 2, reach=0.0)[0].equal(torch.cat([best, torch.full_like(best, -1)], dim=1))


@pytest.mark.usefixtures("way")
def test_a_row_does_not_depend_on_its_batch() -> None:
    scores = torch.randn(9, 1_000, generator=torch.Generator().manual_seed(3))
    seeds, positions = torch.arange(9) * 1_000_003, torch.arange(9) + 40
    together, _ = gumbel_topk(scores, seeds, positions, 5)
    for row in range(9):
        alone, _ = gumbel_topk(scores[row : row + 1], int(seeds[row]), positions[row : row + 1], 5)
        assert alone[0].equal(together[row])


def test_unsigned_and_signed_seeds_of_the_same_bits_agree() -> None:
    positions = torch.arange(4)
    assert gumbel(2**64 - 1, positions, 8).equal(gumbel(-1, positions, 8))


def test_samples_follow_softmax() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    scores = probabilities.float().log().expand(100_000, 4)
    counts: Tensor = torch.bincount(gumbel_argmax(scores, 2, torch.arange(100_000)), minlength=4)
    assert chisquare(counts.numpy(), (probabilities * 100_000).numpy()).pvalue > 1e-3


def test_not_a_number_is_never_chosen() -> None:
    scores = torch.randn(2, 1000, generator=torch.Generator().manual_seed(6))
    scores[0, 500] = torch.nan
    tokens, sums = gumbel_topk(scores, 1, torch.arange(2), 3)
    assert 500 not in tokens[0]
    assert not sums.isnan().any()
    assert gumbel_topk(scores, 1, torch.arange(2), 3, reach=12.0)[0][0].tolist() == [-1, -1, -1]
