"""What a bench run measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MODES = ("off", "sd", "ssd")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Settings of one bench run."""

    target: str
    """Model reference of the target."""
    draft: str
    """Model reference of the draft."""
    up_arguments: tuple[str, ...] = ()
    """Further arguments for `specpool up`, such as `--dtype bfloat16`."""
    affinity: str = ""
    """Cores per role for the main layout, as `specpool up --affinity` takes them."""
    shared_affinity: str = ""
    """A second layout, measured for `off` and `sd` only: what plain decoding gets from all the cores. Empty: none."""
    modes: tuple[str, ...] = MODES
    sources: tuple[str, ...] = ("humaneval", "gsm8k", "mtbench")
    num_prompts: int = 18
    """Prompts measured, taken from the sources in turn."""
    num_tuning_prompts: int = 6
    """Other prompts, on which each mode's lookahead is chosen."""
    max_tokens: int = 64
    num_tuning_tokens: int = 32
    temperatures: tuple[float, ...] = (0.0, 1.0)
    verification: str = "coupled"
    lookaheads: tuple[int, ...] = (1, 2, 3, 4)
    """Candidates for lookahead K. One value: no tuning."""
    seed: int = 1
    endpoint: str = ""
    """Bench what already runs there instead of starting a system."""
    json_path: Path | None = None
    plot_directory: Path | None = None
    ready_timeout_s: float = 900.0
