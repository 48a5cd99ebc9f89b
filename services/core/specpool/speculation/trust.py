"""The connected speculators, and how far the engine waits for each: a bound on what one can cost, whatever it reports.

Runs on the engine thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from specpool_target.links.link import SpeculatorLink

_MAX_WASTED_SHARE: Final = 0.01
"""Of the time: waits that brought nothing."""


@dataclass(slots=True)
class _Live:
    epoch: int
    silent_since: int | None = None
    """A wait timed out; by then the link had received that many messages."""
    no_waits_before_s: float = 0.0
    """After a miss (`perf_counter`)."""
    no_distributions_before_s: float = 0.0


class LiveLinks:
    """By link: the epoch of its live connection, and what became of waits for it."""

    def __init__(self) -> None:
        self._live: dict[SpeculatorLink, _Live] = {}

    def up(self, link: SpeculatorLink, epoch: int) -> None:
        """A new connection is given new trust."""
        self._live[link] = _Live(epoch)

    def down(self, link: SpeculatorLink, epoch: int) -> None:
        """Unless a later connection has taken its place."""
        if self.epoch(link) == epoch:
            del self._live[link]

    def epoch(self, link: SpeculatorLink | None) -> int | None:
        """Of the live connection; None if there is none."""
        live = self._of(link)
        return None if live is None else live.epoch

    def may_wait(self, link: SpeculatorLink | None) -> bool:
        """Connected, and not silent since a wait for it timed out."""
        live = self._of(link)
        if link is None or live is None or not link.is_connected:
            return False
        if live.silent_since == link.measured.num_received:
            return False
        live.silent_since = None
        return True

    def may_wait_after_miss(self, link: SpeculatorLink | None) -> bool:
        """As `may_wait`; and not soon after such a wait that brought nothing."""
        live = self._of(link)
        return live is not None and time.perf_counter() >= live.no_waits_before_s and self.may_wait(link)

    def may_wait_for_distributions(self, link: SpeculatorLink | None) -> bool:
        """As `may_wait`; and not soon after such a wait that brought nothing, whatever else the link brings."""
        live = self._of(link)
        return live is not None and time.perf_counter() >= live.no_distributions_before_s and self.may_wait(link)

    def timed_out(self, link: SpeculatorLink | None) -> None:
        """Do not wait for it again until it has said something."""
        live = self._of(link)
        if link is not None and live is not None:
            live.silent_since = link.measured.num_received

    def wasted(self, link: SpeculatorLink | None, waited_s: float) -> None:
        """A wait after a miss brought nothing."""
        live = self._of(link)
        if live is not None:
            live.no_waits_before_s = max(live.no_waits_before_s, time.perf_counter()) + waited_s / _MAX_WASTED_SHARE

    def distributions_late(self, link: SpeculatorLink | None, waited_s: float) -> None:
        """A verification waited that long for nothing."""
        self.timed_out(link)
        live = self._of(link)
        if live is not None:
            live.no_distributions_before_s = time.perf_counter() + waited_s / _MAX_WASTED_SHARE

    def _of(self, link: SpeculatorLink | None) -> _Live | None:
        return None if link is None else self._live.get(link)
