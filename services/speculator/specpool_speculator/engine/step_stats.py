"""What a speculator's engine measures each step: plain numbers, known to no exporter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class DraftStepStats:
    """One step of a speculator engine, all sequences together."""

    num_rows: int = 0
    """Rows of the forward."""
    num_sequences: int = 0
    """Sequences held."""
    num_targets: int = 0
    """Targets connected."""
    kv_cache_usage: float = 0.0
    """Share of KV blocks in use, 0 to 1."""
    forward_s: float = 0.0
    """Seconds of the model's forward."""
    step_s: float = 0.0
    """Seconds of the whole step."""
    num_draft_tokens: int = 0
    """Number of tokens drafted."""
    num_table_entries: int = 0
    """Number of table entries pushed."""
    num_dropped_branches: int = 0
    """Branches that an outcome ruled out before they were used."""
    num_stale_messages: int = 0
    """Messages about an incarnation, sequence or round that has passed."""
    num_prefix_queried_tokens: int = 0
    """Tokens of sequences that came, looked up in the prefix cache."""
    num_prefix_hit_tokens: int = 0
    """Tokens of these that the prefix cache had."""


@dataclass(slots=True)
class DraftCounters:
    """Totals of a speculator since the start."""

    num_steps: int = 0
    num_draft_tokens: int = 0
    num_stale: int = 0
    num_resyncs: int = 0
    num_table_entries: int = 0
    num_dropped_branches: int = 0
    num_prefix_queried_tokens: int = 0
    num_prefix_hit_tokens: int = 0

    def opened(self, num_tokens: int, num_cached: int) -> None:
        """Count a sequence that came with `num_tokens` tokens, `num_cached` of them in the prefix cache."""
        self.num_prefix_queried_tokens += num_tokens
        self.num_prefix_hit_tokens += num_cached
