"""Fan-out: budgets, the paper's closed form, optimality; and the online estimates that feed it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specpool.algorithm.estimators import AcceptanceEstimator, MissPowerLawEstimator
from specpool.algorithm.fan_out import (
    PowerLaw,
    continuous_fan_out,
    geometric_fan_out,
    outcome_probabilities,
    round_to_sum,
    uniform_fan_out,
)

budgets = st.integers(0, 500)
lookaheads = st.integers(0, 16)
rates = st.floats(0, 1)
laws = st.builds(PowerLaw, st.floats(1e-3, 1), st.floats(0.1, 4))


def _expected_hit_rate(
    fan_out: tuple[int, ...], acceptance: float, after_rejection: PowerLaw, after_acceptance: PowerLaw
) -> float:
    """Probability that the outcome is among the guesses."""
    lookahead = len(fan_out) - 1
    kinds = [after_rejection] * lookahead + [after_acceptance]
    outcomes = zip(outcome_probabilities(lookahead, acceptance), kinds, fan_out, strict=True)
    return sum(probability * (1 - law.miss_rate(num)) for probability, law, num in outcomes)


@given(budgets, lookaheads, rates, laws, laws)
def test_a_budget_is_spent_exactly(
    budget: int, lookahead: int, acceptance: float, rejected: PowerLaw, accepted: PowerLaw
) -> None:
    fan_out = geometric_fan_out(budget, lookahead, acceptance, rejected, accepted)
    assert len(fan_out) == lookahead + 1
    assert sum(fan_out) == budget
    assert min(fan_out) >= 0


@given(budgets, lookaheads, st.floats(0.01, 0.99), laws, laws)
def test_later_rejections_get_no_more_guesses(
    budget: int, lookahead: int, acceptance: float, rejected: PowerLaw, accepted: PowerLaw
) -> None:
    after_rejection = geometric_fan_out(budget, lookahead, acceptance, rejected, accepted)[:-1]
    assert list(after_rejection) == sorted(after_rejection, reverse=True)


@given(budgets, lookaheads)
def test_uniform(budget: int, lookahead: int) -> None:
    fan_out = uniform_fan_out(budget, lookahead)
    assert sum(fan_out) == budget
    assert max(fan_out) - min(fan_out) <= 1


@given(st.lists(st.floats(0.001, 1e6), min_size=1), st.integers(0, 10_000))
def test_rounding_moves_no_value_by_one(values: list[float], total: int) -> None:
    rounded = round_to_sum(values, total)
    assert sum(rounded) == total
    scale = total / sum(values)
    assert all(abs(r - v * scale) < 1 + 1e-6 for r, v in zip(rounded, values, strict=True))


@pytest.mark.parametrize("acceptance", [0.3, 0.8, 0.95])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_papers_formula_is_the_case_of_one_law(acceptance: float, exponent: float) -> None:
    law, lookahead, power = PowerLaw(1.0, exponent), 5, 1 / (1 + exponent)
    fan_out = continuous_fan_out(40, lookahead, acceptance, law, law)
    expected = [acceptance ** (k * power) for k in range(lookahead)]
    expected.append(acceptance ** (lookahead * power) * (1 - acceptance) ** -power)
    scale = 40 / sum(expected)
    assert fan_out == pytest.approx([value * scale for value in expected], rel=1e-6)


@pytest.mark.parametrize("acceptance", [0.4, 0.85])
def test_no_other_division_of_the_budget_misses_less(acceptance: float) -> None:
    rejected, accepted = PowerLaw(0.41, 1.0), PowerLaw(0.10, 1.4)
    best = continuous_fan_out(60, 4, acceptance, rejected, accepted)
    laws_by_k = [rejected] * 4 + [accepted]

    def misses(fan_out: tuple[float, ...]) -> float:
        terms = zip(outcome_probabilities(4, acceptance), laws_by_k, fan_out, strict=True)
        return sum(p * law.constant / f**law.exponent for p, law, f in terms)

    generator = random.Random(1)
    for _ in range(200):
        other = [f * generator.uniform(0.7, 1.3) for f in best]
        scale = 60 / sum(other)
        assert misses(tuple(f * scale for f in other)) >= misses(best)


def test_geometric_beats_uniform_on_the_measured_pair() -> None:
    rejected, accepted = PowerLaw(0.41, 1.0), PowerLaw(0.10, 1.4)
    for budget in (8, 16, 32, 64):
        geometric = geometric_fan_out(budget, 5, 0.9, rejected, accepted)
        uniform = uniform_fan_out(budget, 5)
        assert _expected_hit_rate(geometric, 0.9, rejected, accepted) > _expected_hit_rate(
            uniform, 0.9, rejected, accepted
        )


def test_negative_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative, got -1 and 3"):
        uniform_fan_out(-1, 3)


# ---- estimators ----


def test_acceptance_starts_at_its_prior_and_follows_the_rounds() -> None:
    estimator = AcceptanceEstimator(0.85)
    assert estimator.value == pytest.approx(0.85)
    generator = random.Random(2)
    for _ in range(3000):
        accepted = next((k for k in range(5) if generator.random() > 0.6), 5)
        estimator.observe(accepted, 5)
    assert estimator.value == pytest.approx(0.6, abs=0.08)


def test_acceptance_counts_the_rejected_token_once_and_no_token_never() -> None:
    estimator = AcceptanceEstimator(0.5, prior_weight=1, decay=1)
    estimator.observe(2, 5)  # accepted, accepted, rejected
    estimator.observe(0, 0)
    estimator.observe(3, 3)
    assert estimator.value == pytest.approx((5 + 0.5) / (6 + 1))


def test_acceptance_forgets() -> None:
    estimator = AcceptanceEstimator(decay=0.98)
    for _ in range(500):
        estimator.observe(5, 5)
    for _ in range(500):
        estimator.observe(0, 5)
    assert estimator.value < 0.2


def test_the_miss_law_starts_at_its_prior() -> None:
    prior = PowerLaw(0.3, 1.2)
    fitted = MissPowerLawEstimator(prior).value
    assert (fitted.constant, fitted.exponent) == pytest.approx((0.3, 1.2))


@pytest.mark.parametrize("law", [PowerLaw(0.41, 1.0), PowerLaw(0.10, 1.4), PowerLaw(0.6, 0.6)])
@pytest.mark.parametrize("num_guesses", [4, 16, None])
def test_the_miss_law_is_recovered_from_ranks(law: PowerLaw, num_guesses: int | None) -> None:
    """Also when the number of guesses varies, which must not bias the fit."""
    estimator = MissPowerLawEstimator(PowerLaw(0.3, 1.2), decay=0.9998)
    generator = random.Random(3)
    for _ in range(20_000):
        num = num_guesses or generator.choice([1, 2, 4, 8, 16])
        chance = generator.random()
        rank = next((f - 1 for f in range(1, num + 1) if law.miss_rate(f) <= chance), None)
        estimator.observe(rank, num)
    for fan_out in (1, 2, 4):
        assert estimator.miss_rate(fan_out) == pytest.approx(law.miss_rate(fan_out), rel=0.25, abs=0.01)


@given(st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 40)), st.integers(0, 40)), max_size=50))
def test_any_observations_give_a_usable_law(observations: list[tuple[int | None, int]]) -> None:
    estimator = MissPowerLawEstimator()
    for rank, num_guesses in observations:
        estimator.observe(rank, num_guesses)
    law = estimator.value
    assert 0 < law.constant <= 1
    assert 0 < law.exponent <= 4
    assert sum(geometric_fan_out(12, 3, 0.8, law, law)) == 12
