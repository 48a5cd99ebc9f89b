"""What a planning simulation is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from specpool_target.config import Fallback

MODES = ("off", "sd", "ssd")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """What a planning simulation is asked."""

    mode: str
    """Mode of all sequences: off, sd or ssd."""
    num_targets: int = 1
    """Number of targets on one speculator."""
    batch_size: int = 1
    """Number of sequences per target."""
    fallback: Fallback = "auto"
    """What is done after a miss, in mode ssd."""
    seconds: float = 12.0
    """Seconds of virtual time that are simulated."""
    seed: int = 1


@dataclass(slots=True)
class Figures:
    """What a planning simulation answers."""

    tokens_per_second: float = 0.0
    """Tokens per second of one sequence, on average."""
    relative_error: float = 0.0
    """Standard error of the speed over the speed: what another seed's text would change, in two cases of three."""
    tokens_per_round: float = 0.0
    hit_rate: float = 0.0
    """Full and partial hits over lookups, 0 to 1."""
    full_hit_rate: float = 0.0
    wait_rate: float = 0.0
    """Share of the misses after which a just-in-time speculation was waited for."""
    rows_per_step: float = 0.0
    utilisation: float = 0.0
    """Share of the time in which the speculator computes, 0 to 1."""
