"""A directory that others feed: routers tell every target the speculators that they know."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from specpool.discovery.discovery import Discovery, Endpoint
from specpool.discovery.messages import MAX_ENDPOINTS

_FORGET_AFTER_S: Final = 30.0


class ToldDiscovery(Discovery):
    """A directory of everything that anybody has named lately, with what was said last of it.

    Several routers may tell, and none need know of the others: an endpoint stays until nobody has named it for a while.
    Hearing nothing at all takes nothing away before that, and an empty list says nothing.
    """

    def __init__(self, *, forget_after_s: float = _FORGET_AFTER_S) -> None:
        super().__init__()
        self._forget_after_s = forget_after_s
        self._told: dict[str, tuple[Endpoint, float]] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Do nothing: `tell` may be called from now on."""

    async def close(self) -> None:
        """Forget nothing any more."""
        if self._timer is not None:
            self._timer.cancel()

    def tell(self, endpoints: Iterable[Endpoint]) -> None:
        """Take in the endpoints that somebody names. Call it on the event loop."""
        now_s = asyncio.get_running_loop().time()
        for endpoint in endpoints:
            self._told.pop(endpoint.address, None)  # the order of the entries is that of their times
            self._told[endpoint.address] = (endpoint, now_s)
        while len(self._told) > MAX_ENDPOINTS:
            del self._told[next(iter(self._told))]
        self._refresh()

    def _refresh(self) -> None:
        loop = asyncio.get_running_loop()
        oldest_s = loop.time() - self._forget_after_s
        self._told = {address: told for address, told in self._told.items() if told[1] > oldest_s}
        self._publish(endpoint for endpoint, _ in self._told.values())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._told:
            _, first_s = next(iter(self._told.values()))
            self._timer = loop.call_at(first_s + self._forget_after_s, self._refresh)
