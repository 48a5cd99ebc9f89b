"""SpecPool beside what a user would otherwise run, on the same pair, prompts, cores and token counts, in one run.

    python tests/bench/peers.py --json peers.json

Peers: `transformers` (generate, assisted generation) and llama.cpp (plain, with the draft model) with 16-bit weights;
llama.cpp with 4-bit weights stands in the same table, labelled: another precision, so another model. Every setting that
a peer leaves open is chosen for each temperature on other prompts, as our K is. All have the same cores: SpecPool puts
the target on one half and the speculator on the other, the others use all of them for both models, as does SpecPool's
`off` in the layout "all cores".

In a virtual machine all cores are kept awake (`specpool up --keep-awake`), for whatever runs.

The prompts are gone through in passes. In each pass every system is started, answers its part of the prompts under all
its settings in turn, and is stopped: no two are ever in memory, and drift of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peer_systems import Answer, Generate, Options, Pair, System, systems
from rich.console import Console
from rich.table import Table

from specpool_tools.bench.machine import should_keep_awake
from specpool_tools.local.awake import cores_awake
from specpool_tools.models.prompts import Prompt, load_prompts

SOURCES = ("humaneval", "gsm8k", "mtbench")
Key = tuple[str, str, float]
"""(system, way, temperature)."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """An answer and where it is from."""

    system: str
    way: str
    precision: str
    temperature: float
    options: dict[str, Any]
    prompt_id: str
    answer: Answer


class Comparison:
    """All answers of a run, and the settings that were chosen on the way."""

    def __init__(self, temperatures: Sequence[float], max_tokens: int, console: Console) -> None:
        self.results: list[Result] = []
        self._temperatures = temperatures
        self._max_tokens = max_tokens
        self._console = console
        self._chosen: dict[Key, Options] = {}

    def run(self, system: System, tuning: Sequence[Prompt], prompts: Sequence[Prompt]) -> None:
        """Start the system, let it answer `prompts` in all its ways, stop it."""
        with system.running() as generate:
            for way, candidates in system.ways.items():
                generate(way, candidates[0], tuning[0], self._temperatures[0], 16)  # warm-up
                for temperature in self._temperatures:
                    if (system.name, way, temperature) not in self._chosen:
                        self._choose(system, generate, way, temperature, tuning)
            for index, prompt in enumerate(prompts):
                keys = [(way, temperature) for temperature in self._temperatures for way in system.ways]
                turn = index % len(keys)
                for way, temperature in [*keys[turn:], *keys[:turn]]:
                    options = self._chosen[system.name, way, temperature]
                    answer = generate(way, options, prompt, temperature, self._max_tokens)
                    self.results.append(_result(system, way, temperature, options, prompt, answer))
        del generate
        gc.collect()  # the models of a peer in this process

    def _choose(
        self, system: System, generate: Generate, way: str, temperature: float, tuning: Sequence[Prompt]
    ) -> None:
        candidates = system.ways[way]
        speeds = [0.0]
        if len(candidates) > 1:
            runs = [[generate(way, o, prompt, temperature, 32) for o in candidates] for prompt in tuning]
            speeds = [speed(answers) for answers in zip(*runs, strict=True)]
            shown = ", ".join(f"{dict(o)}: {s:.2f}" for o, s in zip(candidates, speeds, strict=True))
            self._console.print(f"{system.name}, {way}, T={temperature:g}: tokens/s {shown}", highlight=False)
        self._chosen[system.name, way, temperature] = candidates[speeds.index(max(speeds))]


def _result(system: System, way: str, temperature: float, options: Options, prompt: Prompt, answer: Answer) -> Result:
    return Result(
        system=system.name,
        way=way,
        precision=system.precision,
        temperature=temperature,
        options=dict(options),
        prompt_id=prompt.id,
        answer=answer,
    )


def speed(answers: Sequence[Answer]) -> float:
    """Tokens per second after the first token."""
    seconds = sum(answer.seconds for answer in answers)
    return sum(answer.num_timed for answer in answers) / seconds if seconds else 0.0


def show(results: Sequence[Result], console: Console) -> None:
    """One row per way of generating, and what `ssd` is relative to it."""
    groups: dict[Key, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.system, result.way, result.temperature].append(result)
    speeds = {key: speed([r.answer for r in group]) for key, group in groups.items()}
    table = Table(title="tokens/s after the first token; SpecPool's ssd relative to each")
    for heading in ("T", "system", "way", "precision", "settings", "tok/s", "ssd / this", "tokens", "= off"):
        table.add_column(heading, justify="right" if heading in ("T", "tok/s", "ssd / this", "tokens") else "left")
    for key in sorted(groups, key=lambda key: key[2]):
        (system, way, temperature), group = key, groups[key]
        reference = {r.prompt_id: r.answer.token_ids for r in groups.get(("SpecPool", "off", temperature), [])}
        same = sum(r.answer.token_ids == reference.get(r.prompt_id) for r in group) / len(group)
        table.add_row(
            f"{temperature:g}",
            system,
            way,
            group[0].precision,
            ", ".join(f"{name}={value}" for name, value in group[0].options.items()),
            f"{speeds[key]:.2f}",
            f"{ours / speeds[key]:.2f}" if (ours := speeds.get(("SpecPool", "ssd", temperature))) else "",
            str(sum(len(r.answer.token_ids) for r in group)),
            f"{same:.2f}" if reference else "",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--lookaheads", type=int, nargs="+", default=[4, 5], help="candidates for our K")
    parser.add_argument("--num-prompts", type=int, default=12)
    parser.add_argument("--num-tuning-prompts", type=int, default=3)
    parser.add_argument("--num-passes", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--only", nargs="+", default=[], help="systems; default: all", metavar="NAME[, WAY]")
    parser.add_argument("--no-llama", action="store_true", help="without llama.cpp, which has to be built")
    parser.add_argument("--up", action="append", default=[], metavar="ARGUMENT", help="further `specpool up` argument")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(width=150)
    by_source = [load_prompts(source) for source in SOURCES]
    in_turn = [prompts[i] for i in range(min(map(len, by_source))) for prompts in by_source]
    tuning = in_turn[: arguments.num_tuning_prompts]
    prompts = in_turn[arguments.num_tuning_prompts :][: arguments.num_prompts]
    pair = Pair(arguments.target, arguments.draft)
    comparison = Comparison(arguments.temperatures, arguments.max_tokens, console)
    compared = systems(pair, arguments.lookaheads, arguments.up, with_llama=not arguments.no_llama)
    if arguments.only:
        compared = [s for s in compared if {s.name, *(f"{s.name}, {way}" for way in s.ways)} & set(arguments.only)]
    with cores_awake(sorted(os.sched_getaffinity(0)) if should_keep_awake() else ()):
        for index in range(arguments.num_passes):
            for system in compared if index % 2 == 0 else reversed(compared):
                console.print(f"pass {index + 1}: {system.name}, {', '.join(system.ways)}", highlight=False)
                comparison.run(system, tuning, prompts[index :: arguments.num_passes])
    show(comparison.results, console)
    if arguments.json:
        rows = ",\n".join(json.dumps(asdict(result)) for result in comparison.results)
        arguments.json.write_text(f"[\n{rows}\n]\n")


if __name__ == "__main__":
    main()
