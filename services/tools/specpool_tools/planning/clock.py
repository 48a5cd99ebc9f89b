"""Virtual time: what happens when, in order."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import count


class Clock:
    """A time that jumps from event to event."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run `action` after `delay_s` seconds of virtual time."""
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._order), action))

    def until(self, end_s: float) -> Iterator[Callable[[], None]]:
        """The actions before `end_s` seconds, each at its time, those that they add included."""
        while self._events and self._events[0][0] < end_s:
            self.now_s, _, action = heapq.heappop(self._events)
            yield action
