"""What the target chooses from its measured forwards."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from specpool.speculation import Measurements
from specpool_target.engine.sequence import SpeculationMode
from specpool_target.next_round.fallback_policy import FallbackPolicy
from specpool_target.next_round.lookahead_policy import LookaheadPolicy
from specpool_target.next_round.speculation_trials import Output, Verdict


def policy(free_tokens: int) -> LookaheadPolicy:
    """After forwards that take 100 ms up to so many tokens, and 20 ms more for each further one."""
    policy = FallbackPolicy()
    made = LookaheadPolicy(policy, max_lookahead=8)
    for index in range(400):
        num_tokens = 1 + index % 12
        made.observe_step(num_tokens, 0.100 + 0.020 * max(0, num_tokens - free_tokens))
        policy.observe_round(3, 2, 0.100, from_backup=False)
        policy.observe_round(2, 1, 0.100, from_backup=True)
    return made


def test_before_anything_is_measured_all_of_the_backup_is_verified() -> None:
    made = LookaheadPolicy(FallbackPolicy(), max_lookahead=8)
    assert made.worthwhile_backup(2, 5, 1) == 5


@pytest.mark.parametrize(("free_tokens", "expected"), [(12, 5), (5, 2)])
def test_backup_tokens_are_verified_while_the_forward_takes_no_longer(free_tokens: int, expected: int) -> None:
    """Two of three draft tokens are accepted and half of the backup's: behind two others, the third that is not free
    would bring 0.05 tokens and cost 20 ms, in which half a token is generated."""
    assert policy(free_tokens).worthwhile_backup(2, 5, 1) == expected


def test_in_a_batch_everyone_pays_for_a_token() -> None:
    assert policy(5).worthwhile_backup(2, 5, 4) == 0
    assert policy(5).worthwhile_backup(0, 5, 1) >= 3


def lookahead(made: LookaheadPolicy, batch_size: int) -> int:
    return made.lookahead(SpeculationMode.SSD, Measurements(draft_step_s=0.010, max_lookahead=8), batch_size)


def test_the_larger_the_batch_the_fewer_tokens_are_worth_verifying() -> None:
    assert lookahead(policy(5), 1) > lookahead(policy(5), 4) >= 1


def test_what_does_not_pay_is_not_speculated_on() -> None:
    made = policy(5)
    slow = Output(batch_size=4, num_rounds=4, num_drafted=4, num_tokens=4, seconds=0.200)
    plain = Output(batch_size=4, num_rounds=4, num_drafted=0, num_tokens=4, seconds=0.100)
    for _ in range(40):
        made.trials.observe(SpeculationMode.SSD, plain if lookahead(made, 4) == 0 else slow)  # the check is plain
        made.trials.end_step()
    assert made.trials.verdict(SpeculationMode.SSD, 4) is Verdict.PAUSE
    assert made.trials.verdict(SpeculationMode.SSD, 1) is Verdict.SPECULATE
    assert "ssd paused in batches of 4 to 7" in made.explain()


def test_while_it_pauses_the_times_of_more_tokens_are_not_forgotten() -> None:
    made, paused = policy(5), policy(5)
    paused.trials = SimpleNamespace(is_pausing=True)
    for one in (made, paused):
        for _ in range(512):
            one.observe_step(4, 0.100)
    assert paused._verify_time.per_row_s > 0.010
    assert made._verify_time.per_row_s < 0.001
