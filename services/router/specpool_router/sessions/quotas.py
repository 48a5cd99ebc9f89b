"""Places and tokens of tenants: this router's own count first, then everybody's in the session store.

A place is held from `admit` to `release`. Whoever releases it does so once and for all: renewal keeps places, it never
gives one. A place that is held here and that the store does not have twice in a row (it was restarted, or was away when
the place was taken) is taken again; the store executes what a router asks in order, so a release that comes later wins.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import Final

from specpool.errors import QuotaExceeded, SessionStoreUnavailable
from specpool_router.auth.tenants import Tenant
from specpool_router.metrics import RouterMetrics
from specpool_router.sessions.memory_store import MemorySessionStore
from specpool_router.sessions.session_store import QuotaLimits, QuotaRefusal, SessionStore
from specpool_router.sessions.store_state import StoreState

_NO_LIMITS: Final = QuotaLimits()
_MAX_UNRELEASED: Final = 10_000
_MAX_RENEWED: Final = 256
"""Places that are renewed in one write."""


@dataclass(slots=True)
class _TokenCount:
    """Tokens of one tenant that went through this router."""

    total: int = 0
    counted: int = 0
    """Number of these tokens that the store is known to have counted."""


class Quotas:
    """Quotas of all tenants, as this router sees them."""

    def __init__(self, store: SessionStore, state: StoreState, metrics: RouterMetrics) -> None:
        self._store = store
        self._state = state
        self._metrics = metrics
        self._local = MemorySessionStore()
        self._counter = uuid.uuid4().hex
        self._held: dict[str, dict[str, None]] = {}
        self._missing: set[str] = set()
        self._missing_here: set[str] = set()
        self._unreleased: dict[str, str] = {}
        self._tokens: dict[str, _TokenCount] = {}

    async def admit(self, tenant: Tenant, owner: str, *, instead_of: str = "") -> None:
        """Take a place in the tenant's quota, this router's, then everybody's; see `SessionStore.acquire`."""
        try:
            refusal = await self._take(tenant, owner, instead_of)
        except BaseException:  # the caller has gone, and nobody will release what it did not get
            await self.release(tenant, owner)
            raise
        if refusal is not None:
            await self._local.release(tenant.name, owner)
            self._metrics.quota_refused(tenant.name)
            raise _refused(tenant, refusal)
        self._held.setdefault(tenant.name, {})[owner] = None

    async def _take(self, tenant: Tenant, owner: str, instead_of: str) -> QuotaRefusal | None:
        refusal = await self._local.acquire(tenant.name, owner, tenant.limits, instead_of=instead_of)
        if refusal is None and self._state.up:
            try:
                return await self._store.acquire(tenant.name, owner, tenant.limits, instead_of=instead_of)
            except SessionStoreUnavailable as error:
                self._state.failed(error)
        return refusal

    async def release(self, tenant: Tenant, owner: str) -> None:
        """Give the owner's place back."""
        held = self._held.get(tenant.name, {})
        held.pop(owner, None)
        if not held:
            self._held.pop(tenant.name, None)
        await self._local.release(tenant.name, owner)
        await self._release_shared(tenant.name, owner)

    async def _release_shared(self, tenant_name: str, owner: str) -> None:
        if self._state.up:
            try:
                await self._store.release(tenant_name, owner)
                return
            except SessionStoreUnavailable as error:
                self._state.failed(error)
        self._unreleased[owner] = tenant_name  # until the store is back
        if len(self._unreleased) > _MAX_UNRELEASED:
            del self._unreleased[next(iter(self._unreleased))]  # it runs out by itself

    def forget(self, tenant: Tenant, owner: str) -> None:
        """Renew a place no more: another stream has it now."""
        self._held.get(tenant.name, {}).pop(owner, None)

    def count(self, tenant: Tenant, num_tokens: int) -> None:
        """Count tokens. Does not wait. Those of an outage are this router's own, as its limits are."""
        self._local.count(tenant.name, num_tokens)
        count = self._tokens.setdefault(tenant.name, _TokenCount())
        count.total += num_tokens
        if not self._state.up:
            count.counted += num_tokens

    async def write_tokens(self) -> None:
        """Tell the store what was counted since the last time. Raises SessionStoreUnavailable."""
        await asyncio.gather(*(self._write_tokens(name, count) for name, count in self._tokens.items()))

    async def _write_tokens(self, tenant_name: str, count: _TokenCount) -> None:
        if (total := count.total) > count.counted:
            await self._store.add_tokens(tenant_name, self._counter, count.counted, total)
            count.counted = max(count.counted, total)

    async def renew(self) -> None:
        """Keep all places that are held, here and in the store. Raises SessionStoreUnavailable."""
        self._missing_here = await self._renew(self._local, self._missing_here)
        if not self._state.up:
            return
        unreleased, self._unreleased = self._unreleased, {}
        await asyncio.gather(*(self._release_shared(tenant, owner) for owner, tenant in unreleased.items()))
        self._missing = await self._renew(self._store, self._missing)

    async def _renew(self, store: SessionStore, missing_before: set[str]) -> set[str]:
        """Renew the places; returns the owners missing there for the first time: they may just be taken over."""
        missing_now: set[str] = set()
        for tenant, held in list(self._held.items()):
            owners = list(held)
            for start in range(0, len(owners), _MAX_RENEWED):
                missing = await store.renew_places(tenant, owners[start : start + _MAX_RENEWED])
                again = [owner for owner in missing if owner in missing_before]
                await asyncio.gather(*(self._take_again(store, tenant, owner) for owner in again))
                missing_now |= set(missing) - set(again)
        return missing_now

    async def _take_again(self, store: SessionStore, tenant: str, owner: str) -> None:
        if owner in self._held.get(tenant, ()):  # nothing comes between this and the request to the store
            await store.acquire(tenant, owner, _NO_LIMITS)


def _refused(tenant: Tenant, refusal: QuotaRefusal) -> QuotaExceeded:
    return QuotaExceeded(
        f"tenant {tenant.name!r} is at its limit: {refusal.limit_name} is {refusal.limit}, "
        f"{refusal.used} in use; retry in {refusal.retry_after_s:.0f} s",
        metadata={
            "limit": refusal.limit_name,
            "value": refusal.limit,
            "used": refusal.used,
            "retry_after_s": f"{refusal.retry_after_s:.1f}",
        },
    )
