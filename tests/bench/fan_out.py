"""Best-first, geometric and uniform fan-out at equal budgets: hit rate and decode speed of mode ssd on a real pair.

    python tests/bench/fan_out.py --json fan_out.json --plot fan_out.png

A budget of B gives B guesses a round and B branch rows a draft step. Every (policy, budget) is a system of its own, so
the prompts are gone through in passes, all settings in each pass, that drift of the machine may hit all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from specpool.bench.machine import recommended_arguments
from specpool.bench.report import Summary, summarize
from specpool.bench.requests import Measurement, Setting, measure
from specpool.bench.system import running_system
from specpool.client import Client
from specpool.models.prompts import Prompt, load_prompts
from specpool_speculator.config import FanOutPolicy

Key = tuple[str, int]
"""(policy, budget)."""


async def run_prompts(
    endpoint: str, prompts: Sequence[Prompt], settings: Sequence[Setting], warm_up: Prompt, max_tokens: int
) -> list[Measurement]:
    """All settings on all prompts, after one answer that lets the estimates settle."""
    async with Client(endpoint) as client:
        for setting in settings:
            await measure(client, warm_up, setting, max_tokens=max_tokens, seed=1)
        return [
            await measure(client, prompt, setting, max_tokens=max_tokens, seed=1)
            for prompt in prompts
            for setting in settings
        ]


def show(results: dict[Key, list[Summary]], console: Console) -> None:
    """One row per policy, budget and temperature."""
    table = Table(title="mode ssd at equal budgets of guesses and rows")
    for heading in ("T", "budget", "policy", "tok/s", "tok/round", "hit", "full", "late", "round ms"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    rows = [(s.setting.temperature, budget, policy, s) for (policy, budget), group in results.items() for s in group]
    for temperature, budget, policy, s in sorted(rows, key=lambda row: row[:3]):
        rates = (s.hit_rate, s.full_hit_rate, s.late_rate)
        speeds = (s.tokens_per_second, s.tokens_per_round)
        cells = [*(f"{v:.2f}" for v in speeds), *(f"{v:.3f}" for v in rates), f"{s.round_ms:.0f}"]
        table.add_row(f"{temperature:g}", str(budget), policy, *cells)
    console.print(table)


def plot(results: dict[Key, list[Summary]], path: Path) -> None:
    """Hit rate and speed over the budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    temperatures = [s.setting.temperature for s in next(iter(results.values()))]
    figure, axes = pyplot.subplots(2, len(temperatures), figsize=(10, 7), layout="constrained", squeeze=False)
    for column, temperature in enumerate(temperatures):
        for row, name in enumerate(("hit_rate", "tokens_per_second")):
            for policy in dict.fromkeys(policy for policy, _ in results):
                budgets = [budget for p, budget in results if p == policy]
                values = [getattr(results[policy, budget][column], name) for budget in budgets]
                axes[row][column].plot(budgets, values, marker="o", label=policy)
            axes[row][column].set(xlabel="budget", ylabel=name.replace("_", " "), title=f"T = {temperature:g}")
            axes[row][column].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--budgets", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--policies", nargs="+", choices=get_args(FanOutPolicy), default=list(get_args(FanOutPolicy)))
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--lookahead", type=int, default=4)
    parser.add_argument("--num-prompts", type=int, default=12)
    parser.add_argument("--num-passes", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--up", action="append", default=[], metavar="ARGUMENT", help="further `specpool up` argument")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    console = Console(width=150)

    by_source = [load_prompts(source) for source in ("humaneval", "gsm8k", "mtbench")]
    in_turn = [prompts[i] for i in range(arguments.num_prompts) for prompts in by_source]
    warm_up, prompts = in_turn[0], in_turn[1 : arguments.num_prompts + 1]
    settings = [Setting(mode="ssd", temperature=t, lookahead=arguments.lookahead) for t in arguments.temperatures]
    measurements: dict[Key, list[Measurement]] = defaultdict(list)
    for part in range(arguments.num_passes):
        for budget in arguments.budgets:
            for policy in arguments.policies:
                up = (*recommended_arguments(), "--target", arguments.target, "--draft", arguments.draft)
                up += ("--lookahead", str(arguments.lookahead), "--row-budget", str(budget), "--fan-out", str(budget))
                environment = {"SPECPOOL_SPECULATOR_FAN_OUT_POLICY": policy}
                with running_system((*up, *arguments.up), environment=environment) as endpoint:
                    found = asyncio.run(
                        run_prompts(
                            endpoint, prompts[part :: arguments.num_passes], settings, warm_up, arguments.max_tokens
                        )
                    )
                measurements[policy, budget] += found
                speeds = ", ".join(f"{s.tokens_per_second:.2f}" for s in summarize(found))
                console.print(f"pass {part + 1}, budget {budget}, {policy}: {speeds} tokens/s")
    results = {key: summarize(group) for key, group in measurements.items()}
    show(results, console)
    if arguments.json:
        document = [
            {"policy": policy, "budget": budget, **summary.to_dict()}
            for (policy, budget), group in results.items()
            for summary in group
        ]
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
