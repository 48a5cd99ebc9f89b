"""A session that this router runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from specpool_router.auth.tenants import Tenant
from specpool_router.sessions.session_store import Session, SessionState


@dataclass(slots=True, eq=False)
class Lease:
    """A session that this router runs, and what the store does not have of it yet."""

    session: Session
    tenant: Tenant
    stop: Callable[[SessionState], None]
    """Called when the session was cancelled elsewhere (CANCELLED) or another stream took it over (FAILED)."""
    journal: list[bytes] = field(default_factory=list)
    num_written: int = 0
    began: bool = False
    """Whether the client got anything."""
    is_adopted: bool = False
    """Whether it was begun without asking the store, which may know the session as another owner's."""
    pairing_written: bool = True
    ended: tuple[SessionState, bytes] | None = None
    end_written: bool = False
    unwritten_since: float | None = None
    """Time at which the oldest thing came that the store lacks."""
    last_write: float = 0.0
    written: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while the store lacks nothing, or never will get what it lacks."""

    def __post_init__(self) -> None:
        self.written.set()

    @property
    def never_began(self) -> bool:
        """Whether the request failed before its client got anything: nobody can miss it."""
        return self.ended is not None and self.ended[0] is SessionState.FAILED and not self.began

    @property
    def is_unwritten(self) -> bool:
        """Whether the store lacks something."""
        return (
            self.num_written < len(self.journal)
            or not self.pairing_written
            or (self.ended is not None and not self.end_written)
        )

    @property
    def num_bytes(self) -> int:
        """Bytes that the lease keeps in memory after its end."""
        return len(self.session.request) + sum(map(len, self.journal))
