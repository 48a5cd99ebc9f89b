"""Pauses between tries that may go on failing."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class Backoff:
    """Pauses that double from `first_s` up to `longest_s`, each a little shorter at random.

    Whoever lost the same peer would otherwise come back to it in the same moment, again and again.
    """

    first_s: float
    """Seconds of the first pause, and of the first after a `reset`."""
    longest_s: float
    """Seconds that no pause exceeds."""
    jitter: float = 0.2
    """Largest share of a pause that chance leaves out, 0 to 1."""
    _upcoming_s: float = field(init=False, default=0.0)

    def next_s(self) -> float:
        """Seconds to wait now; the pause after it is twice as long."""
        pause_s = self._upcoming_s or self.first_s
        self._upcoming_s = min(2 * pause_s, self.longest_s)
        return min(pause_s, self.longest_s) * (1 - self.jitter * random.random())

    def reset(self) -> None:
        """Note a success: the next pause is the first one again."""
        self._upcoming_s = 0.0
