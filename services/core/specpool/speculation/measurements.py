"""What is known of a connected speculator without asking."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from specpool.algorithm.fallback import DraftTimes
from specpool.v1 import types_pb2


@dataclass(slots=True)
class Measurements:
    """Written by the pool's event loop, read by engines."""

    max_lookahead: int = 0
    """Agreed in the handshake."""
    draft_step_s: float = 0.0
    """From the last load report; 0: none yet."""
    round_trip_s: float = 0.0
    """Of the handshake."""
    last_push_s: float = 0.0
    """When the last table came, which is at the end of a draft step (`perf_counter`)."""
    num_received: int = 0
    """Messages of its engine so far: tells a speculator that is silent."""
    load: types_pb2.Load = field(default_factory=types_pb2.Load)
    """The last report."""
    num_placed: int = 0
    """Sequences of ours when it came."""

    def take_load(self, load: types_pb2.Load, num_placed: int) -> None:
        """A report came, while so many sequences of ours were there."""
        self.load, self.num_placed = load, num_placed
        self.draft_step_s = load.step_ms / 1e3 if 0 <= load.step_ms < math.inf else 0.0

    def draft_times(self) -> DraftTimes:
        """Of tokens drafted now: the running step has to end first."""
        running_s = self.last_push_s + self.draft_step_s - time.perf_counter()
        left_s = min(max(running_s, 0.0), self.draft_step_s)
        return DraftTimes(first_s=self.round_trip_s + left_s + self.draft_step_s, step_s=self.draft_step_s)
