"""Two targets on one speculator, each generating at the same time: both speeds, and whether any output changed.

    python tests/bench/two_targets.py --num-pairs 4 --max-tokens 64

Every pair of prompts runs as `off` and as `ssd`, both prompts at once, one per target; then each prompt runs as `ssd`
with the other target idle. In float32 all three outputs must be equal, and the exit status says so.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence

from specpool.client import Client
from specpool_tools.bench.machine import recommended_arguments
from specpool_tools.bench.requests import Measurement, Setting, measure
from specpool_tools.bench.system import running_system
from specpool_tools.models.prompts import Prompt, load_prompts


async def both(
    client: Client, pair: Sequence[Prompt], setting: Setting, max_tokens: int
) -> tuple[list[Measurement], bool]:
    """Both prompts at once; and whether each target was seen to run one of them."""
    running = [asyncio.create_task(measure(client, prompt, setting, max_tokens=max_tokens, seed=1)) for prompt in pair]
    spread = False
    while not all(task.done() for task in running):
        await asyncio.sleep(0.5)
        status = await client.cluster_status()
        spread |= [target.status.load.num_sequences_running for target in status.targets] == [1, 1]
    return [await task for task in running], spread


async def compare(endpoint: str, pairs: Sequence[Sequence[Prompt]], lookahead: int, max_tokens: int) -> bool:
    """Run everything and print it. True if no output differs."""
    settings = [Setting(mode=mode, temperature=0.0, lookahead=lookahead) for mode in ("off", "ssd")]
    speeds: dict[str, list[list[float]]] = {"off": [[], []], "ssd": [[], []], "ssd alone": [[], []]}
    num_equal = num_alone_equal = num_spread = 0
    async with Client(endpoint) as client:
        for pair in pairs:
            (off, _), (ssd, spread) = [await both(client, pair, setting, max_tokens) for setting in settings]
            alone = [await measure(client, prompt, settings[1], max_tokens=max_tokens, seed=1) for prompt in pair]
            for label, runs in (("off", off), ("ssd", ssd), ("ssd alone", alone)):
                for index, run in enumerate(runs):
                    speeds[label][index].append(run.decode_tokens / run.decode_seconds)
            num_equal += sum(a.token_ids == b.token_ids for a, b in zip(off, ssd, strict=True))
            num_alone_equal += sum(a.token_ids == b.token_ids for a, b in zip(ssd, alone, strict=True))
            num_spread += spread
    for label, (first, second) in speeds.items():
        print(f"{label}: {statistics.mean(first):.2f} and {statistics.mean(second):.2f} tokens/s")
    num_prompts = 2 * len(pairs)
    print(f"one sequence on each target at once in {num_spread} of {len(pairs)} pairs")
    print(f"ssd equal to off: {num_equal} of {num_prompts} outputs")
    print(f"two at once equal to one alone: {num_alone_equal} of {num_prompts} outputs")
    return num_equal == num_alone_equal == num_prompts and num_spread == len(pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--affinity", default="target-0=0;target-1=0;speculator=1")
    parser.add_argument(
        "--up",
        action="append",
        default=[],
        metavar="ARGUMENT",
        help="further `specpool up` argument: --up=--dtype --up=float32",
    )
    parser.add_argument("--lookahead", type=int, default=3)
    parser.add_argument("--num-pairs", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    first, second = (list(load_prompts(source))[: arguments.num_pairs] for source in ("humaneval", "gsm8k"))
    pairs = list(zip(first, second, strict=True))
    up = ("--target", arguments.target, "--draft", arguments.draft, "--targets", "2", *recommended_arguments())
    with running_system((*up, "--affinity", arguments.affinity, *arguments.up)) as endpoint:
        unchanged = asyncio.run(compare(endpoint, pairs, arguments.lookahead, arguments.max_tokens))
    return 0 if unchanged else 1


if __name__ == "__main__":
    sys.exit(main())
