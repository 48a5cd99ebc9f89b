"""What `specpool plan` predicts for speeds that were measured: the rows of docs/planning.md.

    python tests/bench/plan_rows.py

Only the acceptance rate is fitted, to the speed of mode `sd`; speeds of `ssd` are predicted, with two seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from specpool_tools.cli.plan import read_profile
from specpool_tools.planning.answers import fit_acceptance
from specpool_tools.planning.profile import Profile
from specpool_tools.planning.scenario import Scenario
from specpool_tools.planning.simulator import simulate

BENCHES = Path(__file__).parents[2] / "docs/benchmarks/cpu-2-cores"
PAPER_SD, PAPER_SSD, PAPER_SD_LOOKAHEAD = 161.8, 255.8, 6
SEEDS = (1, 2)


def predict(profile: Profile, of_sd: Profile, sd_speed: float, *, sd_s: float, ssd_s: float) -> list[float]:
    """Speeds of `ssd` in tokens per second, one for each seed."""
    found = []
    for seed in SEEDS:
        fitted = fit_acceptance(of_sd, Scenario(mode="sd", seconds=sd_s, seed=seed), sd_speed)
        fitting = replace(profile, acceptance=fitted.acceptance)
        found.append(simulate(fitting, Scenario(mode="ssd", seconds=ssd_s, seed=seed)).tokens_per_second)
    return found


def paper() -> tuple[str, list[float], float]:
    """The paper's pair: the guesses for every length are as many as it has there."""
    profile = read_profile("llama-70b-on-h100")
    of_sd = replace(profile, lookahead=PAPER_SD_LOOKAHEAD)
    return "Llama-3.1-70B", predict(profile, of_sd, PAPER_SD, sd_s=120, ssd_s=60), PAPER_SSD


def on_two_cores(name: str) -> Iterator[tuple[str, list[float], float]]:
    """A committed bench, at both temperatures."""
    profile = read_profile("qwen-coder-1.5b-on-2-cores")
    summaries = json.loads((BENCHES / name).read_text())["summaries"]
    for temperature in (0, 1):
        of_mode = {s["setting"]["mode"]: s for s in summaries if s["setting"]["temperature"] == temperature}
        sd, ssd = of_mode["sd"], of_mode["ssd"]
        lookahead = sd["setting"]["lookahead"]
        of_sd = replace(
            profile,
            verify_ms=sd["forward_ms"] + sd["verify_ms"] + sd["other_ms"],
            draft_step_ms=(sd["waiting_ms"] - profile.round_trip_ms) / lookahead,
            draft_row_ms=0.0,
            lookahead=lookahead,
        )
        of_ssd = replace(
            profile,
            verify_ms=ssd["forward_ms"] + ssd["verify_ms"] + ssd["other_ms"],
            lookahead=ssd["setting"]["lookahead"],
        )
        found = predict(of_ssd, of_sd, sd["tokens_per_second"], sd_s=600, ssd_s=300)
        yield f"{name}, T = {temperature}", found, ssd["tokens_per_second"]


def main() -> None:
    for case, predicted, measured in (paper(), *on_two_cores("bench.json"), *on_two_cores("bench_after_misses.json")):
        errors = ", ".join(f"{speed / measured - 1:+.1%}" for speed in predicted)
        speeds = ", ".join(f"{speed:.2f}" for speed in predicted)
        print(f"{case}: predicted {speeds} tokens/s, measured {measured:.2f}: {errors}", flush=True)


if __name__ == "__main__":
    main()
