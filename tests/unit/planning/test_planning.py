"""The simulation against what was measured, and what it answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean, mean, pvariance, stdev
from typing import get_args

import pytest
from rich.console import Console

from specpool.algorithm.fallback import expected_tokens
from specpool.errors import InvalidArgument
from specpool_target.config import Fallback
from specpool_tools.cli.plan import PlanOptions, profile_names, read_profile, run_plan
from specpool_tools.planning.answers import best_settings, fit_acceptance, smallest_pool, targets_per_speculator
from specpool_tools.planning.profile import Profile
from specpool_tools.planning.scenario import Scenario
from specpool_tools.planning.simulations import Simulations
from specpool_tools.planning.simulator import simulate
from specpool_tools.planning.text import SimulatedText

BENCH = Path(__file__).parents[3] / "docs" / "benchmarks" / "cpu-2-cores" / "bench.json"
"""The run whose step times the profile has."""
FAST = Profile(verify_ms=20, draft_step_ms=2, acceptance=0.8, lookahead=4, fan_out=8, row_budget=16)


def test_off_is_one_token_per_forward() -> None:
    figures = simulate(FAST, Scenario(mode="off", seconds=5))
    assert figures.tokens_per_second == pytest.approx(50, rel=0.01)
    assert figures.tokens_per_round == 1


def test_sd_follows_the_formula() -> None:
    figures = simulate(FAST, Scenario(mode="sd", seconds=60))
    expected = expected_tokens(4, 0.8)
    assert figures.tokens_per_round == pytest.approx(expected, rel=0.05)
    assert figures.tokens_per_second == pytest.approx(expected / 0.0285, rel=0.05)


def test_a_perfect_draft_always_hits_and_a_useless_one_costs_nothing() -> None:
    perfect = simulate(replace(FAST, acceptance=1.0), Scenario(mode="ssd", seconds=5))
    assert perfect.hit_rate > 0.98
    assert perfect.tokens_per_second == pytest.approx(5 / 0.020, rel=0.05)
    useless = simulate(
        replace(FAST, acceptance=0.0, miss_constant=1.0, miss_exponent=0.0), Scenario(mode="ssd", seconds=5)
    )
    assert useless.tokens_per_second >= 0.97 * 50


@pytest.mark.parametrize("spread", [0.0, 0.4, 0.98, 0.999, 1.0])
def test_the_draft_is_right_as_often_as_it_expects(spread) -> None:
    text = SimulatedText(replace(FAST, confidence_spread=spread), seed=1)
    places = [text.at("a", position) for position in range(20_000)]
    confidences = [place.confidence for place in places]
    assert fmean(confidences) == pytest.approx(0.8, abs=0.01)
    assert pvariance(confidences) / (0.8 * 0.2) == pytest.approx(spread, abs=0.02)
    for low, high in ((0.0, 0.5), (0.5, 0.9), (0.9, 1.01)):
        chosen = [place for place in places if low <= place.confidence < high]
        if chosen:
            expected = fmean(place.confidence for place in chosen)
            assert fmean(place.rank == 0 for place in chosen) == pytest.approx(expected, abs=0.03)


def test_a_draft_that_knows_where_it_is_sure_hits_more_often() -> None:
    scarce = replace(FAST, fan_out=4, row_budget=4)
    alike, unequal = (
        simulate(replace(scarce, confidence_spread=spread), Scenario(mode="ssd", seconds=20)) for spread in (0.0, 0.5)
    )
    assert unequal.hit_rate > alike.hit_rate + 0.02
    assert unequal.tokens_per_second > 1.02 * alike.tokens_per_second


def test_the_same_seed_gives_the_same_figures() -> None:
    scenario = Scenario(mode="ssd", seconds=2, seed=3, num_targets=2)
    assert simulate(FAST, scenario) == simulate(FAST, scenario)
    assert simulate(FAST, scenario) != simulate(FAST, replace(scenario, seed=4))


def test_predicts_ssd_of_the_paper_from_its_sd() -> None:
    """AR 54.7 tokens/s is an input, SD at K = 6 of 161.8 is fitted; SSD at K = 7 was measured as 255.8."""
    profile = read_profile("llama-70b-on-h100")
    assert 1000 / profile.verify_ms == pytest.approx(54.7, rel=0.001)
    fitted = fit_acceptance(replace(profile, lookahead=6), Scenario(mode="sd", seconds=60), 161.8)
    assert fitted.acceptance == pytest.approx(profile.acceptance, abs=0.02)
    predicted = simulate(replace(profile, acceptance=fitted.acceptance), Scenario(mode="ssd", seconds=12))
    assert predicted.tokens_per_second == pytest.approx(255.8, rel=0.06)


def test_predicts_ssd_of_the_committed_bench_from_its_sd() -> None:
    measured = {s["setting"]["mode"]: s for s in json.loads(BENCH.read_text())["summaries"][:3]}
    profile, sd = read_profile("qwen-coder-1.5b-on-2-cores"), measured["sd"]
    lookahead = sd["setting"]["lookahead"]
    of_sd = replace(
        profile,
        verify_ms=sd["forward_ms"] + sd["verify_ms"] + sd["other_ms"],
        draft_step_ms=(sd["waiting_ms"] - profile.round_trip_ms) / lookahead,
        draft_row_ms=0.0,
        lookahead=lookahead,
    )
    fitted = fit_acceptance(of_sd, Scenario(mode="sd", seconds=600), sd["tokens_per_second"])
    assert fitted.acceptance == pytest.approx(profile.acceptance, abs=0.02)
    predicted = simulate(replace(profile, acceptance=fitted.acceptance), Scenario(mode="ssd", seconds=300))
    assert predicted.tokens_per_second == pytest.approx(measured["ssd"]["tokens_per_second"], rel=0.06)
    assert predicted.hit_rate == pytest.approx(measured["ssd"]["hit_rate"], abs=0.05)


def test_a_crowded_speculator_gives_less_and_never_less_than_plain_decoding() -> None:
    slow = replace(FAST, draft_step_ms=4, draft_row_ms=0.5)
    points = targets_per_speculator(slow, Scenario(mode="ssd", seconds=16), (1, 4, 16))
    speeds = [point.figures.tokens_per_second for point in points]
    assert speeds == sorted(speeds, reverse=True)
    assert points[0].share == 1
    assert speeds[-1] > 0.97 * 50
    assert points[-1].figures.utilisation > 0.95


@pytest.mark.parametrize(("step_ms", "batch_size", "seconds"), [(2, 1, 10), (6, 2, 10), (6, 8, 4)])
def test_the_choice_after_a_miss_is_as_good_as_the_better_fixed_one(step_ms, batch_size, seconds) -> None:
    many_misses = replace(FAST, draft_step_ms=step_ms, miss_constant=0.6, miss_exponent=0.5)
    auto, wait, backup = (
        simulate(many_misses, Scenario(mode="ssd", batch_size=batch_size, fallback=fallback, seconds=seconds))
        for fallback in get_args(Fallback)
    )
    assert (wait.wait_rate, backup.wait_rate) == (1, 0)
    assert auto.tokens_per_second > 0.97 * max(wait.tokens_per_second, backup.tokens_per_second)


def test_the_smallest_pool_meets_the_speed_and_says_what_a_loss_costs() -> None:
    slow = replace(FAST, draft_step_ms=4, draft_row_ms=0.5)
    scenario = Scenario(mode="ssd", seconds=2)
    each = simulate(slow, scenario).tokens_per_second
    pool = smallest_pool(slow, scenario, num_targets=8, slo_tokens_per_s=0.8 * each)
    assert pool is not None
    assert 1 < pool.num_speculators <= 8
    assert pool.tokens_per_second >= 0.8 * each > pool.tokens_per_second_after_loss
    alone = smallest_pool(slow, scenario, num_targets=1, slo_tokens_per_s=60)
    assert alone is not None
    assert alone.tokens_per_second_after_loss == pytest.approx(50, rel=0.02)
    assert smallest_pool(slow, scenario, num_targets=2, slo_tokens_per_s=1000) is None


def test_settings_are_compared_by_speed() -> None:
    best, _ = best_settings(FAST, Scenario(mode="ssd", seconds=3), lookaheads=(1, 4), fan_outs=(1, 8))
    assert (best.lookahead, best.fan_out) == (4, 8)


def test_no_acceptance_rate_explains_an_impossible_speed() -> None:
    with pytest.raises(InvalidArgument, match="no acceptance rate gives 5000 tokens/s in mode sd: 0 gives"):
        fit_acceptance(FAST, Scenario(mode="sd", seconds=2), 5000)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"verify_ms": 1, "draft_step_ms": 1}, "lacks acceptance"),
        ({"verify_ms": 1, "draft_step_ms": 1, "acceptance": 2}, "acceptance must be between 0 and 1, got 2"),
        ({"verify_ms": 0, "draft_step_ms": 1, "acceptance": 0.5}, "verify_ms must be greater than 0"),
        ({"verify_ms": "fast", "draft_step_ms": 1, "acceptance": 0.5}, "verify_ms must be of type float"),
        ({"verify_ms": 1, "draft_step_ms": 1, "acceptance": 0.5, "fan_out": 1.5}, "fan_out must be of type int"),
        (
            {"verify_ms": 1, "draft_step_ms": 1, "acceptance": 0.5, "speed": 3},
            "unknown key 'speed'.*accepted: verify_ms",
        ),
    ],
)
def test_bad_profiles_are_refused_by_name(document, message) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Profile.parse(document)


def test_the_command_prints_tables_json_and_a_plot(tmp_path, capsys) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("verify_ms: 20\ndraft_step_ms: 2\nacceptance: 0.8\n")
    options = PlanOptions(profile=str(profile), target_counts=(1, 2), num_targets=2, seconds=1, plot=tmp_path / "p.png")
    run_plan(options, Console(width=150))
    assert "2 targets at" in capsys.readouterr().out
    assert (tmp_path / "p.png").stat().st_size > 1000
    run_plan(replace(options, as_json=True, plot=None), Console())
    document = json.loads(capsys.readouterr().out)
    assert [point["num_targets"] for point in document["targets_per_speculator"]] == [1, 2]
    assert document["pool"]["smallest"]["num_speculators"] == 1


def test_the_command_refuses_bad_arguments() -> None:
    for options, message in (
        (PlanOptions(profile="nope"), "no profile 'nope': neither a file nor one of llama-70b-on-h100"),
        (PlanOptions(profile=profile_names()[0], target_counts=(0,)), "targets must be at least 1, got 0"),
        (PlanOptions(profile=profile_names()[0], seconds=0), "seconds must be greater than 0"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            run_plan(options, Console())


def test_the_error_that_is_given_is_that_of_other_seeds() -> None:
    found = [simulate(FAST, Scenario(mode="sd", seconds=6, seed=seed)) for seed in range(24)]
    speeds = [figures.tokens_per_second for figures in found]
    spread = stdev(speeds) / mean(speeds)
    assert 0.6 < spread / mean(figures.relative_error for figures in found) < 1.6


def test_a_scenario_is_simulated_once_and_its_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    simulations = Simulations(lambda *step: told.append(step))
    simulations.begin("some", 3)
    scenario = Scenario(mode="off", seconds=1)
    assert simulations(FAST, scenario) is simulations(FAST, scenario)
    simulations.end()
    assert told == [("some", 0, 3), ("some", 1, 3), ("some", 2, 3), ("some", 3, 3)]
