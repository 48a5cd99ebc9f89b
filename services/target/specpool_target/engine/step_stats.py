"""What a target's engine measures each step: plain numbers, known to no exporter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
