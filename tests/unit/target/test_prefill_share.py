"""Prompts beside running rounds: the bound on a round's extra time, and who gets on."""

from __future__ import annotations

import random

import pytest

from specpool_target.engine.prefill_share import PrefillShare, allot

ROUND_MS, TOKEN_MS = 18.3, 0.06


def forward_s(num_round_tokens: int, num_prompt_tokens: int) -> float:
    return (ROUND_MS + TOKEN_MS * (num_round_tokens + num_prompt_tokens)) / 1e3


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_a_round_beside_a_long_prompt_takes_the_share_longer_that_is_allowed(share):
    prefill = PrefillShare(max_batch_tokens=4096, max_share=share)
    for _ in range(20):
        prefill.observe(7, 0, forward_s(7, 0))
    first = prefill.num_tokens(7)
    assert first == 4096 - 7, "nothing is known of prompts"
    prefill.observe(7, first, forward_s(7, first))
    for _ in range(50):
        num_tokens = prefill.num_tokens(7)
        seconds = forward_s(7, num_tokens)
        assert seconds <= 1.01 * forward_s(7, 0) / (1 - share)
        assert seconds >= 0.9 * forward_s(7, 0) / (1 - share)
        prefill.observe(7, num_tokens, seconds)


def test_with_nobody_beside_it_a_prompt_takes_the_whole_forward():
    prefill = PrefillShare(max_batch_tokens=512, max_share=0.2)
    prefill.observe(4, 0, 0.01)
    prefill.observe(0, 512, 1.0)
    assert prefill.num_tokens(0) == 512
    assert prefill.num_tokens(4) == 1, "one token takes 2 ms of a round of 10, and none would be no progress"


def chunks_beside_rounds(prefill: PrefillShare, num_steps: int, round_tokens, added_ms) -> list[tuple[int, float]]:
    """Prompt tokens of each step, and by what share of its round's time it was longer for them."""
    steps = []
    for step in range(num_steps):
        num_round_tokens = round_tokens(step)
        num_tokens = prefill.num_tokens(num_round_tokens)
        round_ms, more_ms = 1.5 * num_round_tokens, added_ms(num_tokens)
        prefill.observe(num_round_tokens, num_tokens, (round_ms + more_ms) / 1e3)
        steps.append((num_tokens, more_ms / round_ms))
    return steps


def test_a_price_that_a_chunk_has_whatever_its_length_does_not_shrink_chunks_to_nothing():
    """Attention over a long context: 18 ms for however short a chunk, beside rounds of 30 ms, and 2 ms a token."""
    prefill = PrefillShare(max_batch_tokens=512, max_share=0.5)
    for _ in range(20):
        prefill.observe(20, 0, 0.030)
    prefill.observe(20, 1, 0.050)
    steps = chunks_beside_rounds(prefill, 200, lambda step: 20, lambda num_tokens: 18 + 2 * num_tokens)
    for num_tokens, share in steps[50:]:
        assert num_tokens in (5, 6, 7), "six tokens take as long as a round"
        assert share < 1.1


def test_a_prompt_gets_on_where_a_chunk_of_one_token_takes_all_of_its_share():
    """At the end of a long context attention alone takes 28 of the 30 ms, and a token 2: more is allowed, not all."""
    prefill = PrefillShare(max_batch_tokens=512, max_share=0.5)
    for _ in range(20):
        prefill.observe(20, 0, 0.030)
    prefill.observe(0, 500, 1.0)
    steps = chunks_beside_rounds(prefill, 200, lambda step: 20, lambda num_tokens: 28 + 2 * num_tokens)
    for num_tokens, share in steps[50:]:
        assert num_tokens >= 10
        assert share <= 2.1


def test_rounds_that_have_more_tokens_than_before_are_not_counted_as_the_prompts_time():
    """Rounds beside prompts are longer, so that more is drafted in them, and they take longer by themselves."""
    prefill = PrefillShare(max_batch_tokens=512, max_share=0.5)
    for step in range(60):
        num_round_tokens = 4 + step % 8
        prefill.observe(num_round_tokens, 0, 1.5e-3 * num_round_tokens)
    steps = chunks_beside_rounds(prefill, 200, lambda step: 20, lambda num_tokens: 3 * num_tokens)
    for num_tokens, share in steps[50:]:
        assert num_tokens in (9, 10), "ten tokens take as long as a round of twenty"
        assert share < 1.1


def test_the_end_of_a_long_prompt_does_not_hold_up_the_next_one():
    prefill = PrefillShare(max_batch_tokens=512, max_share=0.5)
    for _ in range(20):
        prefill.observe(20, 0, 0.030)
    chunks_beside_rounds(prefill, 100, lambda step: 20, lambda num_tokens: 20 * num_tokens)
    assert prefill.num_tokens(20) <= 2
    steps = chunks_beside_rounds(prefill, 40, lambda step: 20, lambda num_tokens: num_tokens / 2)
    assert steps[30][0] >= 45, "sixty take as long as a round"


def test_one_forward_that_was_held_up_does_not_stop_a_prompt():
    prefill = PrefillShare(max_batch_tokens=512, max_share=0.5)
    for _ in range(20):
        prefill.observe(20, 0, 0.030)
    chunks_beside_rounds(prefill, 100, lambda step: 20, lambda num_tokens: num_tokens)
    before = prefill.num_tokens(20)
    prefill.observe(20, before, 2.0)
    assert prefill.num_tokens(20) >= 0.6 * before


def test_times_that_vary_never_stop_a_prompt():
    draw = random.Random(3)
    prefill = PrefillShare(max_batch_tokens=512, max_share=0.5)
    for _ in range(500):
        num_tokens = prefill.num_tokens(8)
        assert 1 <= num_tokens <= 504
        prefill.observe(8, draw.choice([0, num_tokens]), draw.uniform(0.001, 0.05))


def test_a_short_prompt_does_not_wait_behind_a_long_one_and_the_oldest_gets_on():
    assert allot([32_000, 40], 512) == [472, 40]
    assert allot([32_000, 8_000, 40], 400) == [100, 260, 40]
    assert allot([40, 32_000], 512) == [40, 472]
    assert allot([5], 512) == [5]
    assert allot([7, 7], 1) == [1, 0]
    assert allot([], 512) == []


@pytest.mark.parametrize("seed", range(5))
def test_all_tokens_are_given_out_and_nobody_gets_more_than_wanted(seed):
    draw = random.Random(seed)
    wanted = [draw.randint(1, 500) for _ in range(draw.randint(1, 9))]
    for num_tokens in (1, 3, 64, 512, 5000):
        given = allot(wanted, num_tokens)
        assert all(0 <= some <= most for some, most in zip(given, wanted, strict=True))
        assert sum(given) == min(num_tokens, sum(wanted))
        assert given[0] > 0
