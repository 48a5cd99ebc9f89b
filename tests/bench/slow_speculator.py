"""A speculator slowed tenfold, and one that stops answering for two seconds: what it costs a target.

    python tests/bench/slow_speculator.py

Each prompt runs as `off`, as `ssd` with the speculator left alone, as `ssd` while the speculator's process is stopped
nine tenths of the time, and as `ssd` while it is stopped for two seconds out of every four. Prints the speeds, all
measured in one run, in turn; the exit status says whether the disturbed ones kept 0.97 of `off`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from specpool.client import Client
from specpool_tools.bench.machine import recommended_arguments
from specpool_tools.bench.requests import Measurement, Setting, measure
from specpool_tools.bench.system import running_system
from specpool_tools.models.prompts import load_prompts

LEAST_SHARE = 0.97


def find_speculator() -> int:
    """Process id of the one speculator below this process."""
    parents, roles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            roles[int(folder.name)] = (folder / "cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
    for pid, words in roles.items():
        if b"speculator" not in words or b"up" in words or b"specpool_tools.local.shim" in words:
            continue
        ancestor = pid
        while ancestor in parents and ancestor != os.getpid():
            ancestor = parents[ancestor]
        if ancestor == os.getpid():
            return pid
    raise SystemExit("no speculator process found below this one")


@asynccontextmanager
async def disturbed(pid: int, stopped_s: float, running_s: float) -> AsyncIterator[None]:
    """Stop and continue the process in turn."""

    async def disturb() -> None:
        while True:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(stopped_s)
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(running_s)

    task = asyncio.create_task(disturb())
    try:
        yield
    finally:
        task.cancel()
        os.kill(pid, signal.SIGCONT)


def speed(runs: list[Measurement]) -> float:
    """Tokens per second after the first token."""
    return sum(run.decode_tokens for run in runs) / sum(run.decode_seconds for run in runs)


async def compare(endpoint: str, arguments: argparse.Namespace) -> bool:
    """Measure and print. True if no disturbance costs more than it may."""
    pid = find_speculator()
    prompts = [
        load_prompts(source)[i]
        for i in range(arguments.num_prompts // 3)
        for source in ("humaneval", "gsm8k", "mtbench")
    ]
    runs: dict[str, list[Measurement]] = defaultdict(list)
    off, ssd = (Setting(mode=mode, temperature=0.0, lookahead=arguments.lookahead) for mode in ("off", "ssd"))

    async with Client(endpoint) as client:

        async def run(name: str, setting: Setting, index: int) -> None:
            runs[name].append(await measure(client, prompts[index], setting, max_tokens=arguments.max_tokens, seed=1))

        await measure(client, prompts[0], ssd, max_tokens=16, seed=1)
        for index in range(len(prompts)):
            await run("off", off, index)
            await run("ssd", ssd, index)
            async with disturbed(pid, 0.09, 0.01):
                await run("ssd, speculator ten times slower", ssd, index)
            async with disturbed(pid, 2.0, 2.0):
                await run("ssd, speculator stopped for 2 s of every 4", ssd, index)
    for name, found in runs.items():
        same = sum(a.token_ids == b.token_ids for a, b in zip(found, runs["off"], strict=True))
        share = speed(found) / speed(runs["off"])
        print(f"{name}: {speed(found):.2f} tokens/s, {share:.3f} of off; {same} of {len(prompts)} texts as in off")
    return all(speed(found) >= LEAST_SHARE * speed(runs["off"]) for found in runs.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--up", action="append", default=[], metavar="ARGUMENT", help="further `specpool up` argument")
    parser.add_argument("--lookahead", type=int, default=4)
    parser.add_argument("--num-prompts", type=int, default=9)
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    up = (*recommended_arguments(), "--target", arguments.target, "--draft", arguments.draft, *arguments.up)
    with running_system(up) as endpoint:
        return 0 if asyncio.run(compare(endpoint, arguments)) else 1


if __name__ == "__main__":
    sys.exit(main())
