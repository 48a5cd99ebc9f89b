"""Numbers of one sequence and of one step of the engine: plain, known to no exporter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from specpool.algorithm.speculation_cache import LookupKind
from specpool.v1 import types_pb2


@dataclass(slots=True)
class Phases:
    """Seconds of rounds by phase; `other` is what is left of the total."""

    total: float = 0.0
    waiting: float = 0.0
    forward: float = 0.0
    verify: float = 0.0

    def parts(self) -> dict[str, float]:
        """Seconds of each phase by its name, without the total."""
        return {"waiting": self.waiting, "forward": self.forward, "verify": self.verify}


@dataclass(slots=True)
class SequenceStats:
    """Counts of one sequence; the fields have the meaning of the message `GenerationStats`."""

    num_hits: int = 0
    num_partial: int = 0
    num_misses: int = 0
    num_late: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_rounds: int = 0
    num_backup_rounds: int = 0
    num_tail_tokens: int = 0
    num_accepted_tail_tokens: int = 0
    num_sample_and_match_rounds: int = 0
    phases: Phases = field(default_factory=Phases)
    hit_phases: Phases = field(default_factory=Phases)
    accepted_histogram: list[int] = field(default_factory=list)
    lookups_by_position: list[int] = field(default_factory=list)
    hits_by_position: list[int] = field(default_factory=list)
    hits_by_rank: list[int] = field(default_factory=list)

    def lookup(self, kind: LookupKind, num_accepted: int, rank: int | None) -> None:
        """Count a lookup of an outcome; `rank` is that of the bonus token among the guesses of its position."""
        found = kind in (LookupKind.HIT, LookupKind.PARTIAL)
        self.num_hits += kind is LookupKind.HIT
        self.num_partial += kind is LookupKind.PARTIAL
        self.num_misses += not found
        self.num_late += kind is LookupKind.LATE
        count(self.lookups_by_position, num_accepted)
        if found:
            count(self.hits_by_position, num_accepted)
        if found and rank is not None:
            count(self.hits_by_rank, rank)

    def round(self, num_draft: int, num_accepted: int, phases: Phases, *, is_hit: bool) -> None:
        """Count a verification after the prefill."""
        self.num_rounds += 1
        self.num_draft_tokens += num_draft
        self.num_accepted_tokens += num_accepted
        count(self.accepted_histogram, num_accepted)
        for total in (self.phases, self.hit_phases) if is_hit else (self.phases,):
            total.total += phases.total
            total.waiting += phases.waiting
            total.forward += phases.forward
            total.verify += phases.verify

    def to_proto(self, *, seconds_to_first_token: float, seconds: float) -> types_pb2.GenerationStats:
        """The message for the client, sent in `GenerationFinished`."""
        phases = self.phases
        return types_pb2.GenerationStats(
            num_rounds=self.num_rounds,
            num_hits=self.num_hits,
            num_partial=self.num_partial,
            num_misses=self.num_misses,
            num_late=self.num_late,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            num_backup_rounds=self.num_backup_rounds,
            num_tail_tokens=self.num_tail_tokens,
            num_accepted_tail_tokens=self.num_accepted_tail_tokens,
            num_sample_and_match_rounds=self.num_sample_and_match_rounds,
            seconds_to_first_token=seconds_to_first_token,
            seconds=seconds,
            seconds_waiting=phases.waiting,
            seconds_forward=phases.forward,
            seconds_verify=phases.verify,
            seconds_other=max(0.0, phases.total - phases.waiting - phases.forward - phases.verify),
            accepted_histogram=self.accepted_histogram,
            lookups_by_position=self.lookups_by_position,
            hits_by_position=self.hits_by_position,
            hits_by_rank=self.hits_by_rank,
            seconds_hit_rounds=self.hit_phases.total,
            seconds_hit_rounds_forward=self.hit_phases.forward,
        )


def count(histogram: list[int], index: int) -> None:
    """Add one at `index`, making room for it."""
    histogram.extend([0] * (index + 1 - len(histogram)))
    histogram[index] += 1


@dataclass(kw_only=True, slots=True)
class StepStats:
    """One step of a target engine, all sequences together."""

    num_running: int = 0
    """Sequences in the batch."""
    num_waiting: int = 0
    """Sequences not admitted yet, or preempted."""
    kv_cache_usage: float = 0.0
    """Share of KV blocks in use, 0 to 1."""
    waiting_s: float = 0.0
    """Seconds in which nothing was computed: all of the batch waited for speculations, or rounds for distributions.
    What one sequence waits while others are computed is no time of a step."""
    forward_s: float = 0.0
    """Seconds of the model's forward."""
    verify_s: float = 0.0
    """Seconds of sampling and verification."""
    other_s: float = 0.0
    """Seconds of everything else."""
    num_drafts: int = 0
    """Sequences verified with at least one draft token."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_hits: int = 0
    """Lookups that found the full lookahead, or a draft up to a token that ends the output."""
    num_partial: int = 0
    """Lookups that found fewer tokens than the lookahead, at least one."""
    num_late: int = 0
    """Lookups that found the outcome without a single token yet."""
    num_misses: int = 0
    """Lookups that did not find the outcome (late ones not counted)."""
    num_prompt_tokens: int = 0
    """Prompt tokens prefilled."""
    num_generation_tokens: int = 0
    """Tokens committed."""
    num_preemptions: int = 0
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    """Rounds that fell back, by reason (see `specpool_target.metrics.FALLBACK_REASONS`)."""
