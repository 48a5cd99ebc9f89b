"""First tokens of long prompts, and the rounds of others meanwhile, by timed models at the times of a 70B target.

    python tests/bench/first_tokens.py --prompts 1000 8000 32000 --json first_tokens.json
    python tests/bench/first_tokens.py --shares 0.2 0.5 0.9 --before OTHER_TREE

Some sequences decode; then a long prompt comes. Rounds of the others are the times between their deltas, before it
came and until its first token. `alone` is the first token of such a prompt with nobody else there. Memory is that of
the target and of the speculator after all prompts. `--target NAME --draft NAME` takes real models, with the settings
that suit the machine, instead of timed ones. `--turns 4` instead: a conversation, and how much of each turn's prompt
was cached. The JSON file is written after every point.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from conversation import measure_turns, text_of
from host_time import SERVICES, prompts_for
from process_times import resident_bytes
from rich.console import Console
from rich.table import Table
from scaling import DRAFT_ROW_MS, DRAFT_STEP_MS, NOISE, VERIFY_MS, VERIFY_ROW_MS, model

from specpool.client import Client
from specpool.paths import write_atomically
from specpool.v1 import inference_pb2
from specpool_tools.bench.machine import recommended_arguments
from specpool_tools.bench.requests import Setting, chat_request
from specpool_tools.bench.system import running_system
from specpool_tools.models.prompts import Prompt

CONTEXT: Final = 40_000
NUM_BLOCKS: Final = 12_000
REAL_NUM_BLOCKS: Final = 1_500
BEFORE_S: Final = 1.5
"""Seconds in which the others decode before the prompt comes."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt."""

    run: str
    num_tokens: int
    alone_s: float
    beside_s: float
    """Seconds to the first token with others there."""
    round_ms: tuple[float, float, float]
    """Rounds of the others before it came: median, 99th percentile, largest."""
    round_beside_ms: tuple[float, float, float]
    """The same until its first token."""
    target_mib: float
    speculator_mib: float


def system(share: float | None, tree: Path | None, arguments: argparse.Namespace) -> AbstractContextManager[str]:
    """A pool of real models if they are named, else of timed ones."""
    settings = {"OMP_NUM_THREADS": "1"}
    if arguments.target:
        flags = [*recommended_arguments(), "--target", arguments.target, "--draft", arguments.draft, "--lookahead", "4"]
        num_blocks = arguments.kv_blocks or REAL_NUM_BLOCKS
    else:
        options = {"context": CONTEXT}
        flags = ["--target", model(VERIFY_MS, VERIFY_ROW_MS, 1.0, **options)]
        flags += ["--draft", model(DRAFT_STEP_MS, arguments.draft_row_ms, 1.0, noise=NOISE, **options)]
        flags += ["--lookahead", "6"]
        settings["SPECPOOL_TARGET_MAX_BATCH_TOKENS"] = "2048"
        num_blocks = arguments.kv_blocks or NUM_BLOCKS
    for role in ("TARGET", "SPECULATOR"):
        settings[f"SPECPOOL_{role}_NUM_KV_BLOCKS"] = str(num_blocks)
    if share is not None:
        settings["SPECPOOL_TARGET_MAX_PREFILL_SHARE"] = str(share)
    if tree is not None:
        settings["PYTHONPATH"] = os.pathsep.join(str(tree / "services" / name) for name in SERVICES)
    return running_system(flags, environment=settings)


def request(prompt: Prompt, max_tokens: int) -> inference_pb2.GenerateRequest:
    setting = Setting(mode="ssd", temperature=1.0, lookahead=6)
    return chat_request(prompt, setting, max_tokens=max_tokens, seed=1, ignore_eos=True)


async def first_token_s(client: Client, num_tokens: int, name: int) -> float:
    """Of a prompt of so many tokens that no other prompt begins like."""
    chat = request(Prompt(id="long", source="toy", text=""), 4)
    chat.tokens.CopyFrom(
        inference_pb2.TokenPrompt(token_ids=[3 + (name + i * i + i // 26) % 26 for i in range(num_tokens)])
    )
    started_s = time.perf_counter()
    async with aclosing(client.stream(chat)) as events:
        async for event in events:
            if event.HasField("delta"):
                return time.perf_counter() - started_s
    raise AssertionError("no token came")


async def decode(client: Client, prompt: Prompt, gaps: list[tuple[float, float]]) -> None:
    """Decode until cancelled; notes when each delta came, and the time since the one before."""
    last_s = None
    async with aclosing(client.stream(request(prompt, 20_000))) as events:
        async for event in events:
            if event.HasField("delta"):
                now_s = time.perf_counter()
                if last_s is not None:
                    gaps.append((now_s, now_s - last_s))
                last_s = now_s


async def measure(endpoint: str, run: str, num_tokens: int, num_others: int) -> Row:
    async with Client(endpoint) as client:
        alone_s = await first_token_s(client, num_tokens, 1)
        gaps: list[tuple[float, float]] = []
        others = [asyncio.create_task(decode(client, prompt, gaps)) for prompt in prompts_for(num_others)]
        await asyncio.sleep(BEFORE_S)
        came_s = time.perf_counter()
        beside_s = await first_token_s(client, num_tokens, 2)
        ended_s = time.perf_counter()
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    memory = resident_bytes()
    return Row(
        run=run,
        num_tokens=num_tokens,
        alone_s=alone_s,
        beside_s=beside_s,
        round_ms=quantiles([gap for at, gap in gaps if came_s - BEFORE_S / 2 < at < came_s]),
        round_beside_ms=quantiles([gap for at, gap in gaps if came_s + 0.05 < at < ended_s]),
        target_mib=memory["target"] / 2**20,
        speculator_mib=memory["speculator"] / 2**20,
    )


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """Median, 99th percentile and largest, in milliseconds."""
    ordered = sorted(seconds) or [0.0]
    return tuple(1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.99, 1.0))  # type: ignore[return-value]


def measure_points(arguments: argparse.Namespace) -> Iterator[Row]:
    runs: list[tuple[str, float | None, Path | None]] = [
        (f"share {share:g}", share, None) for share in arguments.shares
    ]
    if arguments.before:
        runs.insert(0, ("before", None, arguments.before.resolve()))
    for name, share, tree in runs:
        with system(share, tree, arguments) as endpoint:
            for num_tokens in arguments.prompts:
                yield asyncio.run(measure(endpoint, name, num_tokens, arguments.others))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1000, 8000, 32000])
    parser.add_argument("--shares", type=float, nargs="*", default=[0.5], help="max_prefill_share")
    parser.add_argument("--others", type=int, default=8, help="sequences that decode meanwhile")
    parser.add_argument("--target", default="", help="real target, as `specpool up` takes it; default: timed models")
    parser.add_argument("--draft", default="", help="its draft")
    parser.add_argument("--draft-row-ms", type=float, default=DRAFT_ROW_MS, help="of the timed draft")
    parser.add_argument("--kv-blocks", type=int, default=0, help="of target and draft; default: enough")
    parser.add_argument("--before", type=Path, metavar="TREE", help="root of another tree to measure, too")
    parser.add_argument("--turns", type=int, default=0, help="measure a conversation of so many turns instead")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.turns:
        with system(None, None, arguments) as endpoint:
            for turn in asyncio.run(measure_turns(endpoint, arguments.turns, is_toy=not arguments.target)):
                print(text_of(turn))
        return
    rows = list[Row]()
    table = Table(title="seconds to the first token; rounds of the others in ms: median, 99 %, largest")
    for name in (
        "run",
        "prompt",
        "alone",
        "beside",
        "rounds before",
        "rounds meanwhile",
        "target MiB",
        "speculator MiB",
    ):
        table.add_column(name, justify="right")
    for row in measure_points(arguments):
        rows.append(row)
        if arguments.json:
            write_atomically(arguments.json, json.dumps([asdict(one) for one in rows], indent=2) + "\n")
        times = [" / ".join(f"{ms:.1f}" for ms in each) for each in (row.round_ms, row.round_beside_ms)]
        memory = (f"{row.target_mib:.0f}", f"{row.speculator_mib:.0f}")
        table.add_row(row.run, str(row.num_tokens), f"{row.alone_s:.2f}", f"{row.beside_s:.2f}", *times, *memory)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
