"""Rows and lookahead from measured times."""

from __future__ import annotations

import random

import pytest

from specpool.algorithm.row_times import LinearTime, RowTimes, best_lookahead, never_falling, rows_worth_running


def test_linear_time_finds_base_and_slope_in_noise() -> None:
    time, rng = LinearTime(), random.Random(0)
    for _ in range(500):
        rows = rng.randint(1, 16)
        time.observe(rows, 0.040 + 0.002 * rows + rng.gauss(0, 0.001))
    assert time.base_s == pytest.approx(0.040, rel=0.05)
    assert time.per_row_s == pytest.approx(0.002, rel=0.1)
    assert time(10) == pytest.approx(0.060, rel=0.05)


def test_linear_time_follows_a_machine_that_slows_down() -> None:
    time = LinearTime()
    for factor in (1, 3):
        for index in range(400):
            rows = 1 + index % 8
            time.observe(rows, factor * (0.010 + 0.001 * rows))
    assert time(4) == pytest.approx(3 * 0.014, rel=0.05)


def test_linear_time_draws_no_slope_from_one_row_count() -> None:
    time = LinearTime()
    for seconds in (0.01, 0.02, 0.03):
        time.observe(6, seconds)
    assert time.per_row_s == 0
    assert time(20) == pytest.approx(0.02, rel=0.05)
    assert LinearTime()(3) == 0


def free_up_to_four(rows: int) -> float:
    return 0.020 + 0.004 * max(0, rows - 4)


def test_row_times_know_which_rows_are_free() -> None:
    time, rng = RowTimes(), random.Random(0)
    for _ in range(500):
        rows = rng.randint(1, 8)
        time.observe(rows, free_up_to_four(rows) * rng.uniform(0.95, 1.05))
    for rows in range(1, 9):
        assert time(rows) == pytest.approx(free_up_to_four(rows), rel=0.1)
    assert time(4) - time(1) < 0.1 * (time(8) - time(4))
    assert time(20) > time(8) == max(map(time, range(9)))
    values = [0.6, 0.05, 0.05, 0.05, 0.05, 0.05]
    assert rows_worth_running(values, time, num_rows=6) == 4, "three more cost nothing, the next would"


def test_row_times_forget_counts_that_were_not_seen_for_long() -> None:
    time = RowTimes()
    for rows, factor, times in ((1, 1, 20), (6, 1, 20), (1, 3, 300), (2, 3, 300)):
        for _ in range(times):
            time.observe(rows, factor * (0.010 + 0.001 * rows))
    assert time(6) >= 3 * 0.011
    assert RowTimes()(3) == 0


def test_a_count_that_was_slow_when_it_was_run_does_not_keep_larger_ones_from_being_run() -> None:
    time = RowTimes()
    for index in range(398):
        rows = (1, 2, 4, 4)[index % 4]
        time.observe(rows, free_up_to_four(rows))
    for _ in range(2):  # the host was busy just then
        time.observe(3, 0.035)
    assert time(1) <= time(2) <= time(3) <= time(4) < 0.022
    assert rows_worth_running([0.6, 0.1, 0.1, 0.05, 0.0], time, num_rows=5) >= 4


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ([], [], []),
        ([1, 2, 3], [1, 1, 1], [1, 2, 3]),
        ([3, 1], [1, 3], [1.5, 1.5]),
        ([1, 4, 3, 2, 5], [1, 1, 1, 1, 1], [1, 3, 3, 3, 5]),
        ([3, 2, 1], [1, 1, 2], [1.75, 1.75, 1.75]),
    ],
)
def test_never_falling_pools_what_falls(values: list[float], weights: list[float], expected: list[float]) -> None:
    assert never_falling(values, weights) == pytest.approx(expected)


def test_rows_are_run_as_long_as_they_raise_the_value_per_second() -> None:
    values = [0.6, 0.2, 0.1, 0.02, 0.01]
    assert rows_worth_running(values, lambda rows: 0.05, num_rows=5) == 5  # free rows
    assert rows_worth_running(values, lambda rows: 0.04 + 0.004 * rows, num_rows=5) == 3
    assert rows_worth_running(values, lambda rows: 0.001 + 0.05 * rows, num_rows=5) == 1
    assert rows_worth_running(values, lambda rows: 0.04 + 0.004 * rows, num_rows=2) == 2
    assert rows_worth_running(values, lambda rows: 0.0, num_rows=4) == 4
    assert rows_worth_running(values, lambda rows: 0.05, num_rows=0) == 0
    assert rows_worth_running([], lambda rows: 0.05, num_rows=3) == 0


def test_rows_that_run_anyway_make_others_cheaper() -> None:
    values = [0.3, 0.1]
    assert rows_worth_running(values, lambda rows: 0.01 * rows, num_rows=2) == 1
    assert rows_worth_running(values, lambda rows: 0.01 * rows, num_rows=2, num_fixed=8) == 2


def test_lookahead_weighs_tokens_against_time() -> None:
    def plan(verify_row_s: float, draft_s: float) -> int:
        return best_lookahead(
            8,
            acceptance=0.8,
            verify_s=lambda k: 0.1 + verify_row_s * (k + 1),
            draft_s=lambda k: draft_s * k,
        )

    assert plan(0.0, 0.0) == 8  # drafted ahead, verified for nothing
    assert plan(0.0, 0.02) < 8
    assert plan(0.0, 0.02) > plan(0.0, 0.2) >= 1
    assert plan(0.05, 0.0) < plan(0.005, 0.0)
    assert best_lookahead(1, acceptance=0.0, verify_s=lambda k: 1.0 + k, draft_s=lambda k: 0.0) == 1
