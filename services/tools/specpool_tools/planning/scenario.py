"""What a planning simulation is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from specpool_target.config import Fallback

MODES = ("off", "sd", "ssd")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """What is simulated."""

    mode: str
    """off, sd or ssd."""
    num_targets: int = 1
    """On one speculator."""
    batch_size: int = 1
    """Sequences per target."""
    fallback: Fallback = "auto"
    """After a miss, in mode ssd."""
    seconds: float = 20.0
    """Simulated."""
    seed: int = 1


@dataclass(slots=True)
class Figures:
    """What came out."""

    tokens_per_second: float = 0.0
    """Of one sequence, mean."""
    tokens_per_round: float = 0.0
    hit_rate: float = 0.0
    """Full and partial hits over lookups."""
    full_hit_rate: float = 0.0
    wait_rate: float = 0.0
    """Of the misses, waits for a just-in-time speculation."""
    rows_per_step: float = 0.0
    utilisation: float = 0.0
    """Share of the time that the speculator computes."""
