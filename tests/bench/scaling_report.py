"""The points that `scaling.py` measures: their figures, table, files and plot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from specpool.paths import write_atomically
from specpool_tools.bench.report import summarize
from specpool_tools.bench.requests import Measurement


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is measured."""

    mode: str
    """off, sd, ssd or ssd-own-k, with the fallback's name where it is not the default."""
    num_targets: int
    batch_size: int
    """Sequences per target."""


@dataclass(frozen=True, kw_only=True)
class Row(Point):
    """One measured point."""

    tokens_per_second: float
    """Of one sequence, mean."""
    total_tokens_per_second: float
    """Of all sequences, over `batch_seconds`."""
    tokens_per_round: float
    hit_rate: float
    full_hit_rate: float
    wait_share: float
    """Of the time of rounds."""
    rows_per_step: float
    """Rows of the speculator's steps."""
    draft_step_ms: float
    """Not stretched."""


def row_of(
    point: Point,
    batches: Sequence[Sequence[Measurement]],
    samples: Sequence[tuple[float, float]],
    *,
    stretch: float,
) -> Row:
    """The figures of a point, from its batches and from what `watch_speculator` saw."""
    found = [m for batch in batches for m in batch]
    (summary,) = summarize(found)
    return Row(
        **asdict(point),
        tokens_per_second=stretch * _mean([m.decode_tokens / m.decode_seconds for m in found]),
        total_tokens_per_second=stretch * sum(m.decode_tokens for m in found) / sum(map(batch_seconds, batches)),
        tokens_per_round=summary.tokens_per_round,
        hit_rate=summary.hit_rate,
        full_hit_rate=summary.full_hit_rate,
        wait_share=summary.waiting_ms / summary.round_ms,
        rows_per_step=_mean([rows for rows, _ in samples]),
        draft_step_ms=_mean([ms for _, ms in samples]) / stretch,
    )


def batch_seconds(batch: Sequence[Measurement]) -> float:
    """From the first token of any sequence to the last token of all; they arrived together."""
    return max(m.stats.seconds for m in batch) - min(m.stats.seconds_to_first_token for m in batch)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def show(rows: Sequence[Row], console: Console) -> None:
    """A table of all points."""
    table = Table(title="tokens/s, toys as if times were not stretched")
    names = ("targets", "batch", "mode", "tok/s per seq", "total", "tok/round")
    for name in (*names, "hit", "full", "wait", "rows", "step ms"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for r in rows:
        speeds = (f"{r.tokens_per_second:.2f}", f"{r.total_tokens_per_second:.1f}", f"{r.tokens_per_round:.2f}")
        rates = (f"{r.hit_rate:.3f}", f"{r.full_hit_rate:.3f}", f"{r.wait_share:.2f}")
        load = (f"{r.rows_per_step:.1f}", f"{r.draft_step_ms:.2f}")
        table.add_row(str(r.num_targets), str(r.batch_size), r.mode, *speeds, *rates, *load)
    console.print(table)


def save(rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    """The files that were asked for, with what there is so far."""
    if arguments.json:
        settings = {k: v for k, v in vars(arguments).items() if not isinstance(v, Path)}
        document = {"settings": settings, "points": [asdict(row) for row in rows]}
        write_atomically(arguments.json, json.dumps(document, indent=2) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot, by_targets=arguments.what == "targets")


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
    pyplot.close(figure)
