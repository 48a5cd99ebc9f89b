"""Pauses between tries."""

from __future__ import annotations

from specpool.backoff import Backoff


def test_pauses_double_up_to_the_longest_and_begin_again_after_a_reset() -> None:
    backoff = Backoff(first_s=0.5, longest_s=3, jitter=0)
    assert [backoff.next_s() for _ in range(5)] == [0.5, 1, 2, 3, 3]
    backoff.reset()
    assert backoff.next_s() == 0.5


def test_no_pause_is_longer_than_the_longest_or_zero() -> None:
    backoff = Backoff(first_s=5, longest_s=2)
    pauses = [backoff.next_s() for _ in range(100)]
    assert max(pauses) <= 2
    assert min(pauses) >= 2 * (1 - backoff.jitter)
    assert len(set(pauses)) > 1, "those who wait for the same thing do not come back at the same moment"
