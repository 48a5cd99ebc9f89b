"""What is known of a connected speculator without asking."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from specpool.algorithm.fallback import DraftTimes
from specpool.v1 import types_pb2


@dataclass(slots=True)
class Measurements:
    """Measurements of one connection. Written by the pool's event loop, read by engines."""

    max_lookahead: int = 0
    """Largest lookahead K, agreed in the handshake."""
    draft_step_s: float = 0.0
    """Seconds of a draft step, from the last load report; 0: none yet."""
    round_trip_s: float = 0.0
    """Seconds of the handshake's round trip."""
    last_push_s: float = 0.0
    """Time (`perf_counter`) at which the last table came, which is at the end of a draft step."""
    num_received: int = 0
    """Number of messages of its engine so far, which shows when a speculator is silent."""
    load: types_pb2.Load = field(default_factory=types_pb2.Load)
    """Load that the speculator reported last."""
    num_placed: int = 0
    """Number of sequences of ours that were there when the load report came."""

    def take_load(self, load: types_pb2.Load, num_placed: int) -> None:
        """Take in a load report, which came while `num_placed` sequences of ours were there."""
        self.load, self.num_placed = load, num_placed
        self.draft_step_s = load.step_ms / 1e3 if 0 <= load.step_ms < math.inf else 0.0

    def draft_times(self) -> DraftTimes:
        """How long tokens drafted now would take: the running step has to end first."""
        running_s = self.last_push_s + self.draft_step_s - time.perf_counter()
        left_s = min(max(running_s, 0.0), self.draft_step_s)
        return DraftTimes(first_s=self.round_trip_s + left_s + self.draft_step_s, step_s=self.draft_step_s)
