"""The session store: pairings, resume journal, cancel flags and quotas, shared by router replicas.

Nothing here is on the path of a token: admission asks once, and `journal.JournalWriter` writes behind the stream.
A session has one owner at a time, the stream that runs it. A stream that resumes it becomes the owner, and what the
former one still writes is refused.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

LEASE_S = 15.0
"""A lease that is not renewed this long is void: its router died."""
WINDOW_S = 60


class SessionState(Enum):
    """Where a session stands."""

    RUNNING = "running"
    DETACHED = "detached"
    """Its client is gone; it can be resumed."""
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One request, as replicas know it."""

    request_id: str
    tenant: str
    owner: str
    """Random id of the stream that runs it."""
    request: bytes
    """GenerateRequest with request_id, model and seed filled in."""
    target: str = ""
    speculator: str = ""
    state: SessionState = SessionState.RUNNING
    ending: bytes = b""
    """GenerationFinished of an ended session."""


class LeaseState(Enum):
    """Answer to a renewal."""

    HELD = "held"
    CANCEL_REQUESTED = "cancel"
    LOST = "lost"
    """Another stream owns the session."""
    UNKNOWN = "unknown"
    """The store does not know the session (any more)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuotaLimits:
    """Limits of one tenant; 0 is no limit."""

    max_concurrent_requests: int = 0
    tokens_per_minute: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class QuotaRefusal:
    """Why a request was not admitted."""

    limit_name: str
    limit: int
    used: int
    retry_after_s: float


class SessionStore(ABC):
    """Every method but `close` may raise SessionStoreUnavailable."""

    kind: str
    """redis or memory."""

    async def start(self) -> None:
        """Connect; fails if the store cannot be reached."""
        await self.ping()

    @abstractmethod
    async def ping(self) -> None:
        """Raise if the store does not answer."""

    @abstractmethod
    async def close(self) -> None:
        """Release connections."""

    @abstractmethod
    async def create(self, session: Session) -> bool:
        """Add a session; False if its id is in use. A failed session's id is free again."""

    @abstractmethod
    async def load(self, request_id: str) -> Session | None:
        """The session, if it is known."""

    @abstractmethod
    async def take_over(self, request_id: str, owner: str) -> None:
        """Make ``owner`` the owner: the stream that ran the session so far loses it."""

    @abstractmethod
    async def pair(self, request_id: str, owner: str, target: str, speculator: str) -> bool:
        """Note where the session runs. False if ``owner`` does not own it."""

    @abstractmethod
    async def append(self, request_id: str, owner: str, start: int, entries: Sequence[bytes]) -> LeaseState:
        """Write journal entries ``start``, ``start + 1``, ..."""

    @abstractmethod
    async def read_journal(self, request_id: str) -> list[bytes]:
        """All entries."""

    @abstractmethod
    async def finish(self, request_id: str, owner: str, state: SessionState, ending: bytes) -> None:
        """The session ended; it stays readable for its TTL."""

    @abstractmethod
    async def renew(self, request_id: str, owner: str, tenant: str) -> LeaseState:
        """Keep a running session and its place in the quota."""

    @abstractmethod
    async def request_cancel(self, request_id: str, tenant: str) -> bool:
        """Ask the owner, on whatever router, to stop. False if nothing of this tenant runs under the id."""

    @abstractmethod
    async def acquire(
        self, tenant: str, owner: str, limits: QuotaLimits, *, instead_of: str = ""
    ) -> QuotaRefusal | None:
        """Take a place among the tenant's requests, or say which limit is in the way.

        The place belongs to the ``owner`` of a session, so that nobody else who names the same request can free it.
        ``instead_of`` is the owner whose session is to be taken over: if admitted, its place is free.
        """

    @abstractmethod
    async def release(self, tenant: str, owner: str) -> None:
        """Give the place back."""

    @abstractmethod
    async def add_tokens(self, tenant: str, num_tokens: int) -> None:
        """Count tokens against this minute."""


@dataclass(slots=True)
class _Record:
    session: Session
    expires: float
    entries: list[bytes] = field(default_factory=list)
    cancel_requested: bool = False


class MemorySessionStore(SessionStore):
    """For one router, and for the time in which the real store is away."""

    kind = "memory"

    def __init__(self, *, session_ttl_s: float = 600.0, clock: Callable[[], float] = time.time) -> None:
        self._ttl_s = session_ttl_s
        self._clock = clock
        self._records: dict[str, _Record] = {}
        self._leases: dict[str, dict[str, float]] = {}
        self._tokens: dict[str, tuple[int, int]] = {}

    async def ping(self) -> None:
        """Always there."""

    async def close(self) -> None:
        """Nothing to release."""

    async def create(self, session: Session) -> bool:
        """See `SessionStore`."""
        self._expire()
        record = self._records.get(session.request_id)
        if record and record.session.state is not SessionState.FAILED:
            return False
        self._records[session.request_id] = _Record(session, self._clock() + self._ttl_s)
        return True

    async def load(self, request_id: str) -> Session | None:
        """See `SessionStore`."""
        record = self._get(request_id)
        return record.session if record else None

    async def take_over(self, request_id: str, owner: str) -> None:
        """See `SessionStore`."""
        if record := self._get(request_id):
            record.session = replace(record.session, owner=owner, state=SessionState.RUNNING)
            record.cancel_requested = False

    async def pair(self, request_id: str, owner: str, target: str, speculator: str) -> bool:
        """See `SessionStore`."""
        record = self._get(request_id)
        if record is None or record.session.owner != owner:
            return False
        record.session = replace(record.session, target=target, speculator=speculator)
        return True

    async def append(self, request_id: str, owner: str, start: int, entries: Sequence[bytes]) -> LeaseState:
        """See `SessionStore`."""
        record = self._get(request_id)
        if record is None:
            return LeaseState.UNKNOWN
        if record.session.owner != owner:
            return LeaseState.LOST
        if start > len(record.entries):
            return LeaseState.UNKNOWN
        record.entries[start:] = entries
        record.expires = self._clock() + self._ttl_s
        return LeaseState.HELD

    async def read_journal(self, request_id: str) -> list[bytes]:
        """See `SessionStore`."""
        record = self._get(request_id)
        return list(record.entries) if record else []

    async def finish(self, request_id: str, owner: str, state: SessionState, ending: bytes) -> None:
        """See `SessionStore`."""
        record = self._get(request_id)
        if record and record.session.owner == owner:
            record.session = replace(record.session, state=state, ending=ending)
            record.expires = self._clock() + self._ttl_s

    async def renew(self, request_id: str, owner: str, tenant: str) -> LeaseState:
        """See `SessionStore`."""
        record = self._get(request_id)
        if record is not None and record.session.owner != owner:
            return LeaseState.LOST
        self._leases.setdefault(tenant, {})[owner] = self._clock() + LEASE_S
        if record is None:
            return LeaseState.UNKNOWN
        record.expires = self._clock() + self._ttl_s
        return LeaseState.CANCEL_REQUESTED if record.cancel_requested else LeaseState.HELD

    async def request_cancel(self, request_id: str, tenant: str) -> bool:
        """See `SessionStore`."""
        record = self._get(request_id)
        if record is None or record.session.tenant != tenant or record.session.state is not SessionState.RUNNING:
            return False
        record.cancel_requested = True
        return True

    async def acquire(
        self, tenant: str, owner: str, limits: QuotaLimits, *, instead_of: str = ""
    ) -> QuotaRefusal | None:
        """See `SessionStore`."""
        now = self._clock()
        leases = {key: until for key, until in self._leases.get(tenant, {}).items() if until > now}
        self._leases[tenant] = leases
        num_running = len(leases) - (instead_of in leases)
        if limits.max_concurrent_requests and num_running >= limits.max_concurrent_requests:
            return concurrency_refusal(limits, num_running)
        window, used = self._tokens.get(tenant, (0, 0))
        if limits.tokens_per_minute and window == int(now) // WINDOW_S and used >= limits.tokens_per_minute:
            return token_refusal(limits, used, now)
        leases.pop(instead_of, None)
        leases[owner] = now + LEASE_S
        return None

    async def release(self, tenant: str, owner: str) -> None:
        """See `SessionStore`."""
        self._leases.get(tenant, {}).pop(owner, None)

    async def add_tokens(self, tenant: str, num_tokens: int) -> None:
        """See `SessionStore`."""
        self.count(tenant, num_tokens)

    def count(self, tenant: str, num_tokens: int) -> None:
        """`add_tokens` without waiting."""
        current = int(self._clock()) // WINDOW_S
        window, used = self._tokens.get(tenant, (current, 0))
        self._tokens[tenant] = (current, num_tokens + (used if window == current else 0))

    def _get(self, request_id: str) -> _Record | None:
        record = self._records.get(request_id)
        return record if record and record.expires > self._clock() else None

    def _expire(self) -> None:
        now = self._clock()
        for key in [key for key, record in self._records.items() if record.expires <= now]:
            del self._records[key]


def concurrency_refusal(limits: QuotaLimits, used: int) -> QuotaRefusal:
    """Too many requests run."""
    return QuotaRefusal(
        limit_name="max_concurrent_requests", limit=limits.max_concurrent_requests, used=used, retry_after_s=1.0
    )


def token_refusal(limits: QuotaLimits, used: int, now: float) -> QuotaRefusal:
    """This minute's tokens are used up."""
    return QuotaRefusal(
        limit_name="tokens_per_minute",
        limit=limits.tokens_per_minute,
        used=used,
        retry_after_s=WINDOW_S - now % WINDOW_S,
    )
