"""How a pool scales, on models that take given times: many targets on one speculator, and large batches on one target.

    python tests/bench/scaling.py targets --json targets.json --plot targets.png
    python tests/bench/scaling.py batch --json batch.json --plot batch.png

Everything but the models is real: router, streams, schedulers. The models sleep for the times of a 70B target on four
GPUs and a 1B draft on one, stretched by `--stretch` so that Python's own time does not matter; speeds are printed as if
they had not been stretched. The draft's logits are the target's with noise, at temperature 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from specpool.bench.report import summarize
from specpool.bench.requests import Measurement, Setting, measure
from specpool.bench.system import running_system
from specpool.client import Client
from specpool.models.prompts import Prompt

VERIFY_MS, VERIFY_ROW_MS = 18.3, 0.06
DRAFT_STEP_MS, DRAFT_ROW_MS = 2.0, 0.0033
NOISE = 0.4
"""At temperature 1 this accepts 0.85 of the draft tokens, and finds 0.97 of the others among three further ranks."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured point."""

    mode: str
    """off, sd or ssd, with the fallback's name where it is not the default."""
    num_targets: int
    batch_size: int
    """Sequences per target."""
    tokens_per_second: float
    """Of one sequence, mean."""
    total_tokens_per_second: float
    """Of all sequences."""
    tokens_per_round: float
    hit_rate: float
    full_hit_rate: float
    wait_share: float
    """Of the time of rounds."""
    rows_per_step: float
    """Rows of the speculator's steps."""
    draft_step_ms: float
    """Not stretched."""
    threshold: int
    """b* of the first target."""


def model(step_ms: float, row_ms: float, stretch: float, **options: object) -> str:
    """A toy model of these times."""
    fields = {"vocab": 64, "seed": 1, "step_ms": step_ms * stretch, "row_ms": row_ms * stretch, **options}
    return "toy#" + ",".join(f"{name}={value}" for name, value in fields.items())


async def watch_speculator(client: Client, samples: list[tuple[float, float]]) -> None:
    """Rows per step and milliseconds per step, twice a second."""
    while True:
        await asyncio.sleep(0.5)
        status = await client.cluster_status()
        samples += [(s.status.load.rows_per_step, s.status.load.step_ms) for s in status.speculators]


async def run_point(
    endpoint: str, setting: Setting, num_targets: int, batch_size: int, arguments: argparse.Namespace
) -> Row:
    """All sequences at once, as often as asked for."""
    samples: list[tuple[float, float]] = []
    found: list[Measurement] = []
    async with Client(endpoint) as client:
        watcher = asyncio.create_task(watch_speculator(client, samples))
        for repeat in range(arguments.repeats + 1):
            prompts = [
                Prompt(
                    id=f"{repeat}.{i}",
                    source="toy",
                    text="".join(LETTERS[(i * 7 + j * j + repeat) % 26] for j in range(9)),
                )
                for i in range(num_targets * batch_size)
            ]
            runs = await asyncio.gather(
                *(
                    measure(client, p, setting, max_tokens=arguments.max_tokens, seed=1 + index)
                    for index, p in enumerate(prompts)
                )
            )
            if repeat:  # the first lets the estimates settle
                found += runs
            else:
                samples.clear()
        watcher.cancel()
        status = await client.cluster_status()
    (summary,) = summarize(found)
    speeds = [m.decode_tokens / m.decode_seconds * arguments.stretch for m in found]
    return Row(
        mode=setting.mode,
        num_targets=num_targets,
        batch_size=batch_size,
        tokens_per_second=sum(speeds) / len(speeds),
        total_tokens_per_second=sum(speeds) / arguments.repeats,
        tokens_per_round=summary.tokens_per_round,
        hit_rate=summary.hit_rate,
        full_hit_rate=summary.full_hit_rate,
        wait_share=summary.waiting_ms / summary.round_ms,
        rows_per_step=_mean([rows for rows, _ in samples]),
        draft_step_ms=_mean([ms for _, ms in samples]) / arguments.stretch,
        threshold=status.targets[0].status.fallback_batch_size,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def system(arguments: argparse.Namespace, num_targets: int, fallback: str) -> AbstractContextManager[str]:
    """`specpool up` over models of the given times."""
    stretch = arguments.stretch
    up = ["--targets", str(num_targets), "--lookahead", str(arguments.lookahead)]
    up += ["--row-budget", str(arguments.row_budget), "--fan-out", str(arguments.fan_out)]
    up += ["--target", model(VERIFY_MS, VERIFY_ROW_MS, stretch)]
    up += ["--draft", model(DRAFT_STEP_MS, DRAFT_ROW_MS, stretch, noise=arguments.noise)]
    settings = {"SPECPOOL_TARGET_FALLBACK": fallback, "SPECPOOL_TARGET_MAX_BATCH_SIZE": "64"}
    settings |= {"SPECPOOL_TARGET_SPECULATION_DEADLINE_MS": "60000", "OMP_NUM_THREADS": "1"}
    return running_system(tuple(up), environment=settings)


def show(rows: Sequence[Row], console: Console) -> None:
    """A table of all points."""
    table = Table(title="tokens/s as if times were not stretched")
    for name in (
        "targets",
        "batch",
        "mode",
        "tok/s per seq",
        "total",
        "tok/round",
        "hit",
        "full",
        "wait",
        "rows",
        "step ms",
        "b*",
    ):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for r in rows:
        speeds = (f"{r.tokens_per_second:.1f}", f"{r.total_tokens_per_second:.0f}", f"{r.tokens_per_round:.2f}")
        rates = (f"{r.hit_rate:.3f}", f"{r.full_hit_rate:.3f}", f"{r.wait_share:.2f}")
        load = (f"{r.rows_per_step:.1f}", f"{r.draft_step_ms:.2f}", str(r.threshold))
        table.add_row(str(r.num_targets), str(r.batch_size), r.mode, *speeds, *rates, *load)
    console.print(table)


def plot(rows: Sequence[Row], path: Path, *, by_targets: bool) -> None:
    """Speed per target over targets, or the front of throughput and latency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for mode in dict.fromkeys(row.mode for row in rows):
        points = [row for row in rows if row.mode == mode]
        if by_targets:
            axes.plot([r.num_targets for r in points], [r.tokens_per_second for r in points], marker="o", label=mode)
        else:
            x, y = [r.tokens_per_second for r in points], [r.total_tokens_per_second for r in points]
            axes.plot(x, y, marker="o", label=mode)
            for row, at in zip(points, zip(x, y, strict=True), strict=True):
                axes.annotate(str(row.batch_size), at)
    if by_targets:
        axes.set(xlabel="targets on one speculator", ylabel="tokens/s of a sequence", ylim=(0, None))
    else:
        axes.set(xlabel="tokens/s of a sequence", ylabel="tokens/s of the target", title="numbers: batch size")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("targets", "batch"))
    parser.add_argument("--targets", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--fallbacks", nargs="+", default=["auto", "wait", "backup"], help="for ssd, with `batch`")
    parser.add_argument("--noise", type=float, default=NOISE, help="deviation of the draft's logits from the target's")
    parser.add_argument("--lookahead", type=int, default=6)
    parser.add_argument("--row-budget", type=int, default=32)
    parser.add_argument("--fan-out", type=int, default=16)
    parser.add_argument("--stretch", type=float, default=8.0)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    console, rows = Console(width=150), list[Row]()
    by_targets = arguments.what == "targets"
    settings = [Setting(mode=m, temperature=1.0, lookahead=arguments.lookahead) for m in ("off", "sd", "ssd")]
    points = [(n, 1) for n in arguments.targets] if by_targets else [(1, b) for b in arguments.batches]
    for fallback in ("auto",) if by_targets else arguments.fallbacks:
        for num_targets in dict.fromkeys(n for n, _ in points):
            with system(arguments, num_targets, fallback) as endpoint:
                for setting in settings if fallback == "auto" else settings[-1:]:
                    for batch_size in [b for n, b in points if n == num_targets]:
                        row = asyncio.run(run_point(endpoint, setting, num_targets, batch_size, arguments))
                        rows.append(row if fallback == "auto" else replace(row, mode=f"ssd, {fallback}"))
    show(rows, console)
    if arguments.json:
        document = {"settings": {k: v for k, v in vars(arguments).items() if not isinstance(v, Path)}}
        arguments.json.write_text(json.dumps(document | {"points": [asdict(row) for row in rows]}, indent=2) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot, by_targets=by_targets)


if __name__ == "__main__":
    main()
