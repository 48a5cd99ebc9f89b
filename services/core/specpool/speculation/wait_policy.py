"""Whether a sequence waits for a draft after a miss: a simple policy. Engines with better ones need not use it."""

from __future__ import annotations

from typing import Final

from specpool.speculation.handle import SequenceHandle

_SHARE_OF_ROUND: Final = 0.5


def worth_waiting(handle: SequenceHandle, lookahead: int, *, round_s: float) -> int:
    """Number of tokens to request now: as many as come in half of a round, by the speculator's own reports; often 0.

    For one sequence by itself. In a batch, whoever waits misses the others' forward: there it seldom pays.

    Args:
        handle: between `next` and `started`.
        lookahead: at most.
        round_s: of this engine.
    """
    speculator = handle.speculator
    if speculator is None or not speculator.trust.may_wait_after_miss():
        return 0
    times = speculator.measured.draft_times()
    if times.step_s <= 0:
        return 0  # nothing reported yet
    depths = range(lookahead, 0, -1)
    return next((depth for depth in depths if times.waiting_s(depth) <= _SHARE_OF_ROUND * round_s), 0)
