"""How far an engine waits for a speculator: a bound on what one can cost, whatever it reports."""

from __future__ import annotations

import time
from typing import Final

from specpool.speculation.measurements import Measurements

_MAX_WASTED_SHARE: Final = 0.01
"""Largest share of the time that waits which brought nothing may take."""


class WaitTrust:
    """What became of waits for one connection; a new connection is given new trust. May be used from any thread."""

    def __init__(self, measured: Measurements) -> None:
        self._measured = measured
        self._silent_since: int | None = None
        """Number of messages that had been received when a wait timed out; None: none has since."""
        self._no_waits_before_s = 0.0
        """Time (`perf_counter`) before which there is no wait after a miss."""
        self._no_distributions_before_s = 0.0

    def may_wait(self) -> bool:
        """Whether to wait: not while the speculator is silent since a wait for it timed out."""
        if self._silent_since == self._measured.num_received:
            return False
        self._silent_since = None
        return True

    def may_wait_after_miss(self) -> bool:
        """Whether to wait after a miss: not while it is silent, nor soon after such a wait in vain."""
        return time.perf_counter() >= self._no_waits_before_s and self.may_wait()

    def may_wait_for_distributions(self) -> bool:
        """Whether to wait for distributions: not while it is silent, nor soon after such a wait in vain."""
        return time.perf_counter() >= self._no_distributions_before_s and self.may_wait()

    def timed_out(self) -> None:
        """Note that a wait timed out: there is none until the speculator has said something."""
        self._silent_since = self._measured.num_received

    def wasted(self, waited_s: float) -> None:
        """Note that a wait after a miss brought nothing."""
        self._no_waits_before_s = max(self._no_waits_before_s, time.perf_counter()) + waited_s / _MAX_WASTED_SHARE

    def distributions_late(self, waited_s: float) -> None:
        """Note that a verification waited that long for nothing."""
        self.timed_out()
        self._no_distributions_before_s = time.perf_counter() + waited_s / _MAX_WASTED_SHARE
