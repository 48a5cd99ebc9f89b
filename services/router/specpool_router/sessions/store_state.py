"""Whether the session store can be used now.

A router lives without its store, so it starts without it, too: only what can never work is refused at the start. A
write like the real ones decides, not a PING, which a store answers that is out of memory or has become a replica. A
store that was lost again soon after it came back stays out of use for longer each time, so that nothing flaps.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from typing import Final

from specpool.errors import ConfigError, SessionStoreMisconfigured, SessionStoreRefused, SessionStoreUnavailable
from specpool_router.metrics import RouterMetrics
from specpool_router.sessions.session_store import SessionStore

_logger = logging.getLogger(__name__)
_PROBE_S: Final = 1.0
_STABLE_S: Final = 120.0
"""Seconds of being up after which a store has done with its past."""
_FIRST_HOLD_S: Final = 5.0
_LONGEST_HOLD_S: Final = 60.0
_HOLD_FACTOR: Final = 4.0
_REFUSAL_WARNING_S: Final = 60.0


class StoreState:
    """Whether the store is up or down, and why."""

    def __init__(
        self, store: SessionStore, metrics: RouterMetrics, *, clock: Callable[[], float] | None = None
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._clock = clock or asyncio.get_running_loop().time
        self._writer = uuid.uuid4().hex
        self._up = True
        self._up_since = self._clock()
        self._not_before = 0.0
        self._hold_s = 0.0
        self._next_warning = 0.0
        self._is_misconfigured = False
        self._on_up: list[Callable[[], None]] = []

    @property
    def up(self) -> bool:
        """Whether operations are worth trying."""
        return self._up

    def on_up(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever the store is back."""
        self._on_up.append(callback)

    def require(self) -> None:
        """Raise if the store is known to be away: nobody waits for it in vain."""
        if not self._up:
            raise SessionStoreUnavailable("the session store cannot be reached now; retry later")

    async def start(self) -> None:
        """Look for the first time; ConfigError if what is there can never be used."""
        self._metrics.set_session_store_up(True)
        try:
            await self._store.probe(self._writer)
        except (SessionStoreMisconfigured, SessionStoreRefused) as error:
            raise ConfigError(error.message, metadata={"field": "session_store", **error.metadata}) from error
        except SessionStoreUnavailable as error:
            self.failed(error)

    async def watch(self) -> None:
        """Find out that the store is gone, or back, again and again. Never returns."""
        while True:
            await asyncio.sleep(_PROBE_S)
            await self.look()

    async def look(self) -> None:
        """Find out whether the store is up: one write decides."""
        try:
            await self._store.probe(self._writer)
        except SessionStoreUnavailable as error:
            self._set_down(error)
        else:
            if not self._up and self._clock() >= self._not_before:
                self._set_up()

    def failed(self, error: SessionStoreUnavailable) -> None:
        """Note that an operation failed, after a retry."""
        if not isinstance(error, SessionStoreRefused):
            self._set_down(error)
        elif self._clock() >= self._next_warning:
            self._next_warning = self._clock() + _REFUSAL_WARNING_S
            _logger.warning("going on without what the session store did not take: %s", error)

    def _set_down(self, error: SessionStoreUnavailable) -> None:
        now = self._clock()
        if isinstance(error, SessionStoreMisconfigured) and not self._is_misconfigured:
            self._is_misconfigured = True
            _logger.error("the session store will not come back by itself: %s", error)
        if not self._up:
            return
        self._up = False
        self._metrics.set_session_store_up(False)
        lasted = now - self._up_since >= _STABLE_S
        hold_s = 0.0 if lasted else self._hold_s
        self._not_before = now + hold_s
        self._hold_s = min(max(_HOLD_FACTOR * hold_s, _FIRST_HOLD_S), _LONGEST_HOLD_S)
        _logger.warning("going on without the session store, with this router's own limits: %s", error)

    def _set_up(self) -> None:
        self._up, self._is_misconfigured = True, False
        self._up_since = self._clock()
        self._metrics.set_session_store_up(True)
        _logger.info("the session store is back")
        for callback in self._on_up:
            callback()
