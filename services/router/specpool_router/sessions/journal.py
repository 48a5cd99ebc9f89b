"""Journals of this router's sessions, written behind the streams.

One writer gathers what all streams left since it wrote last and sends it in batches, so the journal lags behind by
about the time of one pass over the streams that have something new. While the store is away everything waits in memory,
within bounds: ended sessions are given up first, and then they cannot be resumed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

from specpool.errors import SessionStoreRefused, SessionStoreUnavailable
from specpool_router.metrics import RouterMetrics
from specpool_router.sessions.lease import Lease
from specpool_router.sessions.session_store import LeaseState, SessionStore
from specpool_router.sessions.store_state import StoreState

_GATHER_S: Final = 0.05
_LONGEST_GATHER_S: Final = 0.25
_MAX_LEASES: Final = 256
"""Leases that are written at once."""
_MAX_ENTRIES: Final = 1000
"""Entries of one journal that one write takes."""
_MAX_ENDED: Final = 10_000
_MAX_ENDED_BYTES: Final = 64 << 20


class JournalWriter:
    """Writes to the store what it lacks of each lease."""

    def __init__(
        self,
        store: SessionStore,
        state: StoreState,
        metrics: RouterMetrics,
        on_state: Callable[[Lease, LeaseState], None],
    ) -> None:
        """``on_state`` is told what the store says of a lease whenever something of it was written."""
        self._store = store
        self._state = state
        self._on_state = on_state
        self._clock = asyncio.get_running_loop().time
        self._dirty: dict[Lease, None] = {}
        self._ended: dict[str, Lease] = {}
        self._num_ended_bytes = 0
        self._wake = asyncio.Event()
        metrics.watch_journal_lag(self.lag_s)
        state.on_up(self._wake.set)

    def mark(self, lease: Lease) -> None:
        """Note that the lease has something new. Does not wait."""
        lease.written.clear()
        if lease.unwritten_since is None:
            lease.unwritten_since = self._clock()
        self._dirty[lease] = None
        if lease.ended is not None:
            self._keep_ended(lease)
        self._wake.set()

    def ended(self, request_id: str) -> Lease | None:
        """The ended lease of this id that is still to be written."""
        return self._ended.get(request_id)

    def lag_s(self) -> float:
        """Age in seconds of the oldest thing that is not in the store."""
        now = self._clock()
        return max((now - (lease.unwritten_since or now) for lease in list(self._dirty)), default=0.0)

    async def run(self) -> None:
        """Write behind. Never returns."""
        pause_s = _GATHER_S
        self._wake.set()  # what a former run that failed left
        while True:
            await self._wake.wait()
            await asyncio.sleep(pause_s)  # gathers the deltas of a few steps into one write
            self._wake.clear()
            if not self._state.up:
                continue
            started = self._clock()
            try:
                await self.write_all()
            except SessionStoreUnavailable as error:
                self._state.failed(error)
            pause_s = min(max(_GATHER_S, (self._clock() - started) / 2), _LONGEST_GATHER_S)
            if self._dirty:
                self._wake.set()

    async def write_all(self) -> None:
        """Write what is there now. Raises SessionStoreUnavailable."""
        leases = list(self._dirty)
        for start in range(0, len(leases), _MAX_LEASES):
            writes = map(self._write, leases[start : start + _MAX_LEASES])
            for outcome in await asyncio.gather(*writes, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome

    async def _write(self, lease: Lease) -> None:
        started = self._clock()
        try:
            state = await self._send(lease)
            if state is LeaseState.UNKNOWN:  # the store lost it, or never had it
                lease.num_written = 0
                await self._store.create(lease.session)
                state = await self._send(lease)
            if state is LeaseState.LOST and lease.is_adopted and await self._take_over(lease):
                state = await self._send(lease)
        except SessionStoreRefused as error:  # it would be refused again
            self._state.failed(error)
            self._forget(lease)
            return
        self._on_state(lease, state)
        if state is LeaseState.LOST or not lease.is_unwritten:
            self._forget(lease)
        else:
            lease.unwritten_since = started  # what came while this was on its way

    async def _send(self, lease: Lease) -> LeaseState:
        """Write what the store lacks, in one round trip and in order. No part changes anything of a lost session."""
        store, session, start = self._store, lease.session, lease.num_written
        if lease.never_began:
            await store.delete(session.request_id, session.owner)
            lease.pairing_written = lease.end_written = True
            return LeaseState.HELD
        entries = lease.journal[start : start + _MAX_ENTRIES]
        ended = lease.ended if start + len(entries) == len(lease.journal) else None
        writes: list[Coroutine[Any, Any, Any]] = [store.append(session.request_id, session.owner, start, entries)]
        if not lease.pairing_written:
            writes.append(store.pair(session.request_id, session.owner, session.target, session.speculator))
        if ended is not None:
            writes.append(store.finish(session.request_id, session.owner, *ended, session.request))
        state: LeaseState = (await asyncio.gather(*writes))[0] if len(writes) > 1 else await writes[0]
        if state in (LeaseState.HELD, LeaseState.CANCEL_REQUESTED):
            lease.num_written = start + len(entries)
            lease.pairing_written = lease.session is session
            lease.end_written = ended is not None
            lease.last_write = self._clock()
        return state

    async def _take_over(self, lease: Lease) -> bool:
        """Own a session that went on here while the store was away, where the stream before is still the owner."""
        session = await self._store.load(lease.session.request_id)
        taken = False
        if session is not None and session.tenant == lease.tenant.name and not session.ending:
            taken = await self._store.take_over(session.request_id, lease.session.owner, session.owner)
        # Whatever came of it; but not before the store has answered: what it does not answer is tried again.
        lease.is_adopted, lease.num_written = False, 0
        return taken

    def _keep_ended(self, lease: Lease) -> None:
        request_id = lease.session.request_id
        if (former := self._ended.get(request_id)) is not None and former is not lease:
            self._forget(former)  # its id is another session's now
        if former is not lease:
            self._num_ended_bytes += lease.num_bytes
        self._ended[request_id] = lease
        while len(self._ended) > _MAX_ENDED or self._num_ended_bytes > _MAX_ENDED_BYTES:
            self._forget(next(iter(self._ended.values())))

    def _forget(self, lease: Lease) -> None:
        """Forget a lease of which all is written, or is not going to be."""
        self._dirty.pop(lease, None)
        if self._ended.get(lease.session.request_id) is lease:
            del self._ended[lease.session.request_id]
            self._num_ended_bytes -= lease.num_bytes
        lease.unwritten_since = None
        lease.written.set()
