"""Who may run: the router's own state, and a place in the tenant's quota."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from specpool.errors import Draining, SpecPoolError
from specpool_router.auth.tenants import Tenant
from specpool_router.generation.stop_signal import StopSignal
from specpool_router.metrics import RouterMetrics
from specpool_router.sessions.sessions import Sessions

_ENDING_SHARE: Final = 0.25
_LONGEST_ENDING_S: Final = 1.0
"""Time that streams have, out of a stop's grace, to tell their clients that they end."""


class Admission:
    """Counts the streams of this router, and ends them in time when it stops."""

    def __init__(self, sessions: Sessions, metrics: RouterMetrics) -> None:
        self._sessions = sessions
        self._metrics = metrics
        self._is_draining = False
        self._running: set[StopSignal] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_draining(self) -> bool:
        """Whether new streams are refused."""
        return self._is_draining

    @property
    def num_streams(self) -> int:
        """Number of streams open to clients."""
        return len(self._running)

    def start_draining(self) -> None:
        """Refuse new streams from now on."""
        self._is_draining = True

    async def drain(self, grace_s: float) -> None:
        """Take nothing new; returns when nothing runs, or the grace is over.

        Shortly before that streams are told to end. One whose client does not read cannot end by itself: it is left to
        the server's own stop.
        """
        self.start_draining()
        ending_s = min(_LONGEST_ENDING_S, _ENDING_SHARE * grace_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s - ending_s)
        for stop in list(self._running):
            stop.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), ending_s)

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[StopSignal]:
        """A context that counts a stream, and gives the signal that ends it. Raises if streams are refused."""
        if self._is_draining:
            raise Draining(
                "this router is draining and takes no new requests; call another", metadata={"retriable": "true"}
            )
        started, code, stop = time.monotonic(), "OK", StopSignal()
        self._running.add(stop)
        self._idle.clear()
        self._metrics.stream_started()
        try:
            yield stop
        except SpecPoolError as error:
            code = error.status_code_name
            raise
        except (asyncio.CancelledError, GeneratorExit):
            code = "CANCELLED"
            raise
        except BaseException:
            code = "INTERNAL"
            raise
        finally:
            self._metrics.stream_ended(code, time.monotonic() - started)
            self._running.discard(stop)
            if not self._running:
                self._idle.set()

    @asynccontextmanager
    async def place(self, tenant: Tenant, owner: str, *, instead_of: str = "") -> AsyncIterator[None]:
        """A context that holds a place in the tenant's quota. Raises QuotaExceeded."""
        await self._sessions.admit(tenant, owner, instead_of=instead_of)
        try:
            yield
        finally:
            await self._sessions.release(tenant, owner)
