"""When a miss waits, and when it does not."""

from __future__ import annotations

import math

import pytest

from specpool.algorithm.fallback import DraftTimes
from specpool_target.next_round.fallback_policy import FallbackPolicy


def measured(**options):
    """Rounds of 100 ms that bring 3 to 4 tokens, at any batch size."""
    policy = FallbackPolicy(**options)
    for _ in range(40):
        policy.observe_round(4, 3, 0.1, from_backup=False)
        for size in (1, 8, 16):
            policy.observe_step(size, 0.1)
    return policy


def choose(policy, *, first_s=0.005, step_s=0.005, **options):
    fields = {"batch_size": 1, "lookahead": 4, "num_backup": 0} | options
    return policy.choose(DraftTimes(first_s=first_s, step_s=step_s), **fields).depth


def test_fast_draft_is_waited_for_and_a_slow_one_is_not():
    assert choose(measured()) == 4
    assert choose(measured(), first_s=0.5, step_s=0.5) == 0


def test_nothing_is_waited_for_without_measurements():
    assert choose(FallbackPolicy()) == 0
    assert choose(measured(), step_s=0.0) == 0


@pytest.mark.parametrize("step_s", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_speculator_that_reports_nonsense_is_not_waited_for(step_s, batch_size):
    policy = measured()
    assert choose(policy, first_s=step_s, step_s=step_s, batch_size=batch_size) == 0
    assert choose(policy) == 4, "and spoils nothing"


def test_in_a_batch_waiting_costs_the_others_forward():
    policy = measured()
    assert choose(policy, batch_size=2) == 0


def test_fixed_policies():
    assert choose(measured(fallback="backup")) == 0
    assert choose(measured(fallback="wait"), first_s=0.5, step_s=0.5) == 4


def test_what_follows_counts_too():
    policy = measured()
    assert choose(policy, first_s=0.01, step_s=0.01) > 0
    for _ in range(200):
        policy.observe_round_after_miss(4, waited=False)
        policy.observe_round_after_miss(1, waited=True)
    assert choose(policy, first_s=0.01, step_s=0.01) == 0


def test_a_large_batch_does_not_wait_before_misses_have_taught_it():
    """Rounds are shallow and a wait brings all tokens: but so does the backup, a forward later."""
    policy = FallbackPolicy()
    for _ in range(200):
        policy.observe_round(1, 1, 0.1, from_backup=False)
        policy.observe_step(32, 0.1)
    assert choose(policy, batch_size=32, lookahead=6, first_s=0.015, step_s=0.01) == 0


def test_one_round_after_a_miss_teaches_little():
    policy = measured()
    policy.observe_round_after_miss(0, waited=True)
    policy.observe_round_after_miss(4, waited=False)
    assert choose(policy, first_s=0.01, step_s=0.01) > 0


def test_drafts_after_misses_count_as_often_as_they_are_accepted():
    policy = measured()
    assert choose(policy, first_s=0.01, step_s=0.01) > 0
    for _ in range(20):
        policy.observe_round(4, 0, 0.1, from_backup=False, waited=True)
        for _ in range(9):
            policy.observe_round(4, 3, 0.1, from_backup=False)
    depths = [choose(policy, first_s=0.01, step_s=0.01) for _ in range(64)]
    assert depths.count(0) == 60
    assert max(depths) > 0, "what is usually not done is tried now and then, or it could never seem better again"
    assert not any(choose(policy, first_s=0.5, step_s=0.5) for _ in range(64)), "what could not pay is not tried"


def test_the_backup_is_tried_now_and_then():
    policy = measured()
    depths = [choose(policy) for _ in range(64)]
    assert depths.count(0) == 4
    assert set(depths) == {0, 4}
