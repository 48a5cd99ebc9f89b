"""The session store: pairings, resume journal, cancel flags and quotas, shared by router replicas.

Nothing here is on the path of a token: admission asks once, and `journal.JournalWriter` writes behind the stream.
A session has one owner at a time, the stream that runs it. A stream that resumes it becomes the owner, and what the
former one still writes is refused. Every write may be made twice, and late: it says whose it is, and the second time
changes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from specpool.v1 import inference_pb2

LEASE_S = 15.0
"""Seconds after which a lease that is not renewed is void: its router died."""
WINDOW_S = 60


class SessionState(Enum):
    """Where a session stands."""

    RUNNING = "running"
    DETACHED = "detached"
    """The session's client is gone; the session can be resumed."""
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One request, as all routers know it."""

    request_id: str
    tenant: str
    owner: str
    """Random id of the stream that runs it."""
    request: bytes
    """Serialized GenerateRequest with request_id, model and seed filled in; of an ended session no more than these."""
    target: str = ""
    speculator: str = ""
    state: SessionState = SessionState.RUNNING
    ending: bytes = b""
    """The serialized GenerationFinished of an ended session."""

    def outline(self) -> bytes:
        """The request without its prompt: what is needed to tell of a session that has ended."""
        request = inference_pb2.GenerateRequest.FromString(self.request)
        outline = inference_pb2.GenerateRequest(request_id=request.request_id, model=request.model)
        outline.sampling.seed = request.sampling.seed
        return outline.SerializeToString()


class LeaseState(Enum):
    """What the store says of a lease that was renewed or written."""

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
    """What a session store can do. Every method but `close` may raise SessionStoreUnavailable."""

    kind: str
    """Kind of the store: `redis`, `valkey` or `memory`."""

    @abstractmethod
    async def probe(self, writer: str) -> None:
        """Write as the other methods do; raises if that fails."""

    @abstractmethod
    async def close(self) -> None:
        """Release connections."""

    @abstractmethod
    async def create(self, session: Session) -> bool:
        """Add a session; False if its id is another owner's. A failed session's id is free again."""

    @abstractmethod
    async def load(self, request_id: str) -> Session | None:
        """The session, if it is known."""

    @abstractmethod
    async def take_over(self, request_id: str, owner: str, former: str) -> bool:
        """Make ``owner`` the owner: the stream that ran the session loses it. False unless ``former`` owns it."""

    @abstractmethod
    async def pair(self, request_id: str, owner: str, target: str, speculator: str) -> bool:
        """Note where the session runs. False if ``owner`` does not own it."""

    @abstractmethod
    async def append(self, request_id: str, owner: str, start: int, entries: Sequence[bytes]) -> LeaseState:
        """Write journal entries ``start``, ``start + 1``, ...; from 0 on, in place of what other owners wrote."""

    @abstractmethod
    async def read_journal(self, request_id: str) -> list[bytes]:
        """All entries of a session's journal, in order."""

    @abstractmethod
    async def finish(self, request_id: str, owner: str, state: SessionState, ending: bytes, outline: bytes) -> bool:
        """End a session; it stays readable for its TTL. A finished one keeps no more than the request's outline."""

    @abstractmethod
    async def delete(self, request_id: str, owner: str) -> None:
        """Forget a session that never began."""

    @abstractmethod
    async def renew(self, request_id: str, owner: str) -> LeaseState:
        """Keep a running session for another `LEASE_S`."""

    @abstractmethod
    async def request_cancel(self, request_id: str, tenant: str) -> bool:
        """Ask the owner, on whatever router, to stop. False if nothing of this tenant runs under the id."""

    @abstractmethod
    async def acquire(
        self, tenant: str, owner: str, limits: QuotaLimits, *, instead_of: str = ""
    ) -> QuotaRefusal | None:
        """Take a place among the tenant's requests, or say which limit is in the way.

        The place belongs to the ``owner`` of a session, so that nobody else who names the same request can free it;
        who has a place keeps it. ``instead_of`` is the owner whose session is to be taken over: if admitted, its place
        is free.
        """

    @abstractmethod
    async def renew_places(self, tenant: str, owners: Sequence[str]) -> list[str]:
        """Keep these places another `LEASE_S`. Returns the owners that have none: renewal gives none back."""

    @abstractmethod
    async def release(self, tenant: str, owner: str) -> None:
        """Give the owner's place back."""

    @abstractmethod
    async def add_tokens(self, tenant: str, counter: str, counted: int, total: int) -> None:
        """Count tokens against this minute: ``counter`` has seen ``total``, of which it knows ``counted`` to be in."""


def concurrency_refusal(limits: QuotaLimits, used: int) -> QuotaRefusal:
    """The refusal where too many requests run."""
    return QuotaRefusal(
        limit_name="max_concurrent_requests", limit=limits.max_concurrent_requests, used=used, retry_after_s=1.0
    )


def token_refusal(limits: QuotaLimits, used: int, now: float) -> QuotaRefusal:
    """The refusal where this minute's tokens are used up."""
    return QuotaRefusal(
        limit_name="tokens_per_minute",
        limit=limits.tokens_per_minute,
        used=used,
        retry_after_s=WINDOW_S - now % WINDOW_S,
    )
