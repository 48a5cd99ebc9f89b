"""Sums measurements up per setting, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate

from rich.table import Table

from specpool_tools.bench.requests import Measurement, Setting


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All measurements of one setting together."""

    setting: Setting
    num_prompts: int
    tokens_per_second: float
    """Decode tokens over decode seconds, the prefill left out."""
    tokens_per_second_by_source: dict[str, float]
    tokens_per_round: float
    """Accepted length: tokens that one verification yields, the bonus included."""
    acceptance_rate: float
    """Accepted draft tokens over draft tokens sent to verification."""
    hit_rate: float
    """Share of the rounds of mode ssd whose outcome was in the table with at least one token."""
    full_hit_rate: float
    late_rate: float
    hit_rate_by_position: list[float]
    hit_rate_by_fan_out: list[float]
    round_ms: float
    waiting_ms: float
    forward_ms: float
    verify_ms: float
    other_ms: float
    hit_overhead: float
    """Share of a round that is not the forward, (round - forward) / round, over rounds that were hits."""
    same_as_off: float
    """Share of the prompts whose token ids equal those of mode off."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Tokens per second over those of each other mode of the same temperature and layout."""

    def to_dict(self) -> dict[str, object]:
        """The summary as JSON can hold it."""
        return asdict(self)


def summarize(measurements: Sequence[Measurement]) -> list[Summary]:
    """One summary per setting, in the order in which the settings first appear."""
    settings = list(dict.fromkeys(m.setting for m in measurements))
    reference = {(m.setting.temperature, m.prompt_id): m.token_ids for m in measurements if m.setting.mode == "off"}
    summaries = [_summarize_one(s, [m for m in measurements if m.setting == s], reference) for s in settings]
    return [_with_ratios(summary, summaries) for summary in summaries]


def _summarize_one(
    setting: Setting, group: Sequence[Measurement], reference: dict[tuple[float, str], tuple[int, ...]]
) -> Summary:
    rounds = max(sum(m.stats.num_rounds for m in group), 1)

    def per_round_ms(name: str) -> float:
        return 1000 * sum(float(getattr(m.stats, name)) for m in group) / rounds

    phases = {phase: per_round_ms(f"seconds_{phase}") for phase in ("waiting", "forward", "verify", "other")}
    hit_seconds = sum(m.stats.seconds_hit_rounds for m in group)
    hit_forward = sum(m.stats.seconds_hit_rounds_forward for m in group)
    hits, partial = sum(m.stats.num_hits for m in group), sum(m.stats.num_partial for m in group)
    lookups = _add(m.stats.lookups_by_position for m in group)
    hits_at = _add(m.stats.hits_by_position for m in group)
    return Summary(
        setting=setting,
        num_prompts=len(group),
        tokens_per_second=_speed(group),
        tokens_per_second_by_source={
            source: _speed([m for m in group if m.source == source]) for source in sorted({m.source for m in group})
        },
        tokens_per_round=sum(m.decode_tokens for m in group) / rounds,
        acceptance_rate=sum(m.stats.num_accepted_tokens for m in group)
        / max(sum(m.stats.num_draft_tokens for m in group), 1),
        hit_rate=(hits + partial) / rounds,
        full_hit_rate=hits / rounds,
        late_rate=sum(m.stats.num_late for m in group) / rounds,
        hit_rate_by_position=[hit / max(count, 1) for hit, count in zip(hits_at, lookups, strict=False)],
        hit_rate_by_fan_out=[hit / rounds for hit in accumulate(_add(m.stats.hits_by_rank for m in group))],
        round_ms=sum(phases.values()),
        waiting_ms=phases["waiting"],
        forward_ms=phases["forward"],
        verify_ms=phases["verify"],
        other_ms=phases["other"],
        hit_overhead=1 - hit_forward / hit_seconds if hit_seconds else 0.0,
        same_as_off=_mean(
            m.token_ids == reference[setting.temperature, m.prompt_id]
            for m in group
            if (setting.temperature, m.prompt_id) in reference
        ),
    )


def _with_ratios(summary: Summary, summaries: Iterable[Summary]) -> Summary:
    ratios = {
        other.setting.mode: summary.tokens_per_second / other.tokens_per_second
        for other in summaries
        if other.setting.temperature == summary.setting.temperature
        and other.setting.layout == summary.setting.layout
        and other.setting.mode != summary.setting.mode
        and other.tokens_per_second
    }
    return Summary(**{**summary.__dict__, "ratios": ratios})


def _speed(group: Sequence[Measurement]) -> float:
    seconds = sum(m.decode_seconds for m in group)
    return sum(m.decode_tokens for m in group) / seconds if seconds > 0 else 0.0


def _add(rows: Iterable[Sequence[int]]) -> list[int]:
    total: list[int] = []
    for row in rows:
        total.extend([0] * (len(row) - len(total)))
        for index, value in enumerate(row):
            total[index] += value
    return total


def _mean(values: Iterable[bool]) -> float:
    taken = list(values)
    return sum(taken) / len(taken) if taken else float("nan")


def speed_table(summaries: Sequence[Summary]) -> Table:
    """A table of speeds and what explains them."""
    table = Table(title="tokens/s after the first token; ratios within one temperature and layout")
    for heading in (
        "T",
        "layout",
        "mode",
        "K",
        "tok/s",
        "vs off",
        "vs sd",
        "tok/round",
        "accept",
        "hit",
        "full",
        "= off",
    ):
        table.add_column(heading, justify="left" if heading in ("layout", "mode") else "right")
    for s in summaries:
        ssd = s.setting.mode == "ssd"
        table.add_row(
            f"{s.setting.temperature:g}",
            s.setting.layout,
            s.setting.mode,
            str(s.setting.lookahead or "planned") if s.setting.mode != "off" else "",
            f"{s.tokens_per_second:.2f}",
            _ratio(s, "off"),
            _ratio(s, "sd"),
            f"{s.tokens_per_round:.2f}",
            f"{s.acceptance_rate:.3f}" if s.setting.mode != "off" else "",
            f"{s.hit_rate:.3f}" if ssd else "",
            f"{s.full_hit_rate:.3f}" if ssd else "",
            f"{s.same_as_off:.2f}",
        )
    return table


def round_table(summaries: Sequence[Summary]) -> Table:
    """A table of where the time of a round goes."""
    table = Table(title="mean round, ms")
    for heading in ("T", "layout", "mode", "round", "waiting", "forward", "verify", "other", "overhead on hits"):
        table.add_column(heading, justify="left" if heading in ("layout", "mode") else "right")
    for s in summaries:
        times = (s.round_ms, s.waiting_ms, s.forward_ms, s.verify_ms, s.other_ms)
        overhead = f"{100 * s.hit_overhead:.1f} %" if s.setting.mode == "ssd" else ""
        table.add_row(
            f"{s.setting.temperature:g}", s.setting.layout, s.setting.mode, *(f"{t:.1f}" for t in times), overhead
        )
    return table


def _ratio(summary: Summary, mode: str) -> str:
    return f"{summary.ratios[mode]:.2f}" if mode in summary.ratios else ""
