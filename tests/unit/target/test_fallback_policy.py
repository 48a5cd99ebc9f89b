"""When a miss waits, and when it does not."""

from __future__ import annotations

import pytest

from specpool_target.fallback_policy import FallbackPolicy


@pytest.fixture
def policy():
    policy = FallbackPolicy(max_batch_size=16, lookahead=4)
    for _ in range(40):
        policy.observe_round(4, 3, 0.1, from_backup=False)
        policy.observe_lookup(found=True)
        policy.observe_step(1, 0.1)
    return policy


def choose(policy, **options):
    fields = {"batch_size": 1, "lookahead": 4, "draft_step_s": 0.005, "round_trip_s": 0.001, "num_backup": 0} | options
    return policy.choose(**fields).depth


def test_fast_draft_is_waited_for_and_a_slow_one_is_not(policy):
    assert choose(policy) == 4
    assert choose(policy, draft_step_s=0.5) == 0


def test_nothing_is_waited_for_without_measurements(policy):
    assert choose(FallbackPolicy(max_batch_size=16, lookahead=4)) == 0
    assert choose(policy, draft_step_s=0.0) == 0


def test_from_the_threshold_on_the_backup_is_used(policy):
    for _ in range(40):
        choose(policy, draft_step_s=0.02)
        policy.observe_lookup(found=False)
        for size in (1, 8, 16):
            policy.observe_step(size, 0.1)
    threshold = policy.batch_size_threshold
    assert threshold >= 1
    assert choose(policy, batch_size=threshold) == 0
