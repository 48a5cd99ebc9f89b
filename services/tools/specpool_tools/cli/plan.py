"""`specpool plan`: what a pool will do, by simulation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from specpool.errors import ConfigError, InvalidArgument
from specpool_tools.cli.progress import StageProgress
from specpool_tools.planning.answers import (
    MAX_FITS,
    PoolPoint,
    PoolSize,
    best_settings,
    fit_acceptance,
    smallest_pool,
    targets_per_speculator,
)
from specpool_tools.planning.profile import Profile
from specpool_tools.planning.scenario import MODES, Figures, Scenario
from specpool_tools.planning.simulations import Simulations

_SHARES = ("hit", "full", "rows", "busy")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """What `specpool plan` is asked."""

    profile: str
    """File of the profile, or the name of one that comes along."""
    target_counts: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of targets on one speculator to try."""
    batch_size: int = 1
    """Sequences per target."""
    num_targets: int = 0
    """Number of targets to size a pool for; 0: do not."""
    slo_tokens_per_s: float = 0.0
    """Speed in tokens per second that every sequence of the pool is to have; 0: 0.9 of that with a speculator each."""
    lookaheads: tuple[int, ...] = ()
    """Candidates for lookahead K; none: the profile's."""
    fan_outs: tuple[int, ...] = ()
    """Candidates for the guesses per round B; none: the profile's."""
    sd_tokens_per_s: float = 0.0
    """Measured speed of mode sd to fit the acceptance rate to first; 0: the profile's rate."""
    sd_lookahead: int = 0
    """Lookahead K of that measurement; 0: the profile's."""
    seconds: float = 12.0
    """Seconds simulated of a target alone; several on one speculator are simulated for that time together, at least for
    an eighth of it each."""
    seed: int = 1
    as_json: bool = False
    plot: Path | None = None
    """File for a PNG of speed over targets; None: none."""


def profile_names() -> list[str]:
    """Names of the profiles that come along."""
    folder = files("specpool_tools.planning").joinpath("profiles")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_profile(name: str) -> Profile:
    """The profile in a file, or the one of that name that comes along. Raises InvalidArgument."""
    if name in profile_names():
        return Profile.read(Path(str(files("specpool_tools.planning").joinpath("profiles", f"{name}.yaml"))))
    if not Path(name).is_file():
        raise InvalidArgument(
            f"no profile {name!r}: neither a file nor one of {', '.join(profile_names())}",
            metadata={"field": "profile", "value": name, "accepted": ", ".join(profile_names())},
        )
    return Profile.read(Path(name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The answers of a simulation."""

    profile: Profile
    """What was simulated, with the settings that were found best."""
    modes: dict[str, Figures]
    """Figures of one target with a speculator of its own, by mode."""
    points: list[PoolPoint]
    """Figures of several targets on one speculator."""
    slo_tokens_per_s: float
    """Speed in tokens per second that the pool is sized for."""
    pool: PoolSize | None
    """The smallest pool that gives it; None if none does, or if none was asked for."""


def run_plan(options: PlanOptions, console: Console) -> None:
    """Simulate what is asked, and print the answers."""
    _check(options)
    profile = read_profile(options.profile)
    progress = StageProgress()
    try:
        plan = make_plan(profile, options, Simulations(progress))
    finally:
        progress.close()
    if options.plot:
        _plot(plan.points, plan.modes, options.plot)
    if options.as_json:
        print(json.dumps(_document(plan, options), indent=2))
    else:
        _print(plan, options, console)


def make_plan(profile: Profile, options: PlanOptions, simulations: Simulations) -> Plan:
    """Answer what is asked about a profile."""
    scenario = Scenario(mode="ssd", batch_size=options.batch_size, seconds=options.seconds, seed=options.seed)
    if options.sd_tokens_per_s:
        simulations.begin("fit", MAX_FITS)
        measured = replace(profile, lookahead=options.sd_lookahead or profile.lookahead)
        fitted = fit_acceptance(measured, replace(scenario, mode="sd"), options.sd_tokens_per_s, simulations)
        profile = replace(profile, acceptance=fitted.acceptance)
        simulations.end()
    if options.lookaheads or options.fan_outs:
        lookaheads, fan_outs = options.lookaheads or (profile.lookahead,), options.fan_outs or (profile.fan_out,)
        simulations.begin("settings", len(lookaheads) * len(fan_outs))
        profile, _ = best_settings(profile, scenario, lookaheads=lookaheads, fan_outs=fan_outs, simulate=simulations)
        simulations.end()
    simulations.begin("modes and targets", len(MODES) + len(options.target_counts) + 1)
    modes = {mode: simulations(profile, replace(scenario, mode=mode)) for mode in MODES}
    points = targets_per_speculator(profile, scenario, options.target_counts, simulations)
    simulations.end()
    slo, pool = options.slo_tokens_per_s or 0.9 * modes["ssd"].tokens_per_second, None
    if options.num_targets:
        simulations.begin("pool", options.num_targets.bit_length() + 3)
        pool = smallest_pool(
            profile, scenario, num_targets=options.num_targets, slo_tokens_per_s=slo, simulate=simulations
        )
        simulations.end()
    return Plan(profile=profile, modes=modes, points=points, slo_tokens_per_s=slo, pool=pool)


def _check(options: PlanOptions) -> None:
    at_least_one = {
        "targets": options.target_counts,
        "lookahead": options.lookaheads,
        "fan_out": options.fan_outs,
        "batch_size": (options.batch_size,),
    }
    for name, values in at_least_one.items():
        if any(value < 1 for value in values):
            raise InvalidArgument(f"{name} must be at least 1, got {min(values)}", metadata={"field": name})
    if options.seconds <= 0:
        raise InvalidArgument(f"seconds must be greater than 0, got {options.seconds}", metadata={"field": "seconds"})
    if options.num_targets < 0:
        raise InvalidArgument(f"pool_for must be at least 0, got {options.num_targets}", metadata={"field": "pool_for"})


def _document(plan: Plan, options: PlanOptions) -> dict[str, Any]:
    document: dict[str, Any] = {
        "profile": asdict(plan.profile),
        "modes": {mode: asdict(figures) for mode, figures in plan.modes.items()},
        "targets_per_speculator": [asdict(point) for point in plan.points],
    }
    if options.num_targets:
        document["pool"] = {"num_targets": options.num_targets, "slo_tokens_per_s": plan.slo_tokens_per_s}
        document["pool"]["smallest"] = asdict(plan.pool) if plan.pool else None
    return document


def _print(plan: Plan, options: PlanOptions, console: Console) -> None:
    profile, modes = plan.profile, plan.modes
    console.print(f"K = {profile.lookahead}, B = {profile.fan_out}, acceptance rate {profile.acceptance:.3f}")
    table = Table(title="one target, one speculator")
    for heading in (
        "mode",
        "tok/s each",
        "±",
        "vs off",
        "tok/round",
        "hit",
        "full",
        "rows",
        "busy",
    ):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for mode, f in modes.items():
        ratio = f"{f.tokens_per_second / modes['off'].tokens_per_second:.2f}"
        table.add_row(mode, *_speed(f), ratio, f"{f.tokens_per_round:.2f}", *_shares(f))
    console.print(table)
    table = Table(title="mode ssd, targets on one speculator")
    for heading in (
        "targets",
        "tok/s each",
        "±",
        "of alone",
        "hit",
        "full",
        "rows",
        "busy",
    ):
        table.add_column(heading, justify="right")
    for p in plan.points:
        table.add_row(str(p.num_targets), *_speed(p.figures), f"{p.share:.2f}", *_shares(p.figures))
    console.print(table)
    console.print(
        "tok/s each: of one sequence; rows: of a draft step;\nbusy: share of time in which the speculator computes"
    )
    if options.num_targets:
        console.print(_describe(plan.pool, plan.slo_tokens_per_s, options.num_targets, modes))


def _speed(figures: Figures) -> tuple[str, str]:
    """A speed, and its standard error."""
    speed = figures.tokens_per_second
    return f"{speed:.1f}", f"{speed * figures.relative_error:.1f}"


def _shares(figures: Figures) -> tuple[str, ...]:
    rates = (f"{figures.hit_rate:.3f}", f"{figures.full_hit_rate:.3f}")
    return (*rates, f"{figures.rows_per_step:.1f}", f"{figures.utilisation:.2f}")


def _describe(pool: PoolSize | None, slo: float, num_targets: int, modes: dict[str, Figures]) -> str:
    if pool is None:
        best = modes["ssd"].tokens_per_second
        return f"no pool gives {slo:.1f} tokens/s: a speculator for every target gives {best:.1f}"
    return (
        f"{num_targets} targets at {slo:.1f} tokens/s or more: {pool.num_speculators} speculators, at most "
        f"{pool.targets_each} targets each, {pool.tokens_per_second:.1f} tokens/s; while one is lost "
        f"{pool.tokens_per_second_after_loss:.1f}; plain decoding {modes['off'].tokens_per_second:.1f}"
    )


def _plot(points: Sequence[PoolPoint], modes: dict[str, Figures], path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("plots need matplotlib: install the extra `bench`", metadata={"field": "plot"}) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    counts = [point.num_targets for point in points]
    axes.plot(counts, [point.figures.tokens_per_second for point in points], marker="o", label="ssd")
    for mode in ("off", "sd"):
        axes.axhline(modes[mode].tokens_per_second, linestyle="--", label=f"{mode}, alone", color="grey")
    axes.set(xlabel="targets on one speculator", ylabel="tokens/s of a sequence", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
