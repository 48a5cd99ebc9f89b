"""Sessions of this router: leases, resumption, cancellation, and life without the store.

While the store is away running streams go on and their journals wait in memory; quotas are this router's own. When it
is back, sessions that it forgot are written again in full. `journal` writes, `quotas` counts, `store_state` knows
whether the store is there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Final

from specpool.background import Background
from specpool.errors import (
    InvalidArgument,
    SessionNotFound,
    SessionStoreRefused,
    SessionStoreUnavailable,
    TargetUnavailable,
)
from specpool_router.auth.tenants import Tenant
from specpool_router.metrics import RouterMetrics
from specpool_router.sessions.journal import JournalWriter
from specpool_router.sessions.lease import Lease
from specpool_router.sessions.quotas import Quotas
from specpool_router.sessions.session_store import LeaseState, Session, SessionState, SessionStore
from specpool_router.sessions.store_state import StoreState

_RENEW_S: Final = 1.0
_TOKENS_S: Final = 0.1
"""Seconds between two reports of the tokens that were counted."""
_MAX_RENEWED: Final = 256
"""Leases that are renewed at once."""
_WRITTEN_S: Final = 2.0
"""Longest wait for what this router itself has still to write."""
_CLOSE_S: Final = 2.0
_MAX_TAKE_OVERS: Final = 3
_BYTES_PER_TOKEN: Final = 4
"""Bytes of text that count as one token, for a prompt whose tokens nobody counted."""


class Sessions:
    """All sessions of this router."""

    def __init__(self, store: SessionStore, metrics: RouterMetrics) -> None:
        self.store = store
        self._state = StoreState(store, metrics)
        self._quotas = Quotas(store, self._state, metrics)
        self._journal = JournalWriter(store, self._state, metrics, self._react)
        self._leases: dict[str, Lease] = {}
        self._background = Background("sessions")

    @property
    def reachable(self) -> bool:
        """Whether the store can be used."""
        return self._state.up

    async def start(self) -> None:
        """Look for the store and begin. Its absence is no obstacle; ConfigError if it can never be used."""
        await self._state.start()
        self._background.keep_running(self._state.watch, name="watch of the session store")
        self._background.keep_running(self._journal.run, name="journal")
        self._background.keep_running(self._write_tokens, name="token counts")
        self._background.keep_running(self._renew, name="renewal of leases")

    async def close(self) -> None:
        """Write what is left, if the store is there."""
        await self._background.close()
        with contextlib.suppress(SessionStoreUnavailable, TimeoutError):
            if self._state.up:
                async with asyncio.timeout(_CLOSE_S):
                    await asyncio.gather(self._journal.write_all(), self._quotas.write_tokens())
        await self.store.close()

    async def admit(self, tenant: Tenant, owner: str, *, instead_of: str = "") -> None:
        """Take a place in the tenant's quota; see `Quotas.admit`."""
        await self._quotas.admit(tenant, owner, instead_of=instead_of)

    async def release(self, tenant: Tenant, owner: str) -> None:
        """Give the owner's place in the tenant's quota back."""
        await self._quotas.release(tenant, owner)

    async def open(self, session: Session, tenant: Tenant, stop: Callable[[SessionState], None]) -> Lease:
        """Begin a session. Its id must be new. A caller that is cancelled meanwhile leaves nothing behind."""
        lease = Lease(session, tenant, stop)
        if (former := self._journal.ended(session.request_id)) is not None and self._state.up:
            await _written(former)
        created = session.request_id not in self._leases
        if created and self._state.up:
            try:
                created = await self.store.create(session)
            except SessionStoreUnavailable as error:
                self._state.failed(error)
            except asyncio.CancelledError:  # it may well have been created
                self.finish(lease, SessionState.FAILED, b"", invalid=True)
                raise
        if not created:
            raise InvalidArgument(
                f"request_id {session.request_id!r} is in use; choose another, or call Resume",
                reason="REQUEST_ID_IN_USE",
                metadata={"field": "request_id", "value": session.request_id, "accepted": "an id not used before"},
            )
        return self._hold(lease)

    async def find(self, request_id: str, tenant: Tenant) -> Session:
        """The tenant's session; `SessionNotFound` if there is none."""
        self._state.require()
        if (ended := self._journal.ended(request_id)) is not None and not await _written(ended):
            raise SessionStoreUnavailable(
                f"session {request_id!r} is not written yet; retry", metadata={"request_id": request_id}
            )
        async with self._store_in_use():
            session = await self.store.load(request_id)
        if session is None or session.tenant != tenant.name:
            raise SessionNotFound(
                f"no session {request_id!r}: it never was, or it has expired", metadata={"request_id": request_id}
            )
        return session

    async def take_over(self, request_id: str, tenant: Tenant, owner: str) -> Session:
        """Make `owner` the owner of a session, unless it has ended meanwhile, and stop the stream that runs it."""
        if (former := self._stop_here(request_id, tenant)) is not None:
            await _written(former)
        for _ in range(_MAX_TAKE_OVERS):
            session = await self.find(request_id, tenant)
            if session.ending:
                return session
            async with self._store_in_use():
                if await self.store.take_over(request_id, owner, session.owner):
                    return Session(request_id=request_id, tenant=tenant.name, owner=owner, request=session.request)
        raise TargetUnavailable(f"other streams take {request_id!r} over; retry", metadata={"retriable": "true"})

    async def adopt(self, session: Session, tenant: Tenant, stop: Callable[[SessionState], None]) -> Lease:
        """Begin a session that the store has lost, or cannot be asked about, and that its client knows.

        Whoever may still be running it loses it, also in a store that comes back and knows of it.
        """
        self._stop_here(session.request_id, tenant)
        lease = await self.open(session, tenant, stop)
        lease.is_adopted = not self._state.up
        return lease

    def _stop_here(self, request_id: str, tenant: Tenant) -> Lease | None:
        """Stop the stream of this router that runs a session, since another takes it over."""
        lease = self._leases.get(request_id)
        if lease is None or lease.tenant.name != tenant.name:
            return None
        del self._leases[request_id]
        lease.began = True  # it goes on elsewhere
        self._lose(lease)
        return lease

    def reopen(
        self, session: Session, journal: list[bytes], tenant: Tenant, stop: Callable[[SessionState], None]
    ) -> Lease:
        """Run a session that was taken over; its journal in the store becomes ``journal``."""
        return self._hold(Lease(session, tenant, stop, journal, began=True))

    def pair(self, lease: Lease, target: str, speculator: str) -> None:
        """Note at which target and speculator a session runs. Does not wait."""
        lease.session = replace(lease.session, target=target, speculator=speculator)
        lease.pairing_written = False
        self._journal.mark(lease)

    def append(self, lease: Lease, entry: bytes, num_tokens: int) -> None:
        """Add a delta to the journal. Does not wait."""
        lease.journal.append(entry)
        self.count_tokens(lease, num_tokens)
        self._journal.mark(lease)

    def count_tokens(self, lease: Lease, num_tokens: int) -> None:
        """Count tokens (the prompt's) against the quota: the target has taken the request. Does not wait."""
        lease.began = True
        self._quotas.count(lease.tenant, num_tokens)

    def finish(self, lease: Lease, state: SessionState, ending: bytes, *, invalid: bool = False) -> None:
        """End a session. Does not wait. An ``invalid`` request costs its tenant what its prompt may have cost."""
        if not lease.began and (invalid or state is SessionState.DETACHED):
            self._quotas.count(lease.tenant, len(lease.session.request) // _BYTES_PER_TOKEN)
        lease.ended = (state, ending)
        if ending or lease.never_began:
            lease.session = replace(lease.session, request=lease.session.outline() if ending else b"")
        if self._leases.get(lease.session.request_id) is lease:
            del self._leases[lease.session.request_id]
        self._journal.mark(lease)

    async def cancel(self, request_id: str, tenant: Tenant) -> bool:
        """Cancel a running session, here or on another router."""
        lease = self._leases.get(request_id)
        if lease is not None:
            if lease.tenant.name != tenant.name:
                return False
            lease.stop(SessionState.CANCELLED)
            return True
        async with self._store_in_use():
            return await self.store.request_cancel(request_id, tenant.name)

    @contextlib.asynccontextmanager
    async def _store_in_use(self) -> AsyncIterator[None]:
        """A context for what cannot be done without the store: nobody waits for one that is known to be away."""
        self._state.require()
        try:
            yield
        except SessionStoreUnavailable as error:
            self._state.failed(error)
            raise

    def _hold(self, lease: Lease) -> Lease:
        self._leases[lease.session.request_id] = lease
        return lease

    def _lose(self, lease: Lease) -> None:
        """Stop a stream whose session another one has taken."""
        self._quotas.forget(lease.tenant, lease.session.owner)
        lease.stop(SessionState.FAILED)

    def _react(self, lease: Lease, state: LeaseState) -> None:
        if lease.ended is not None:
            return
        if state is LeaseState.CANCEL_REQUESTED:
            lease.stop(SessionState.CANCELLED)
        elif state is LeaseState.LOST:
            if lease.is_adopted:
                self._journal.mark(lease)  # writes take it over
            else:
                self._lose(lease)
        elif state is LeaseState.UNKNOWN:
            self._journal.mark(lease)

    async def _write_tokens(self) -> None:
        while True:
            await asyncio.sleep(_TOKENS_S)
            if self._state.up:
                try:
                    await self._quotas.write_tokens()
                except SessionStoreUnavailable as error:
                    self._state.failed(error)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_S)
            try:
                if self._state.up:
                    await self._renew_leases()
                await self._quotas.renew()
            except SessionStoreUnavailable as error:
                self._state.failed(error)

    async def _renew_leases(self) -> None:
        now = asyncio.get_running_loop().time()
        leases = [lease for lease in self._leases.values() if now - lease.last_write >= _RENEW_S]
        for start in range(0, len(leases), _MAX_RENEWED):
            await asyncio.gather(*map(self._renew_lease, leases[start : start + _MAX_RENEWED]))

    async def _renew_lease(self, lease: Lease) -> None:
        session = lease.session
        if self._leases.get(session.request_id) is not lease:
            return  # it ended while others were renewed
        try:
            state = await self.store.renew(session.request_id, session.owner)
        except SessionStoreRefused as error:
            self._state.failed(error)
        else:
            self._react(lease, state)


async def _written(lease: Lease) -> bool:
    """Wait until what the lease has is in the store, within bounds."""
    try:
        async with asyncio.timeout(_WRITTEN_S):
            await lease.written.wait()
    except TimeoutError:
        return False
    return True
