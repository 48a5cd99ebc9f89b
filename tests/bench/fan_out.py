"""Best-first, geometric and uniform fan-out at equal budgets: hit rate and decode speed of mode ssd on a real pair.

    python tests/bench/fan_out.py --json fan_out.json --plot fan_out.png

A budget of B gives B guesses a round and B branch rows a draft step. At each budget one target has a speculator of each
policy, on the same core, all but one idle at any time: every prompt is answered with each of them in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, get_args

from rich.console import Console
from rich.table import Table

from specpool.client import Client
from specpool.config.sources import load_config
from specpool.errors import SpecPoolError
from specpool_speculator.config import FanOutPolicy
from specpool_tools.bench.machine import recommended_arguments
from specpool_tools.bench.report import Summary, summarize
from specpool_tools.bench.requests import Measurement, Setting, measure
from specpool_tools.bench.system import running_service, running_system
from specpool_tools.local.processes import lay_out
from specpool_tools.local.up_config import UpConfig
from specpool_tools.models.prompts import Prompt, load_prompts

_LINK_S: Final = 60.0

Key = tuple[str, int]
"""(policy, budget)."""


@contextmanager
def speculator(up: Sequence[str], policy: str, target: str) -> Iterator[str]:
    """The endpoint of a router between `target` and a fresh speculator, which is as `specpool up` would start it."""
    flags = {name[2:].replace("-", "_"): value for name, value in zip(up[::2], up[1::2], strict=True)}
    processes = lay_out(load_config(UpConfig, section="up", flags=flags), settings_file=None, run_directory=Path())
    assert processes.speculator is not None, "there is a draft"
    environment = {**processes.speculator.environment, "SPECPOOL_SPECULATOR_FAN_OUT_POLICY": policy}
    arguments = processes.speculator.command[processes.speculator.command.index("speculator") :]
    with (
        running_service(arguments, environment=environment) as endpoint,
        running_service(("router", f"--targets={target}", f"--speculators={endpoint}")) as router,
    ):
        yield router


async def target_of(endpoint: str) -> str:
    """The endpoint of the one target."""
    async with Client(endpoint) as client:
        return (await client.cluster_status()).targets[0].endpoint


async def until_linked(client: Client, warm_up: Prompt, setting: Setting) -> None:
    """The target connects to a speculator when it is first given one."""
    deadline = time.monotonic() + _LINK_S
    while time.monotonic() < deadline:
        with suppress(SpecPoolError):
            stats = (await measure(client, warm_up, setting, max_tokens=8, seed=1)).stats
            if stats.num_hits + stats.num_partial:
                return
        await asyncio.sleep(0.5)
    raise SystemExit("the target and a speculator did not find one another")


async def compare(
    endpoints: dict[str, str], prompts: Sequence[Prompt], settings: Sequence[Setting], warm_up: Prompt, max_tokens: int
) -> dict[str, list[Measurement]]:
    """All prompts under all settings by policy, after one answer of each that lets the estimates settle."""
    found: dict[str, list[Measurement]] = {policy: [] for policy in endpoints}
    async with AsyncExitStack() as stack:
        clients = {policy: await stack.enter_async_context(Client(each)) for policy, each in endpoints.items()}
        for client in clients.values():
            await until_linked(client, warm_up, settings[0])
            for setting in settings:
                await measure(client, warm_up, setting, max_tokens=max_tokens, seed=1)
        ways = [(policy, setting) for setting in settings for policy in clients]
        for index, prompt in enumerate(prompts):
            turn = index % len(ways)
            for policy, setting in [*ways[turn:], *ways[:turn]]:
                found[policy].append(await measure(clients[policy], prompt, setting, max_tokens=max_tokens, seed=1))
    return found


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
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--up", action="append", default=[], metavar="ARGUMENT", help="name or value for `specpool up`")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    console = Console(width=150)

    by_source = [load_prompts(source) for source in ("humaneval", "gsm8k", "mtbench")]
    in_turn = [prompts[i] for i in range(arguments.num_prompts) for prompts in by_source]
    warm_up, prompts = in_turn[0], in_turn[1 : arguments.num_prompts + 1]
    settings = [Setting(mode="ssd", temperature=t, lookahead=arguments.lookahead) for t in arguments.temperatures]
    up = (*recommended_arguments(), "--target", arguments.target, "--lookahead", str(arguments.lookahead))
    up += tuple(arguments.up)
    results: dict[Key, list[Summary]] = {}
    with running_system(up) as endpoint:
        target = asyncio.run(target_of(endpoint))
        for budget in arguments.budgets:
            with ExitStack() as stack:
                of_pool = ("--draft", arguments.draft, "--row-budget", str(budget), "--fan-out", str(budget))
                endpoints = {
                    policy: stack.enter_context(speculator((*up, *of_pool), policy, target))
                    for policy in arguments.policies
                }
                found = asyncio.run(compare(endpoints, prompts, settings, warm_up, arguments.max_tokens))
            for policy, group in found.items():
                results[policy, budget] = summarize(group)
                speeds = ", ".join(f"{s.tokens_per_second:.2f}" for s in results[policy, budget])
                console.print(f"budget {budget}, {policy}: {speeds} tokens/s")
    show(results, console)
    if arguments.json:
        document = [
            {"policy": policy, "budget": budget, **summary.to_dict()}
            for (policy, budget), summaries in results.items()
            for summary in summaries
        ]
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
