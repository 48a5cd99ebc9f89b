"""Plots of a bench run, written as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specpool_tools.bench.report import Summary

PHASES = ("waiting_ms", "forward_ms", "verify_ms", "other_ms")


def write_plots(summaries: Sequence[Summary], directory: Path) -> list[Path]:
    """Write every plot into `directory` and return the files. Needs matplotlib (extra `bench`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    drawings = {"speed": _speed, "round": _round, "hit_rate_by_position": _hits_at, "hit_rate_by_fan_out": _hits_by}
    paths = []
    for name, draw in drawings.items():
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        draw(axes, summaries)
        path = directory / f"{name}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        paths.append(path)
    return paths


def _label(summary: Summary) -> str:
    lookahead = f" K={summary.setting.lookahead or 'planned'}" if summary.setting.mode != "off" else ""
    return f"{summary.setting.mode}{lookahead}\nT={summary.setting.temperature:g}\n{summary.setting.layout}"


def _speed(axes: Any, summaries: Sequence[Summary]) -> None:
    bars = axes.bar([_label(s) for s in summaries], [s.tokens_per_second for s in summaries])
    axes.bar_label(bars, [f"{s.ratios['off']:.2f}x" if "off" in s.ratios else "" for s in summaries])
    axes.set(ylabel="tokens/s", title="Decode speed, and its ratio to mode off")


def _round(axes: Any, summaries: Sequence[Summary]) -> None:
    bottom = [0.0] * len(summaries)
    for phase in PHASES:
        values = [getattr(s, phase) for s in summaries]
        axes.bar([_label(s) for s in summaries], values, bottom=bottom, label=phase.removesuffix("_ms"))
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.legend()
    axes.set(ylabel="ms", title="Mean round")


def _hits_at(axes: Any, summaries: Sequence[Summary]) -> None:
    for s in (s for s in summaries if s.hit_rate_by_position):
        axes.plot(s.hit_rate_by_position, marker="o", label=_label(s).replace("\n", ", "))
    axes.legend()
    axes.set(xlabel="accepted draft tokens k", ylabel="hit rate", ylim=(0, 1.02), title="Hit rate by position")


def _hits_by(axes: Any, summaries: Sequence[Summary]) -> None:
    for s in (s for s in summaries if s.hit_rate_by_fan_out):
        fan_outs = range(1, len(s.hit_rate_by_fan_out) + 1)
        axes.plot(fan_outs, s.hit_rate_by_fan_out, marker="o", label=_label(s).replace("\n", ", "))
    axes.legend()
    axes.set(xlabel="guesses per position F", ylabel="hit rate", ylim=(0, 1.02), title="Hit rate by fan-out")
