"""`specpool bench`: the same prompts through every mode, interleaved in one run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from specpool.client import Client
from specpool_tools.bench.machine import recommended_arguments
from specpool_tools.bench.options import BenchOptions
from specpool_tools.bench.plots import write_plots
from specpool_tools.bench.report import Summary, round_table, speed_table, summarize
from specpool_tools.bench.requests import Measurement, Setting, measure
from specpool_tools.bench.system import running_system
from specpool_tools.models.prompts import Prompt, load_prompts

OWN_CORES, SHARED_CORES = "own cores", "all cores"


def run_bench(options: BenchOptions, console: Console) -> list[Summary]:
    """Measure, print the tables, write the files that were asked for, and return the summaries."""
    tuning, prompts = choose_prompts(options)
    measurements = _measure_layout(options, OWN_CORES, options.affinity, tuning, prompts, console)
    if options.shared_affinity and not options.endpoint:
        plain = replace(options, modes=tuple(mode for mode in options.modes if mode != "ssd"))
        measurements += _measure_layout(plain, SHARED_CORES, options.shared_affinity, tuning, prompts, console)
    summaries = summarize(measurements)
    console.print(speed_table(summaries))
    console.print(round_table(summaries))
    _write(options, summaries, measurements, console)
    return summaries


def choose_prompts(options: BenchOptions) -> tuple[list[Prompt], list[Prompt]]:
    """Tuning prompts and measured prompts, disjoint, each taken from the sources in turn."""
    by_source = [load_prompts(source) for source in options.sources]
    needed = options.num_tuning_prompts + options.num_prompts
    in_turn = [prompts[i] for i in range(min(map(len, by_source))) for prompts in by_source][:needed]
    return in_turn[: options.num_tuning_prompts], in_turn[options.num_tuning_prompts :]


def _measure_layout(
    options: BenchOptions,
    layout: str,
    affinity: str,
    tuning: Sequence[Prompt],
    prompts: Sequence[Prompt],
    console: Console,
) -> list[Measurement]:
    if options.endpoint:
        return asyncio.run(_measure(options, options.endpoint, layout, tuning, prompts, console))
    # A repeated flag replaces the one before it: what the user says comes after what suits the machine.
    arguments = [*recommended_arguments(), "--target", options.target, "--draft", options.draft]
    arguments += ["--lookahead", str(max(options.lookaheads)), *(("--affinity", affinity) if affinity else ())]
    arguments += options.up_arguments
    with running_system(tuple(arguments), timeout_s=options.ready_timeout_s) as endpoint:
        return asyncio.run(_measure(options, endpoint, layout, tuning, prompts, console))


async def _measure(
    options: BenchOptions,
    endpoint: str,
    layout: str,
    tuning: Sequence[Prompt],
    prompts: Sequence[Prompt],
    console: Console,
) -> list[Measurement]:
    async with Client(endpoint) as client:
        settings: list[Setting] = []
        for temperature in options.temperatures:
            for mode in options.modes:
                base = Setting(
                    mode=mode,
                    temperature=temperature,
                    lookahead=options.lookaheads[0],
                    verification=options.verification,
                    layout=layout,
                )
                settings.append(await _tuned(client, base, options, tuning, console))
        return await _interleaved(client, settings, options, prompts, console)


async def _tuned(
    client: Client, base: Setting, options: BenchOptions, prompts: Sequence[Prompt], console: Console
) -> Setting:
    """`base` with the lookahead that was fastest on the tuning prompts."""
    if base.mode == "off" or len(options.lookaheads) == 1 or not prompts:
        return base
    candidates = [replace(base, lookahead=lookahead) for lookahead in options.lookaheads]
    runs: dict[Setting, list[Measurement]] = {candidate: [] for candidate in candidates}
    for prompt in prompts:  # the candidates in turn, so that drift of the machine hits all alike
        for candidate in candidates:
            runs[candidate].append(
                await measure(client, prompt, candidate, max_tokens=options.num_tuning_tokens, seed=options.seed)
            )
    speeds = {candidate.lookahead: summarize(runs[candidate])[0].tokens_per_second for candidate in candidates}
    best = max(speeds, key=lambda lookahead: speeds[lookahead])
    shown = ", ".join(f"K={lookahead}: {speed:.2f}" for lookahead, speed in speeds.items())
    console.print(f"T={base.temperature:g} {base.layout} {base.mode}: tokens/s {shown}; K={best} taken")
    return replace(base, lookahead=best)


async def _interleaved(
    client: Client, settings: Sequence[Setting], options: BenchOptions, prompts: Sequence[Prompt], console: Console
) -> list[Measurement]:
    """Every prompt under every setting; the order turns with each prompt so that drift hits all alike."""
    measurements = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("measuring", total=len(prompts) * len(settings))
        for index, prompt in enumerate(prompts):
            turn = index % len(settings)
            for setting in [*settings[turn:], *settings[:turn]]:
                measurements.append(
                    await measure(client, prompt, setting, max_tokens=options.max_tokens, seed=options.seed)
                )
                progress.advance(task)
    order = {setting: position for position, setting in enumerate(settings)}
    return sorted(measurements, key=lambda m: order[m.setting])


def _write(
    options: BenchOptions, summaries: Sequence[Summary], measurements: Sequence[Measurement], console: Console
) -> None:
    if options.json_path:
        document = {
            "target": options.target,
            "draft": options.draft,
            "affinity": options.affinity,
            "max_tokens": options.max_tokens,
            "prompts": sorted({m.prompt_id for m in measurements}),
            "summaries": [summary.to_dict() for summary in summaries],
            "answers": [measurement.to_dict() for measurement in measurements],
        }
        options.json_path.parent.mkdir(parents=True, exist_ok=True)
        options.json_path.write_text(json.dumps(document, indent=2) + "\n")
        console.print(f"wrote {options.json_path}")
    if options.plot_directory:
        for path in write_plots(summaries, options.plot_directory):
            console.print(f"wrote {path}")
