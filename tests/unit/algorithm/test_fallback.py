"""Expected tokens, times of batches, and the choice after a miss."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specpool.algorithm.fallback import (
    NO_WAIT,
    DraftTimes,
    TimeTable,
    choose_fallback,
    expected_tokens,
)


def test_expected_tokens() -> None:
    assert expected_tokens(0, 0.9) == 1
    assert expected_tokens(3, 0.5) == 1.875
    assert expected_tokens(4, 1.0) == 5


def test_a_time_table_interpolates_and_never_extrapolates() -> None:
    table = TimeTable({1: 0.1, 8: 0.17, 16: 0.33})
    assert [table(b) for b in (1, 8, 16, 64)] == pytest.approx([0.1, 0.17, 0.33, 0.33])
    assert table(12) == pytest.approx(0.25)
    assert TimeTable({4: 0.2})(1) == 0.2


CHOICE = {"lookahead": 4, "acceptance": 0.8, "steady_tokens_per_s": 20.0}


def _times(step_s: float, first_s: float | None = None, forward_s: float = 0.0) -> DraftTimes:
    return DraftTimes(first_s=step_s if first_s is None else first_s, step_s=step_s, forward_s=forward_s)


def test_a_fast_draft_is_waited_for_to_full_depth() -> None:
    choice = choose_fallback(_times(0.001), **CHOICE)
    assert choice.depth == 4
    assert choice.waiting_s == pytest.approx(0.004)
    assert choice.gain == pytest.approx(0.8 + 0.64 + 0.512 + 0.4096 - 4 * 0.001 * 20)


def test_depth_stops_where_a_token_costs_more_than_it_brings() -> None:
    # the third token brings .512 and costs .6
    assert choose_fallback(_times(0.03), **CHOICE).depth == 2


def test_beside_others_waiting_ends_between_two_of_their_forwards() -> None:
    times = _times(0.06, forward_s=0.1)
    assert [times.waiting_s(n) for n in (1, 2, 3, 4)] == pytest.approx([0.1, 0.2, 0.2, 0.3])
    # Two tokens, and three, miss two forwards: the third is free. A first one alone would bring less than it costs.
    assert choose_fallback(times, **{**CHOICE, "steady_tokens_per_s": 9.0}).depth == 3


@pytest.mark.parametrize(
    ("times", "worse"),
    [
        (_times(0.05), {}),
        (_times(0.01, first_s=1.0), {}),
        (_times(0.01, forward_s=0.2), {}),
        (_times(0.01), {"tokens_backup": 3.5}),
        (_times(0.01), {"acceptance": 0.01}),
    ],
    ids=str,
)
def test_otherwise_it_goes_on_at_once(times: DraftTimes, worse: dict[str, float]) -> None:
    assert choose_fallback(times, **{**CHOICE, **worse}) == NO_WAIT  # type: ignore[arg-type]


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 100), st.integers(0, 12))
def test_a_choice_is_never_worse_than_going_on(acceptance: float, step: float, rate: float, lookahead: int) -> None:
    choice = choose_fallback(_times(step), lookahead=lookahead, acceptance=acceptance, steady_tokens_per_s=rate)
    assert 0 <= choice.depth <= lookahead
    assert choice.gain >= 0
