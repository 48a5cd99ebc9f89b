"""Coupled against rejection verification above temperature 0, with the Saguaro constant at 1 and tuned online.

    python tests/bench/sampling.py

Two systems stand side by side on the same cores, one of them idle at any time; prompts go through all settings in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from specpool.client import Client
from specpool_tools.bench.machine import recommended_arguments
from specpool_tools.bench.report import Summary, summarize
from specpool_tools.bench.requests import Measurement, Setting, measure
from specpool_tools.bench.system import running_system
from specpool_tools.models.prompts import Prompt, load_prompts

CONSTANT, TUNED = "C = 1", "C tuned"


async def run(
    endpoints: dict[str, str], warm_up: Sequence[Prompt], prompts: Sequence[Prompt], arguments: argparse.Namespace
) -> list[Measurement]:
    """All prompts under all settings, whose order turns with each prompt."""
    settings = [
        Setting(mode="ssd", temperature=t, lookahead=arguments.lookahead, verification=verification, layout=name)
        for t in arguments.temperatures
        for verification, name in (("coupled", CONSTANT), ("rejection", CONSTANT), ("rejection", TUNED))
    ]
    async with Client(endpoints[CONSTANT]) as constant, Client(endpoints[TUNED]) as tuned:
        clients, found = {CONSTANT: constant, TUNED: tuned}, list[Measurement]()
        for index, prompt in enumerate([*warm_up, *prompts]):
            turn = index % len(settings)
            for setting in [*settings[turn:], *settings[:turn]]:
                result = await measure(
                    clients[setting.layout], prompt, setting, max_tokens=arguments.max_tokens, seed=1
                )
                if index >= len(warm_up):
                    found.append(result)
    return found


def show(summaries: Sequence[Summary], console: Console) -> None:
    """One row per setting."""
    table = Table(title="mode ssd above temperature 0")
    for heading in ("T", "verification", "tok/s", "tok/round", "accepted share", "hit", "full"):
        table.add_column(heading, justify="left" if heading == "verification" else "right")
    for s in sorted(summaries, key=lambda s: (s.setting.temperature, s.setting.verification, s.setting.layout)):
        is_coupled = s.setting.verification == "coupled"
        name = "coupled" if is_coupled else f"rejection, {s.setting.layout}"
        numbers = (s.tokens_per_second, s.tokens_per_round, s.acceptance_rate, s.hit_rate, s.full_hit_rate)
        table.add_row(f"{s.setting.temperature:g}", name, *(f"{number:.3f}" for number in numbers))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--lookahead", type=int, default=4)
    parser.add_argument("--num-prompts", type=int, default=12)
    parser.add_argument("--num-warm-up", type=int, default=2, help="prompts before, for estimates and tuner to settle")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--up", action="append", default=[], metavar="ARGUMENT", help="further `specpool up` argument")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(width=150)
    sources = [load_prompts(source) for source in ("humaneval", "gsm8k", "mtbench")]
    in_turn = [prompts[i] for i in range(arguments.num_prompts) for prompts in sources]
    first = arguments.num_warm_up
    up = (*recommended_arguments(), "--target", arguments.target, "--draft", arguments.draft, *arguments.up)
    with ExitStack() as stack:
        endpoints = {
            name: stack.enter_context(running_system(up, environment={"SPECPOOL_SPECULATOR_TUNE_SAGUARO": tuned}))
            for name, tuned in ((CONSTANT, "false"), (TUNED, "true"))
        }
        prompts = in_turn[first : first + arguments.num_prompts]
        summaries = summarize(asyncio.run(run(endpoints, in_turn[:first], prompts, arguments)))
    show(summaries, console)
    if arguments.json:
        arguments.json.write_text(json.dumps([summary.to_dict() for summary in summaries], indent=2) + "\n")


if __name__ == "__main__":
    main()
