"""The session store in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from specpool_router.sessions.session_store import (
    LEASE_S,
    WINDOW_S,
    LeaseState,
    QuotaLimits,
    QuotaRefusal,
    Session,
    SessionState,
    SessionStore,
    concurrency_refusal,
    token_refusal,
)

_SWEEP_S: Final = 1.0
_MAX_BYTES: Final = 256 << 20
"""Bytes that all sessions may take; the oldest that do not run are forgotten first."""


@dataclass(slots=True)
class _Record:
    session: Session
    expires: float
    entries: list[bytes] = field(default_factory=list)
    writer: str = ""
    cancel_requested: bool = False

    @property
    def num_bytes(self) -> int:
        return len(self.session.request) + sum(map(len, self.entries))


class MemorySessionStore(SessionStore):
    """The store of a single router, and of every router for the time in which the real one is away."""

    kind = "memory"

    def __init__(
        self,
        *,
        session_ttl_s: float = 600.0,
        max_bytes: int = _MAX_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ttl_s = session_ttl_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._records: dict[str, _Record] = {}
        self._num_bytes = 0
        self._next_sweep = 0.0
        self._places: dict[str, dict[str, float]] = {}
        self._tokens: dict[str, tuple[int, int]] = {}
        self._totals: dict[tuple[str, str], int] = {}

    async def probe(self, writer: str) -> None:
        """Do nothing: memory is always there."""

    async def close(self) -> None:
        """Do nothing: there is nothing to release."""

    async def create(self, session: Session) -> bool:
        self._expire()
        record = self._get(session.request_id)
        if record and record.session.owner == session.owner:
            return True
        if record and record.session.state is not SessionState.FAILED:
            return False
        self._remove(session.request_id)
        self._records[session.request_id] = _Record(session, self._clock() + self._ttl_s)
        self._grow(len(session.request))
        return True

    async def load(self, request_id: str) -> Session | None:
        record = self._get(request_id)
        return record.session if record else None

    async def take_over(self, request_id: str, owner: str, former: str) -> bool:
        record = self._get(request_id)
        if record is None or record.session.owner not in (owner, former):
            return False
        record.session = replace(record.session, owner=owner, state=SessionState.RUNNING)
        record.cancel_requested = False
        return True

    async def pair(self, request_id: str, owner: str, target: str, speculator: str) -> bool:
        record = self._get(request_id)
        if record is None or record.session.owner != owner:
            return False
        record.session = replace(record.session, target=target, speculator=speculator)
        return True

    async def append(self, request_id: str, owner: str, start: int, entries: Sequence[bytes]) -> LeaseState:
        record = self._get(request_id)
        if record is None:
            return LeaseState.UNKNOWN
        if record.session.owner != owner:
            return LeaseState.LOST
        if start == 0 and record.writer != owner:
            num_bytes = sum(map(len, record.entries))
            record.entries, record.writer = [], owner
            self._grow(-num_bytes)
        if start > len(record.entries):
            return LeaseState.UNKNOWN
        new = entries[len(record.entries) - start :]
        record.entries.extend(new)
        record.expires = self._clock() + self._ttl_s
        self._grow(sum(map(len, new)))
        return LeaseState.CANCEL_REQUESTED if record.cancel_requested else LeaseState.HELD

    async def read_journal(self, request_id: str) -> list[bytes]:
        record = self._get(request_id)
        return list(record.entries) if record else []

    async def finish(self, request_id: str, owner: str, state: SessionState, ending: bytes, outline: bytes) -> bool:
        record = self._get(request_id)
        if record is None or record.session.owner != owner:
            return False
        request = outline if ending else record.session.request
        num_new_bytes = len(request) - len(record.session.request)
        record.session = replace(record.session, state=state, ending=ending, request=request)
        record.expires = self._clock() + self._ttl_s
        self._grow(num_new_bytes)
        return True

    async def delete(self, request_id: str, owner: str) -> None:
        record = self._get(request_id)
        if record is not None and record.session.owner == owner:
            self._remove(request_id)

    async def renew(self, request_id: str, owner: str) -> LeaseState:
        record = self._get(request_id)
        if record is None:
            return LeaseState.UNKNOWN
        if record.session.owner != owner:
            return LeaseState.LOST
        record.expires = self._clock() + self._ttl_s
        return LeaseState.CANCEL_REQUESTED if record.cancel_requested else LeaseState.HELD

    async def request_cancel(self, request_id: str, tenant: str) -> bool:
        record = self._get(request_id)
        if record is None or record.session.tenant != tenant or record.session.state is not SessionState.RUNNING:
            return False
        record.cancel_requested = True
        return True

    async def acquire(
        self, tenant: str, owner: str, limits: QuotaLimits, *, instead_of: str = ""
    ) -> QuotaRefusal | None:
        now = self._clock()
        places = {key: until for key, until in self._places.get(tenant, {}).items() if until > now}
        self._places[tenant] = places
        if owner not in places:
            num_running = len(places) - (instead_of in places)
            if limits.max_concurrent_requests and num_running >= limits.max_concurrent_requests:
                return concurrency_refusal(limits, num_running)
            window, used = self._tokens.get(tenant, (0, 0))
            if limits.tokens_per_minute and window == int(now) // WINDOW_S and used >= limits.tokens_per_minute:
                return token_refusal(limits, used, now)
            places.pop(instead_of, None)
        places[owner] = now + LEASE_S
        return None

    async def renew_places(self, tenant: str, owners: Sequence[str]) -> list[str]:
        places = self._places.get(tenant, {})
        missing = [owner for owner in owners if owner not in places]
        places.update(dict.fromkeys(places.keys() & set(owners), self._clock() + LEASE_S))
        return missing

    async def release(self, tenant: str, owner: str) -> None:
        self._places.get(tenant, {}).pop(owner, None)

    async def add_tokens(self, tenant: str, counter: str, counted: int, total: int) -> None:
        counted = max(counted, self._totals.get((tenant, counter), 0))
        if total > counted:
            self._totals[tenant, counter] = total
            self.count(tenant, total - counted)

    def count(self, tenant: str, num_tokens: int) -> None:
        """Count tokens where nobody else counts; see `add_tokens`."""
        current = int(self._clock()) // WINDOW_S
        window, used = self._tokens.get(tenant, (current, 0))
        self._tokens[tenant] = (current, num_tokens + (used if window == current else 0))

    def _get(self, request_id: str) -> _Record | None:
        record = self._records.get(request_id)
        return record if record and record.expires > self._clock() else None

    def _expire(self) -> None:
        now = self._clock()
        if now < self._next_sweep:
            return
        self._next_sweep = now + _SWEEP_S
        for key in [key for key, record in self._records.items() if record.expires <= now]:
            self._remove(key)

    def _remove(self, request_id: str) -> None:
        if record := self._records.pop(request_id, None):
            self._num_bytes -= record.num_bytes

    def _grow(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes <= self._max_bytes:
            return
        for key in [key for key, record in self._records.items() if record.session.state is not SessionState.RUNNING]:
            if self._num_bytes <= self._max_bytes:
                break
            self._remove(key)
