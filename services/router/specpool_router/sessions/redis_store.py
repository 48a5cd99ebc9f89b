"""The session store on Redis or Valkey; its keys and scripts are in `redis_scripts`."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, Final, TypeVar

import redis.asyncio as redis
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from specpool.errors import SessionStoreMisconfigured, SessionStoreRefused, SessionStoreUnavailable
from specpool_router.sessions import redis_scripts as scripts
from specpool_router.sessions.redis_lane import RedisLane
from specpool_router.sessions.redis_scripts import Script
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
from specpool_router.sessions.store_url import check_store_url, without_password

_TIMEOUT_S: Final = 1.0
_MAX_CONNECTIONS: Final = 4
"""Most connections: one for writes, one for reads, and one to spare for each while a former one ends."""
_MAX_READS: Final = 16
"""Most reads at once: what they read may be large."""
_T = TypeVar("_T")
# The server says no to one command; of these it says no to all writes, for now.
_UNUSABLE: Final = (
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.ClusterDownError,
)
_UNUSABLE_WORDS: Final = ("MISCONF", "NOREPLICAS", "UNKILLABLE", "BUSY")
# Waiting does not help against these.
_REFUSED_USER: Final = (
    exceptions.AuthenticationError,
    exceptions.AuthenticationWrongNumberOfArgsError,
    exceptions.NoPermissionError,
)


class RedisSessionStore(SessionStore):
    """The store that all routers share."""

    kind = "redis"

    def __init__(self, url: str, *, session_ttl_s: float = 600.0, prefix: str = "specpool") -> None:
        url = url.strip()
        check_store_url(url)
        self._url = without_password(url)
        self._ttl_ms = int(session_ttl_s * 1000)
        self._prefix = prefix
        self._identified = False
        pool = redis.BlockingConnectionPool.from_url(
            url,
            max_connections=_MAX_CONNECTIONS,
            timeout=_TIMEOUT_S,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),
            protocol=2,  # nothing newer is needed, and any server speaks it
        )
        self._redis: Any = redis.Redis.from_pool(pool)
        self._writes = RedisLane(self._redis)
        self._reads = RedisLane(self._redis, max_commands=_MAX_READS)

    async def probe(self, writer: str) -> None:
        if not self._identified:
            await self._identify()
        await self._run(scripts.PROBE, [f"{self._prefix}:probe"], [writer])

    async def close(self) -> None:
        await self._writes.close()
        await self._reads.close()
        await self._redis.aclose()

    async def create(self, session: Session) -> bool:
        fields = [item for pair in _to_fields(session).items() for item in pair]
        return bool(await self._of_session(scripts.CREATE, session.request_id, session.owner, *fields))

    async def load(self, request_id: str) -> Session | None:
        fields: dict[bytes, bytes] = await self._answer(self._reads.send("HGETALL", self._keys(request_id)[0]))
        return _from_fields(request_id, fields) if fields else None

    async def take_over(self, request_id: str, owner: str, former: str) -> bool:
        return bool(await self._of_session(scripts.TAKE_OVER, request_id, owner, former))

    async def pair(self, request_id: str, owner: str, target: str, speculator: str) -> bool:
        fields = ("target", target, "speculator", speculator)
        return bool(await self._of_session(scripts.UPDATE, request_id, owner, *fields))

    async def append(self, request_id: str, owner: str, start: int, entries: Sequence[bytes]) -> LeaseState:
        return LeaseState((await self._of_session(scripts.APPEND, request_id, owner, start, *entries)).decode())

    async def read_journal(self, request_id: str) -> list[bytes]:
        entries: list[bytes] = await self._answer(self._reads.send("LRANGE", self._keys(request_id)[1], 0, -1))
        return entries

    async def finish(self, request_id: str, owner: str, state: SessionState, ending: bytes, outline: bytes) -> bool:
        fields: list[str | bytes] = ["state", state.value, "ending", ending]
        if ending:
            fields += ["request", outline]
        return bool(await self._of_session(scripts.UPDATE, request_id, owner, *fields))

    async def delete(self, request_id: str, owner: str) -> None:
        await self._of_session(scripts.DELETE, request_id, owner)

    async def renew(self, request_id: str, owner: str) -> LeaseState:
        return LeaseState((await self._of_session(scripts.RENEW, request_id, owner)).decode())

    async def request_cancel(self, request_id: str, tenant: str) -> bool:
        return bool(await self._run(scripts.CANCEL, self._keys(request_id), [tenant]))

    async def acquire(
        self, tenant: str, owner: str, limits: QuotaLimits, *, instead_of: str = ""
    ) -> QuotaRefusal | None:
        keys = [self._quota_key(tenant, "leases"), self._quota_key(tenant, "")]
        wanted = [owner, instead_of, limits.max_concurrent_requests, limits.tokens_per_minute, LEASE_S, WINDOW_S]
        refused, used, now = await self._run(scripts.ACQUIRE, keys, wanted)
        if refused == 1:
            return concurrency_refusal(limits, used)
        return token_refusal(limits, used, float(now)) if refused == 2 else None

    async def renew_places(self, tenant: str, owners: Sequence[str]) -> list[str]:
        missing = await self._run(scripts.RENEW_PLACES, [self._quota_key(tenant, "leases")], [LEASE_S, *owners])
        return [owner.decode() for owner in missing]

    async def release(self, tenant: str, owner: str) -> None:
        await self._run(scripts.RELEASE, [self._quota_key(tenant, "leases")], [owner])

    async def add_tokens(self, tenant: str, counter: str, counted: int, total: int) -> None:
        keys = [self._quota_key(tenant, f"from:{counter}"), self._quota_key(tenant, "")]
        await self._run(scripts.ADD_TOKENS, keys, [counted, total, WINDOW_S])

    async def _identify(self) -> None:
        """Learn what kind of server answers; a replica or a Sentinel answers, too, but takes no writes."""
        info: dict[str, Any] = await self._answer(self._reads.send("INFO"))
        if info.get("redis_mode") == "sentinel":
            raise self._misconfigured("it is a Sentinel; name the primary that it watches")
        if info.get("role") == "slave":
            primary = f"{info.get('master_host')}:{info.get('master_port')}"
            raise self._misconfigured(f"it is a replica of {primary} and takes no writes; name the primary")
        self.kind = "valkey" if "valkey_version" in info else "redis"
        self._identified = True

    async def _of_session(self, script: Script, request_id: str, owner: str, *arguments: object) -> Any:
        return await self._run(script, self._keys(request_id), [owner, self._ttl_ms, *arguments])

    async def _run(self, script: Script, keys: Sequence[str], arguments: Sequence[object]) -> Any:
        return await self._answer(self._writes.run(script, keys, arguments))

    async def _answer(self, answer: Awaitable[_T]) -> _T:
        try:
            return await answer
        except (exceptions.RedisError, OSError) as error:
            raise self._as_ours(error) from error

    def _as_ours(self, error: Exception) -> SessionStoreUnavailable:
        # What a server says while a connection is made may come as the cause of a ConnectionError.
        said = error.__cause__ if isinstance(error.__cause__, exceptions.RedisError) else error
        text = str(said).rstrip(".") or type(said).__name__
        if isinstance(said, _REFUSED_USER):
            return self._misconfigured(f"it refuses this user ({text})")
        if isinstance(said, exceptions.InvalidResponse):
            return self._misconfigured("what answers there is neither Redis nor Valkey")
        if not isinstance(said, exceptions.ResponseError):
            return self._unavailable(text)
        if "DB index" in text:
            return self._misconfigured(text)
        if isinstance(said, _UNUSABLE) or text.startswith(_UNUSABLE_WORDS):
            return self._unavailable(text)
        return SessionStoreRefused(
            f"session store {self._url} refuses an operation: {text}", metadata={"url": self._url}
        )

    def _unavailable(self, why: str) -> SessionStoreUnavailable:
        return SessionStoreUnavailable(
            f"session store {self._url} cannot be used: {why}. Start it, correct session_store, "
            "or set memory:// to run one router without it",
            metadata={"url": self._url},
        )

    def _misconfigured(self, why: str) -> SessionStoreMisconfigured:
        return SessionStoreMisconfigured(
            f"session_store is {self._url!r}: {why}", metadata={"field": "session_store", "value": self._url}
        )

    def _keys(self, request_id: str) -> list[str]:
        session = f"{self._prefix}:session:{{{request_id}}}"
        return [session, f"{session}:journal"]

    def _quota_key(self, tenant: str, name: str) -> str:
        return f"{self._prefix}:quota:{{{tenant}}}:{name}"


def _to_fields(session: Session) -> dict[str, str | bytes]:
    """The fields of a session's hash, all but the owner."""
    return {
        "tenant": session.tenant,
        "request": session.request,
        "target": session.target,
        "speculator": session.speculator,
        "state": session.state.value,
        "ending": session.ending,
    }


def _from_fields(request_id: str, fields: dict[bytes, bytes]) -> Session:
    return Session(
        request_id=request_id,
        tenant=fields[b"tenant"].decode(),
        owner=fields[b"owner"].decode(),
        request=fields[b"request"],
        target=fields[b"target"].decode(),
        speculator=fields[b"speculator"].decode(),
        state=SessionState(fields[b"state"].decode()),
        ending=fields[b"ending"],
    )
