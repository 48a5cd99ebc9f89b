"""What an engine thread hands to the event loop: collected, and handed over in one call, since waking it is dear."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


def call_on_loop(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Call `callback` on the event loop, from any thread; not if the loop is closed: nobody listens any more."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        if not loop.is_closed():
            raise


class Outbox(Generic[Item]):
    """Collects items for the event loop. Used on the engine thread alone; `deliver` gets them on the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[list[Item]], None]) -> None:
        self._loop = loop
        self._deliver = deliver
        self._items: list[Item] = []

    def put(self, item: Item) -> None:
        """Hand over with the next flush, in order."""
        self._items.append(item)

    def flush(self) -> None:
        """Hand everything over that was put since the last flush."""
        if self._items:
            items, self._items = self._items, []
            call_on_loop(self._loop, lambda: self._deliver(items))
