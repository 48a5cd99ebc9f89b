"""What an engine thread does, and since when: tells one that works from one that hangs."""

from __future__ import annotations

import time
from typing import Final

IDLE: Final = "waiting for work"
"""What an engine does that waits, the only thing that it may do for as long as it likes."""
WARMING_UP: Final = "warming up"


class Heartbeat:
    """Shows whether a thread gets on. Written by the engine thread, read by any other."""

    __slots__ = ("doing", "num_steps", "since_s")

    def __init__(self) -> None:
        self.doing = WARMING_UP
        """What the thread does now."""
        self.since_s = time.monotonic()
        """Time (`monotonic`) at which it began that."""
        self.num_steps = 0
        """Steps that ended so far."""

    def begin(self, doing: str) -> None:
        """Note what the thread does from now on."""
        self.since_s = time.monotonic()
        self.doing = doing

    @property
    def age_s(self) -> float:
        """Seconds without progress; 0 for a thread that waits for work."""
        return 0.0 if self.doing is IDLE else time.monotonic() - self.since_s
