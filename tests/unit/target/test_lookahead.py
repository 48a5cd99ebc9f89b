"""What the target plans from its measured forwards."""

from __future__ import annotations

import pytest

from specpool_target.fallback_policy import FallbackPolicy
from specpool_target.lookahead import LookaheadPlanner


def planner(free_tokens: int) -> LookaheadPlanner:
    """After forwards that take 100 ms up to so many tokens, and 20 ms more for each further one."""
    policy = FallbackPolicy(max_batch_size=4, lookahead=8)
    made = LookaheadPlanner(policy, max_lookahead=8)
    for index in range(400):
        num_tokens = 1 + index % 12
        made.observe_step(num_tokens, 0.100 + 0.020 * max(0, num_tokens - free_tokens))
        policy.observe_round(3, 2, 0.100, from_backup=False)
        policy.observe_round(2, 1, 0.100, from_backup=True)
    return made


def test_before_anything_is_measured_all_of_the_backup_is_verified() -> None:
    made = LookaheadPlanner(FallbackPolicy(max_batch_size=4, lookahead=8), max_lookahead=8)
    assert made.worthwhile_backup(2, 5, 1) == 5


@pytest.mark.parametrize(("free_tokens", "expected"), [(12, 5), (5, 2)])
def test_backup_tokens_are_verified_while_the_forward_takes_no_longer(free_tokens: int, expected: int) -> None:
    """Two of three draft tokens are accepted and half of the backup's: behind two others, the third that is not free
    would bring 0.05 tokens and cost 20 ms, in which half a token is generated."""
    assert planner(free_tokens).worthwhile_backup(2, 5, 1) == expected


def test_in_a_batch_everyone_pays_for_a_token() -> None:
    assert planner(5).worthwhile_backup(2, 5, 4) == 0
    assert planner(5).worthwhile_backup(0, 5, 1) >= 3
