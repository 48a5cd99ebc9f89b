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
