"""How a pool scales: many targets on one speculator, and large batches on one target.

    python tests/bench/scaling.py targets --json targets.json --plot targets.png
    python tests/bench/scaling.py batch --json batch.json --plot batch.png
    python tests/bench/scaling.py batch --target qwen2.5-coder-1.5b-instruct --draft qwen2.5-coder-0.5b-instruct

Router, streams and schedulers are the real ones. Without `--target` and `--draft` the models are toys that sleep for
the times of a 70B target on four GPUs and a 1B draft on one, stretched by `--stretch` so that Python's own time does
not matter; speeds are printed as if they had not been stretched. The toy draft's logits are the target's with noise, at
temperature 1. Real models answer real prompts, greedily unless told otherwise, with the settings that suit the machine.

End tokens are ignored, so that all sequences are equally long. `tok/s per seq` is the mean over sequences of decoded
tokens, those after the first, per second from the sequence's first token to its last. `total` is the decoded tokens of
all sequences per second from the first token of any of them to the last token of all.

Before each point the same prompts are answered with `--warm-up-tokens`: estimates settle, and prompts are in the prefix
caches up to their last block. JSON and plot are written after every point, so that a run may be cut off.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import get_args

from rich.console import Console
from scaling_report import Point, Row, row_of, save, show

from specpool.client import Client
from specpool.errors import InvalidArgument
from specpool_target.config import Fallback
from specpool_tools.bench.machine import recommended_arguments
from specpool_tools.bench.main import choose_prompts
from specpool_tools.bench.options import MODES, BenchOptions
from specpool_tools.bench.requests import Measurement, Setting, measure
from specpool_tools.bench.system import running_system
from specpool_tools.models.prompts import Prompt

OWN_K = "ssd-own-k"
"""Mode ssd with requests that name no K: the target chooses it, and pauses speculation where it does not pay."""
VERIFY_MS, VERIFY_ROW_MS = 18.3, 0.06
DRAFT_STEP_MS, DRAFT_ROW_MS = 2.0, 0.0033
NOISE = 0.4
"""At temperature 1 this accepts 0.85 of the draft tokens, and finds 0.97 of the others among three further ranks."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"

TOY_DEFAULTS = {"temperature": 1.0, "stretch": 8.0, "max_tokens": 64, "warm_up_tokens": 64, "lookahead": 6}
TOY_DEFAULTS |= {"row_budget": 32, "fan_out": 16}
REAL_DEFAULTS = {"temperature": 0.0, "stretch": 1.0, "max_tokens": 48, "warm_up_tokens": 16, "lookahead": 4}


def model(step_ms: float, row_ms: float, stretch: float, **options: object) -> str:
    """A timed model: the logits of a toy, these times."""
    fields = {"vocab": 64, "seed": 1, "step_ms": step_ms * stretch, "row_ms": row_ms * stretch, **options}
    return "timed#" + ",".join(f"{name}={value}" for name, value in fields.items())


def up_arguments(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Models and settings for `specpool up`. Of a repeated flag the last one counts."""
    if arguments.target:
        up = [*recommended_arguments(), "--target", arguments.target, "--draft", arguments.draft]
    else:
        up = ["--target", model(VERIFY_MS, VERIFY_ROW_MS, arguments.stretch)]
        up += ["--draft", model(DRAFT_STEP_MS, DRAFT_ROW_MS, arguments.stretch, noise=arguments.noise)]
    up += ["--lookahead", str(arguments.lookahead)]
    if arguments.row_budget:
        up += ["--row-budget", str(arguments.row_budget)]
    if arguments.fan_out:
        up += ["--fan-out", str(arguments.fan_out)]
    return (*up, *arguments.up)


def prompts_for(arguments: argparse.Namespace, count: int) -> list[Prompt]:
    """One for each sequence of the largest batch; a smaller batch takes the first of them."""
    if not arguments.target:
        texts = ["".join(LETTERS[(i * 7 + j * j) % 26] for j in range(9)) for i in range(count)]
        return [Prompt(id=str(i), source="toy", text=text) for i, text in enumerate(texts)]
    options = BenchOptions(target=arguments.target, draft=arguments.draft, num_prompts=count, num_tuning_prompts=0)
    _, prompts = choose_prompts(options)
    if len(prompts) < count:
        raise InvalidArgument(f"{count} sequences at once need as many prompts, there are {len(prompts)}")
    return prompts


def system(arguments: argparse.Namespace, num_targets: int, fallback: str) -> AbstractContextManager[str]:
    """`specpool up` over the models, with a batch that takes all sequences and no deadline that matters."""
    settings = {"SPECPOOL_TARGET_FALLBACK": fallback, "OMP_NUM_THREADS": "1"}
    settings |= {"SPECPOOL_TARGET_MAX_BATCH_SIZE": str(max(64, *arguments.batches))}
    settings |= {"SPECPOOL_TARGET_SPECULATION_DEADLINE_MS": "60000"}
    return running_system((*up_arguments(arguments), "--targets", str(num_targets)), environment=settings)


def modes_by_fallback(modes: Sequence[str], fallbacks: Sequence[str]) -> dict[str, list[str]]:
    """What is measured with each fallback: it matters to ssd alone, the other modes run with the first one only."""
    chosen = {fallback: [mode for mode in modes if mode == "ssd"] for fallback in fallbacks}
    chosen[fallbacks[0]] = list(modes)
    return {fallback: some for fallback, some in chosen.items() if some}


def measure_points(arguments: argparse.Namespace) -> Iterator[Row]:
    """All points; the modes of one batch size follow one another, so that drift of the machine hits all alike."""
    prompts = prompts_for(arguments, max(arguments.targets) * max(arguments.batches))
    for fallback, modes in modes_by_fallback(arguments.modes, arguments.fallbacks).items():
        for num_targets in arguments.targets:
            with system(arguments, num_targets, fallback) as endpoint:
                for batch_size in arguments.batches:
                    for mode in modes:
                        label = f"ssd, {fallback}" if mode == "ssd" and fallback != "auto" else mode
                        point = Point(mode=label, num_targets=num_targets, batch_size=batch_size)
                        lookahead, served = (0, "ssd") if mode == OWN_K else (arguments.lookahead, mode)
                        setting = Setting(mode=served, temperature=arguments.temperature, lookahead=lookahead)
                        chosen = prompts[: num_targets * batch_size]
                        yield asyncio.run(run_point(endpoint, point, setting, chosen, arguments))


async def run_point(
    endpoint: str, point: Point, setting: Setting, prompts: Sequence[Prompt], arguments: argparse.Namespace
) -> Row:
    """A warm-up, then the batch as often as asked for, with other seeds each time."""
    samples: list[tuple[float, float]] = []
    async with Client(endpoint) as client:
        await run_batch(client, setting, prompts, max_tokens=arguments.warm_up_tokens, first_seed=0)
        watcher = asyncio.create_task(watch_speculator(client, samples))
        batches = [
            await run_batch(client, setting, prompts, max_tokens=arguments.max_tokens, first_seed=n * len(prompts))
            for n in range(1, arguments.repeats + 1)
        ]
        watcher.cancel()
    return row_of(point, batches, samples, stretch=arguments.stretch)


async def run_batch(
    client: Client, setting: Setting, prompts: Sequence[Prompt], *, max_tokens: int, first_seed: int
) -> list[Measurement]:
    """All sequences at once."""
    requests = [
        measure(client, prompt, setting, max_tokens=max_tokens, seed=seed, ignore_eos=True)
        for seed, prompt in enumerate(prompts, first_seed)
    ]
    return await asyncio.gather(*requests)


async def watch_speculator(client: Client, samples: list[tuple[float, float]]) -> None:
    """Rows per step and milliseconds per step, twice a second."""
    while True:
        await asyncio.sleep(0.5)
        samples += await speculator_steps(client)


async def speculator_steps(client: Client) -> list[tuple[float, float]]:
    """Rows per step and milliseconds per step of every speculator, averages of the last ones."""
    status = await client.cluster_status()
    return [(s.status.load.rows_per_step, s.status.load.step_ms) for s in status.speculators]


def make_parser() -> argparse.ArgumentParser:
    """The options; toys and real models have defaults of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("targets", "batch"))
    parser.add_argument("--target", default="", help="real target, as `specpool up` takes it; default: toys")
    parser.add_argument("--draft", default="", help="its draft")
    parser.add_argument("--targets", type=int, nargs="+", default=[1, 2, 4, 8], help="with `targets`")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="with `batch`")
    parser.add_argument("--modes", nargs="+", choices=(*MODES, OWN_K), default=[*MODES, OWN_K])
    fallbacks = get_args(Fallback)
    parser.add_argument(
        "--fallbacks", nargs="+", choices=fallbacks, default=list(fallbacks), help="of ssd, with `batch`"
    )
    parser.add_argument("--temperature", type=float, help="default: 1 for toys, else 0")
    parser.add_argument(
        "--noise", type=float, default=NOISE, help="deviation of the toy draft's logits from the target's"
    )
    parser.add_argument("--lookahead", type=int, help="K; default: 6 for toys, else 4")
    parser.add_argument("--row-budget", type=int, help="default: 32 for toys, else what suits the machine")
    parser.add_argument("--fan-out", type=int, help="default: 16 for toys, else what suits the machine")
    parser.add_argument("--stretch", type=float, help="of the toys' times; default: 8")
    parser.add_argument("--max-tokens", type=int, help="default: 64 for toys, else 48")
    parser.add_argument("--warm-up-tokens", type=int, help="default: 64 for toys, else 16")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--up", action="append", default=[], metavar="ARGUMENT", help="further `specpool up` argument")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What is not given is what suits toys or real models; what does not go together is refused."""
    parser = make_parser()
    is_real = bool(parser.parse_args(words).target)
    parser.set_defaults(**(REAL_DEFAULTS if is_real else TOY_DEFAULTS))
    arguments = parser.parse_args(words)
    if is_real != bool(arguments.draft):
        parser.error("--target and --draft go together")
    if is_real and arguments.stretch != 1:
        parser.error("--stretch is for toys: real models take the time they take")
    if arguments.what == "targets":
        arguments.batches, arguments.fallbacks = [1], ["auto"]
    else:
        arguments.targets = [1]
    return arguments


def main() -> None:
    arguments = parse_arguments()
    console, rows = Console(width=150), list[Row]()
    for row in measure_points(arguments):
        rows.append(row)
        save(rows, arguments)
        speeds = f"{row.tokens_per_second:.2f} tokens/s of a sequence, {row.total_tokens_per_second:.1f} of all"
        console.print(f"{row.num_targets} x {row.batch_size}, {row.mode}: {speeds}")
    show(rows, console)


if __name__ == "__main__":
    main()
