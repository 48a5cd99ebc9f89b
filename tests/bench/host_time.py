"""What the host's own time costs at a GPU's pace: the same pool at true times and with all times stretched.

    python tests/bench/host_time.py --json host_time.json
    python tests/bench/host_time.py --before OTHER_TREE --points 1x1 1x8 1x32 --modes ssd

Router, target, speculator and client are the real ones, in processes of their own; the models are timed ones: they take
the times of a 70B target on four GPUs and a 1B draft on one, leave the interpreter to others meanwhile, and have the
logits of toys. A stretched run takes all times `--stretch` times as long, so that the host's own time vanishes in them:
what it reaches is what the policy could do. `share` is the speed at true times over that. The texts are the same.
`direct` is at true times, too, with requests that go to the targets themselves.

Points are TARGETSxSEQUENCES: so many targets on one speculator, with so many sequences each. `--before` measures
another tree's services at true times in turn with this one's, batch by batch, while the others are idle. Processor
time is in milliseconds per round of a sequence, of all processes of a kind together. The JSON file is written after
every point, and a stretched point that the file of `--stretched-from` has is not measured again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from direct_client import DirectClient
from process_times import CLIENT, ROLES, processor_seconds
from rich.console import Console
from rich.table import Table
from scaling import (
    DRAFT_ROW_MS,
    DRAFT_STEP_MS,
    NOISE,
    VERIFY_MS,
    VERIFY_ROW_MS,
    model,
    run_batch,
    speculator_steps,
    watch_speculator,
)
from scaling_report import Point, Row, row_of

from specpool.client import Client
from specpool.paths import write_atomically
from specpool_tools.bench.options import MODES
from specpool_tools.bench.requests import Measurement, Setting
from specpool_tools.bench.system import running_system
from specpool_tools.models.prompts import Prompt

NOW, BEFORE, STRETCHED, DIRECT = "now", "before", "stretched", "direct"
LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"
LOOKAHEAD: Final = 6
SERVICES: Final = ("core", "engine", "target", "speculator", "router", "tools")


@dataclass(frozen=True, kw_only=True)
class HostRow(Row):
    """One measured point of one way to run."""

    run: str
    """now, direct, before or stretched."""
    processor_ms: dict[str, float] = field(default_factory=dict)
    """Processor time per round of a sequence, by kind of process."""
    router_ms_per_token: float = 0.0
    """Processor time of the router per token."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way to run the pool."""

    name: str
    stretch: float = 1.0
    tree: Path | None = None
    """Root of another tree whose services are started; None: this one's."""

    def system(self, num_targets: int, batch_size: int, arguments: argparse.Namespace) -> AbstractContextManager[str]:
        """A pool of timed models, with batches that take all sequences and no deadline that matters."""
        flags = ["--target", model(VERIFY_MS, VERIFY_ROW_MS, self.stretch)]
        flags += ["--draft", model(DRAFT_STEP_MS, DRAFT_ROW_MS, self.stretch, noise=NOISE)]
        flags += ["--lookahead", str(LOOKAHEAD), "--row-budget", "32", "--fan-out", "16"]
        if arguments.affinity and num_targets == 1:
            flags += ["--affinity", arguments.affinity]
        settings = {"OMP_NUM_THREADS": "1", "SPECPOOL_TARGET_MAX_BATCH_SIZE": str(max(64, batch_size))}
        settings["SPECPOOL_TARGET_SPECULATION_DEADLINE_MS"] = "60000"
        if self.tree is not None:
            settings["PYTHONPATH"] = os.pathsep.join(str(self.tree / "services" / name) for name in SERVICES)
        return running_system((*flags, "--targets", str(num_targets)), environment=settings)


def prompts_for(count: int) -> list[Prompt]:
    """Different ones, so that sequences do not share what is drafted for them."""
    texts = ["".join(LETTERS[(i * 7 + j * j) % 26] for j in range(9)) for i in range(count)]
    return [Prompt(id=str(i), source="toy", text=text) for i, text in enumerate(texts)]


def measure_points(arguments: argparse.Namespace, known: Sequence[HostRow]) -> Iterator[HostRow]:
    """All points; the pools of one number of targets stay up for all of them."""
    runs = [Run(name=NOW)]
    if arguments.before:
        runs.insert(0, Run(name=BEFORE, tree=arguments.before.resolve()))
    done = {(row.num_targets, row.batch_size, row.mode): row for row in known}
    for num_targets in dict.fromkeys(targets for targets, _ in arguments.points):
        sizes = [size for targets, size in arguments.points if targets == num_targets]
        points = [Point(mode=m, num_targets=num_targets, batch_size=s) for s in sizes for m in arguments.modes]
        keys = [(point.num_targets, point.batch_size, point.mode) for point in points]
        yield from (done[key] for key in keys if key in done)
        missing = [point for point, key in zip(points, keys, strict=True) if key not in done]
        for together, wanted in (([Run(name=STRETCHED, stretch=arguments.stretch)], missing), (runs, points)):
            with ExitStack() as stack:
                pools = [
                    (run, stack.enter_context(run.system(num_targets, max(sizes), arguments)))
                    for run in together
                    if wanted
                ]
                if arguments.direct and together is runs:
                    pools.append((Run(name=DIRECT), pools[-1][1]))
                for point in wanted:
                    yield from asyncio.run(measure_point(point, pools, arguments))


async def measure_point(point: Point, pools: Sequence[tuple[Run, str]], arguments: argparse.Namespace) -> list[HostRow]:
    """A warm-up with other seeds, then the batch as often as asked for; plain decoding is always the same: twice.

    The pools take turns, batch by batch, and the order turns, too: what else runs on the machine hits all alike.
    """
    prompts = prompts_for(point.num_targets * point.batch_size)
    setting = Setting(mode=point.mode, temperature=1.0, lookahead=LOOKAHEAD)
    repeats = min(2, arguments.repeats) if point.mode == "off" else arguments.repeats
    measured = [_Measured(run=run) for run, _ in pools]
    async with AsyncExitStack() as stack:
        for each, (run, endpoint) in zip(measured, pools, strict=True):
            each.client = await stack.enter_async_context(await client_of(endpoint, run))
            await run_batch(each.client, setting, prompts, max_tokens=arguments.max_tokens, first_seed=0)
        for n in range(1, repeats + 1):
            for each in measured if n % 2 else reversed(measured):
                assert each.client is not None
                watcher = asyncio.create_task(watch_speculator(each.client, each.samples))
                before = processor_seconds()
                seed = n * len(prompts)
                each.batches.append(
                    await run_batch(each.client, setting, prompts, max_tokens=arguments.max_tokens, first_seed=seed)
                )
                used = processor_seconds()
                used.subtract(before)
                each.used.update(used)
                watcher.cancel()
                if not each.samples:  # too short a batch
                    each.samples += await speculator_steps(each.client)
    return [each.row(point) for each in measured]


@dataclass(kw_only=True)
class _Measured:
    """What was seen of one pool at one point."""

    run: Run
    client: Client | None = None
    batches: list[list[Measurement]] = field(default_factory=list)
    samples: list[tuple[float, float]] = field(default_factory=list)
    used: Counter[str] = field(default_factory=Counter)
    """Processor time in seconds by kind of process, during this pool's batches."""

    def row(self, point: Point) -> HostRow:
        """The point, measured."""
        found = [m for batch in self.batches for m in batch]
        num_rounds, num_tokens = sum(m.stats.num_rounds for m in found), sum(len(m.token_ids) for m in found)
        return HostRow(
            **asdict(row_of(point, self.batches, self.samples, stretch=self.run.stretch)),
            run=self.run.name,
            processor_ms={kind: self.used[kind] * 1e3 / num_rounds for kind in (*ROLES, CLIENT)},
            router_ms_per_token=self.used["router"] * 1e3 / num_tokens,
        )


async def client_of(endpoint: str, run: Run) -> Client:
    """Of the router, or of the targets behind it."""
    if run.name != DIRECT:
        return Client(endpoint)
    async with Client(endpoint) as asking:
        return DirectClient(endpoint, await asking.cluster_status())


def show(rows: Sequence[HostRow], console: Console) -> None:
    """A table of all points; each share is that of the stretched run of the same point."""
    table = Table(title="tokens/s of a sequence; processor time in ms per round of a sequence")
    for name in ("targets", "sequences", "mode", "run", "tok/s", "share", "hit", "full", "step ms", "tok/round"):
        table.add_column(name, justify="left" if name in ("mode", "run") else "right")
    for name in (*ROLES, CLIENT, "router/token"):
        table.add_column(name, justify="right")
    best = {(r.num_targets, r.batch_size, r.mode): r.tokens_per_second for r in rows if r.run == STRETCHED}
    for r in rows:
        reference = best.get((r.num_targets, r.batch_size, r.mode))
        share = "" if reference is None or r.run == STRETCHED else f"{r.tokens_per_second / reference:.3f}"
        times = [f"{r.processor_ms[kind]:.3f}" for kind in (*ROLES, CLIENT)] + [f"{r.router_ms_per_token:.3f}"]
        rates = (f"{r.hit_rate:.3f}", f"{r.full_hit_rate:.3f}", f"{r.draft_step_ms:.2f}", f"{r.tokens_per_round:.2f}")
        cells = (str(r.num_targets), str(r.batch_size), r.mode, r.run, f"{r.tokens_per_second:.1f}", share)
        table.add_row(*cells, *rates, *times)
    console.print(table)


def parse_point(text: str) -> tuple[int, int]:
    """TARGETSxSEQUENCES."""
    targets, separator, size = text.partition("x")
    if not separator or not targets.isdecimal() or not size.isdecimal() or int(targets) < 1 or int(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not TARGETSxSEQUENCES, such as 4x1")
    return int(targets), int(size)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    points = [(1, 1), (1, 8), (1, 32), (4, 1), (8, 1)]
    parser.add_argument("--points", nargs="+", type=parse_point, default=points, metavar="TARGETSxSEQUENCES")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--stretch", type=float, default=16.0)
    parser.add_argument("--before", type=Path, metavar="TREE", help="root of another tree to measure in turn")
    parser.add_argument("--direct", action="store_true", help="measure without the router, too")
    parser.add_argument("--repeats", type=int, default=4, help="batches per point, after the warm-up")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--affinity", default="", help="with one target, as `specpool up` takes it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stretched-from", type=Path, help="JSON file of an earlier run")
    return parser.parse_args()


def stretched_rows(path: Path | None) -> list[HostRow]:
    """The stretched points of an earlier run."""
    if path is None:
        return []
    rows = [HostRow(**point) for point in json.loads(path.read_text())["points"]]
    return [row for row in rows if row.run == STRETCHED]


def main() -> None:
    arguments = parse_arguments()
    console, rows = Console(width=180), list[HostRow]()
    for row in measure_points(arguments, stretched_rows(arguments.stretched_from)):
        rows.append(row)
        if arguments.json:
            settings = {k: v for k, v in vars(arguments).items() if not isinstance(v, Path)}
            document = {"settings": settings, "points": [asdict(one) for one in rows]}
            write_atomically(arguments.json, json.dumps(document, indent=2) + "\n")
        console.print(f"{row.num_targets}x{row.batch_size} {row.mode} {row.run}: {row.tokens_per_second:.1f} tokens/s")
    show(rows, console)


if __name__ == "__main__":
    main()
