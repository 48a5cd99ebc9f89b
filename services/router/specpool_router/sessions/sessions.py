"""Sessions of this router: journals written behind the streams, leases, and life without the store.

While the store is away running streams go on and their journals wait in memory; quotas are this router's own. When it
is back, sessions that it forgot are written again in full.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from specpool.errors import InvalidArgument, QuotaExceeded, SessionNotFound, SessionStoreUnavailable
from specpool_router.auth.tenants import Tenant
from specpool_router.metrics import RouterMetrics
from specpool_router.sessions.session_store import (
    LeaseState,
    MemorySessionStore,
    Session,
    SessionState,
    SessionStore,
)

_logger = logging.getLogger(__name__)
_FLUSH_S: Final = 0.05
_RENEW_S: Final = 1.0
_MAX_UNWRITTEN: Final = 10_000


@dataclass(slots=True, eq=False)
class Lease:
    """A session that this router runs."""

    session: Session
    tenant: Tenant
    stop: Callable[[SessionState], None]
    """Called when the session was cancelled elsewhere (CANCELLED) or another stream took it over (FAILED)."""
    journal: list[bytes] = field(default_factory=list)
    num_written: int = 0
    num_tokens_uncounted: int = 0
    ended: tuple[SessionState, bytes] | None = None
    end_written: bool = False

    @property
    def is_unwritten(self) -> bool:
        """Whether the store lacks something."""
        journal = self.num_written < len(self.journal) or self.num_tokens_uncounted > 0
        return journal or (self.ended is not None and not self.end_written)


class Sessions:
    """All sessions of this router."""

    def __init__(self, store: SessionStore, metrics: RouterMetrics) -> None:
        self.store = store
        self._metrics = metrics
        self._local = MemorySessionStore()
        self._up = True
        self._leases: dict[str, Lease] = {}
        self._dirty: dict[Lease, None] = {}
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._pairings: set[asyncio.Task[None]] = set()

    @property
    def reachable(self) -> bool:
        """Whether the store answered last time."""
        return self._up

    async def start(self) -> None:
        """Connect to the store; fails if it is not there."""
        await self.store.start()
        self._metrics.set_session_store_up(True)
        self._tasks = [asyncio.create_task(self._write_behind()), asyncio.create_task(self._renew())]

    async def close(self) -> None:
        """Write what is left, if the store is there."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(SessionStoreUnavailable, TimeoutError):
            async with asyncio.timeout(2.0):
                await self._flush()
        await self.store.close()

    async def admit(self, tenant: Tenant, owner: str, *, instead_of: str = "") -> None:
        """Take a place in the tenant's quota, this router's, then everybody's; see `SessionStore.acquire`."""
        refusal = await self._local.acquire(tenant.name, owner, tenant.limits, instead_of=instead_of)
        if refusal is None and self._up:
            try:
                refusal = await self.store.acquire(tenant.name, owner, tenant.limits, instead_of=instead_of)
            except SessionStoreUnavailable as error:
                self._set_up(False, error)
            if refusal is not None:
                await self._local.release(tenant.name, owner)
        if refusal is not None:
            self._metrics.quota_refused(tenant.name)
            raise QuotaExceeded(
                f"tenant {tenant.name!r} is at its limit: {refusal.limit_name} is {refusal.limit}, "
                f"{refusal.used} in use; retry in {refusal.retry_after_s:.0f} s",
                metadata={
                    "limit": refusal.limit_name,
                    "value": refusal.limit,
                    "used": refusal.used,
                    "retry_after_s": f"{refusal.retry_after_s:.1f}",
                },
            )

    async def release(self, tenant: Tenant, owner: str) -> None:
        """Give the place back."""
        await self._local.release(tenant.name, owner)
        if self._up:
            try:
                await self.store.release(tenant.name, owner)
            except SessionStoreUnavailable as error:  # the lease runs out by itself
                self._set_up(False, error)

    async def open(self, session: Session, tenant: Tenant, stop: Callable[[SessionState], None]) -> Lease:
        """Begin a session. Its id must be new."""
        created = session.request_id not in self._leases
        if created and self._up:
            try:
                created = await self.store.create(session)
            except SessionStoreUnavailable as error:
                self._set_up(False, error)
        if not created:
            raise InvalidArgument(
                f"request_id {session.request_id!r} is in use; choose another, or call Resume",
                reason="REQUEST_ID_IN_USE",
                metadata={"field": "request_id", "value": session.request_id, "accepted": "an id not used before"},
            )
        return self._hold(Lease(session, tenant, stop))

    async def find(self, request_id: str, tenant: Tenant) -> Session:
        """The tenant's session; `SessionNotFound` if there is none."""
        await self._flushed(request_id)
        session = await self.store.load(request_id)
        if session is None or session.tenant != tenant.name:
            raise SessionNotFound(
                f"no session {request_id!r}: it never was, or it has expired", metadata={"request_id": request_id}
            )
        return session

    async def take_over(self, request_id: str, tenant: Tenant, owner: str) -> Session:
        """Make `owner` the owner of a session, unless it has ended meanwhile, and stop the stream that runs it."""
        lease = self._leases.get(request_id)
        if lease is not None and lease.tenant.name == tenant.name:
            lease.stop(SessionState.FAILED)
            del self._leases[request_id]
        session = await self.find(request_id, tenant)
        if session.ending:
            return session
        await self.store.take_over(request_id, owner)
        return Session(request_id=request_id, tenant=tenant.name, owner=owner, request=session.request)

    def reopen(
        self, session: Session, journal: list[bytes], tenant: Tenant, stop: Callable[[SessionState], None]
    ) -> Lease:
        """Run a session that was taken over."""
        return self._hold(Lease(session, tenant, stop, journal, len(journal)))

    def pair(self, lease: Lease, target: str, speculator: str) -> None:
        """Note where it runs. Does not wait."""
        lease.session = replace(lease.session, target=target, speculator=speculator)
        task = asyncio.create_task(self._pair(lease))
        self._pairings.add(task)
        task.add_done_callback(self._pairings.discard)

    def append(self, lease: Lease, entry: bytes, num_tokens: int) -> None:
        """Journal a delta. Does not wait."""
        lease.journal.append(entry)
        self.count_tokens(lease, num_tokens)

    def count_tokens(self, lease: Lease, num_tokens: int) -> None:
        """Count tokens (the prompt's) against the quota. Does not wait."""
        lease.num_tokens_uncounted += num_tokens
        self._local.count(lease.tenant.name, num_tokens)
        self._mark(lease)

    def finish(self, lease: Lease, state: SessionState, ending: bytes) -> None:
        """The session ended. Does not wait."""
        lease.ended = (state, ending)
        if self._leases.get(lease.session.request_id) is lease:
            del self._leases[lease.session.request_id]
        self._mark(lease)

    async def cancel(self, request_id: str, tenant: Tenant) -> bool:
        """Cancel a running session, here or on another router."""
        lease = self._leases.get(request_id)
        if lease is not None:
            if lease.tenant.name != tenant.name:
                return False
            lease.stop(SessionState.CANCELLED)
            return True
        return await self.store.request_cancel(request_id, tenant.name)

    async def _flushed(self, request_id: str) -> None:
        """Wait until this router's own writes of a session that it no longer runs are done."""
        while self._up and any(
            lease.session.request_id == request_id and lease is not self._leases.get(request_id)
            for lease in self._dirty
        ):
            await asyncio.sleep(_FLUSH_S / 5)

    def _hold(self, lease: Lease) -> Lease:
        self._leases[lease.session.request_id] = lease
        return lease

    def _mark(self, lease: Lease) -> None:
        self._dirty[lease] = None
        if len(self._dirty) > _MAX_UNWRITTEN:  # the store is away for long: ended sessions cannot be resumed then
            oldest = next((lease for lease in self._dirty if lease.ended), None)
            if oldest is not None:
                del self._dirty[oldest]
        self._wake.set()

    async def _pair(self, lease: Lease) -> None:
        session = lease.session
        if self._up:
            try:
                await self.store.pair(session.request_id, session.owner, session.target, session.speculator)
            except SessionStoreUnavailable as error:
                self._set_up(False, error)

    async def _write_behind(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(_FLUSH_S)  # gathers the deltas of a few steps into one write
            self._wake.clear()
            if not self._up:
                continue
            try:
                await self._flush()
            except SessionStoreUnavailable as error:
                self._set_up(False, error)

    async def _flush(self) -> None:
        for lease in list(self._dirty):
            await self._write(lease)
            if not lease.is_unwritten:
                self._dirty.pop(lease, None)

    async def _write(self, lease: Lease) -> None:
        session, store = lease.session, self.store
        if num_tokens := lease.num_tokens_uncounted:
            await store.add_tokens(lease.tenant.name, num_tokens)
            lease.num_tokens_uncounted -= num_tokens
        ended = lease.ended
        end = len(lease.journal)
        state = await store.append(
            session.request_id, session.owner, lease.num_written, lease.journal[lease.num_written : end]
        )
        if state is LeaseState.UNKNOWN:  # the store lost it, or never had it
            await store.create(session)
            state = await store.append(session.request_id, session.owner, 0, lease.journal[:end])
        if state is LeaseState.LOST:
            lease.stop(SessionState.FAILED)
        lease.num_written = end
        if ended is not None:
            await store.finish(session.request_id, session.owner, *ended)
            lease.end_written = True

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_S)
            for lease in list(self._leases.values()):
                await self._local.renew(lease.session.request_id, lease.session.owner, lease.tenant.name)
            try:
                if not self._up:
                    await self.store.ping()
                    self._set_up(True)
                await self._renew_leases()
                await self.store.ping()
            except SessionStoreUnavailable as error:
                self._set_up(False, error)

    async def _renew_leases(self) -> None:
        for request_id, lease in list(self._leases.items()):
            if self._leases.get(request_id) is not lease:
                continue  # it ended while others were renewed
            session = lease.session
            state = await self.store.renew(session.request_id, session.owner, lease.tenant.name)
            if state is LeaseState.CANCEL_REQUESTED:
                lease.stop(SessionState.CANCELLED)
            elif state is LeaseState.LOST:
                lease.stop(SessionState.FAILED)
            elif state is LeaseState.UNKNOWN:
                self._mark(lease)

    def _set_up(self, up: bool, error: Exception | None = None) -> None:
        if up == self._up:
            return
        self._up = up
        self._metrics.set_session_store_up(up)
        if up:
            _logger.info("the session store is back")
            self._wake.set()
        else:
            _logger.warning("going on without the session store, with this router's own limits: %s", error)
