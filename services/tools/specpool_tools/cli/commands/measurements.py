"""Commands that measure or predict: `bench`, `plan`, `demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from specpool_tools.cli.commands.options import Mode, Output, Verification, group
from specpool_tools.cli.errors import handled

app = group()


@app.command()
def bench(
    target_model: Annotated[str, typer.Option("--target", help="Target model.")] = "qwen2.5-coder-1.5b-instruct",
    draft_model: Annotated[str, typer.Option("--draft", help="Draft model.")] = "qwen2.5-coder-0.5b-instruct",
    up_argument: Annotated[list[str] | None, typer.Option("--up", help="Further `specpool up` argument.")] = None,
    affinity: Annotated[str, typer.Option(help="Cores per role, as for `specpool up`.")] = "",
    shared_affinity: Annotated[str, typer.Option(help="Second layout for off and sd: all the cores.")] = "",
    mode: Annotated[list[Mode] | None, typer.Option(help="Repeatable; default all.")] = None,
    source: Annotated[list[str] | None, typer.Option(help="Prompt set; repeatable; default all.")] = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts measured.")] = 18,
    num_tuning_prompts: Annotated[int, typer.Option(help="Other prompts, to choose K on.")] = 6,
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer.")] = 64,
    temperature: Annotated[list[float] | None, typer.Option(help="Repeatable; default 0 and 1.")] = None,
    verification: Annotated[Verification, typer.Option(help="How draft tokens are accepted.")] = Verification.COUPLED,
    lookahead: Annotated[list[int] | None, typer.Option(help="Candidates for K; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Of every request.")] = 1,
    endpoint: Annotated[str, typer.Option(help="Bench this router instead of starting one.")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write results there.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write PNG plots to this folder.")] = None,
) -> None:
    """The same prompts through off, sd and ssd, interleaved: speeds, hit rates, where the time goes."""
    with handled():
        from rich.console import Console

        from specpool_tools.bench.main import run_bench
        from specpool_tools.bench.options import MODES, BenchOptions

        defaults = BenchOptions(target=target_model, draft=draft_model)
        options = BenchOptions(
            target=target_model,
            draft=draft_model,
            up_arguments=tuple(up_argument or ()),
            affinity=affinity,
            shared_affinity=shared_affinity,
            modes=tuple(m.value for m in mode) if mode else MODES,
            sources=tuple(source) if source else defaults.sources,
            num_prompts=num_prompts,
            num_tuning_prompts=num_tuning_prompts,
            max_tokens=max_tokens,
            temperatures=tuple(temperature) if temperature else defaults.temperatures,
            verification=verification,
            lookaheads=tuple(lookahead) if lookahead else defaults.lookaheads,
            seed=seed,
            endpoint=endpoint,
            json_path=json_path,
            plot_directory=plots,
        )
        # In a file nothing limits the width; 80 columns would cut the tables' figures off.
        run_bench(options, Console(width=None if sys.stdout.isatty() else 150))


@app.command()
def plan(
    profile: Annotated[str, typer.Argument(help="YAML file of times and acceptance, or a profile that comes along.")],
    targets: Annotated[list[int] | None, typer.Option(help="Targets on one speculator; repeatable.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per target.")] = 1,
    pool_for: Annotated[int, typer.Option(help="Size a pool for so many targets.")] = 0,
    slo_tokens_per_s: Annotated[float, typer.Option(help="Speed every sequence must have; 0: 0.9 of the best.")] = 0.0,
    lookahead: Annotated[list[int] | None, typer.Option(help="Candidates for K; repeatable.")] = None,
    fan_out: Annotated[list[int] | None, typer.Option(help="Candidates for B; repeatable.")] = None,
    fit_sd: Annotated[float, typer.Option(help="Fit the acceptance rate to this speed of mode sd, tokens/s.")] = 0.0,
    fit_sd_lookahead: Annotated[int, typer.Option(help="K of that measurement.")] = 0,
    seconds: Annotated[float, typer.Option(help="Simulated of a target alone.")] = 12.0,
    seed: Annotated[int, typer.Option(help="Of the simulated text.")] = 1,
    output: Annotated[Output, typer.Option(help="Tables, or one JSON object.")] = Output.TEXT,
    plot: Annotated[Path | None, typer.Option(help="PNG of speed over targets.")] = None,
) -> None:
    """Simulate targets and a speculator: speeds, how many targets one serves, how large a pool has to be."""
    with handled():
        from rich.console import Console

        from specpool_tools.cli.plan import PlanOptions, run_plan

        options = PlanOptions(
            profile=profile,
            target_counts=tuple(targets or (1, 2, 4, 8)),
            batch_size=batch_size,
            num_targets=pool_for,
            slo_tokens_per_s=slo_tokens_per_s,
            lookaheads=tuple(lookahead or ()),
            fan_outs=tuple(fan_out or ()),
            sd_tokens_per_s=fit_sd,
            sd_lookahead=fit_sd_lookahead,
            seconds=seconds,
            seed=seed,
            as_json=output is Output.JSON,
            plot=plot,
        )
        run_plan(options, Console(width=None if sys.stdout.isatty() else 80))


@app.command()
def demo(
    target_model: Annotated[str, typer.Option("--target", help="Target model.")] = "qwen2.5-coder-1.5b-instruct",
    draft_model: Annotated[str, typer.Option("--draft", help="Draft model.")] = "qwen2.5-coder-0.5b-instruct",
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Length of the answer.")] = 96,
) -> None:
    """Fetch a pair of models, start everything, stream an answer with SSD and without, and stop everything."""
    with handled():
        from specpool_tools.cli.demo import run_demo

        run_demo(target_model, draft_model, prompt=prompt, max_tokens=max_tokens)
