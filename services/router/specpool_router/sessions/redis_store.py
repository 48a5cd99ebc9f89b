"""Session store on Redis or Valkey. Plain commands and Lua: works from Redis 6 on, no HEXPIRE.

Keys, each with a TTL ({...} keeps a session's or a tenant's keys on one shard):
    PREFIX:session:{ID}          hash: the session, "cancel" when cancellation was asked for
    PREFIX:session:{ID}:journal  list: one serialized delta per entry
    PREFIX:quota:{TENANT}:leases sorted set: owner of a session by expiry
    PREFIX:quota:{TENANT}:N      tokens used in minute N
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from specpool.errors import ConfigError, SessionStoreUnavailable
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

_TIMEOUT_S: Final = 1.0
_T = TypeVar("_T")

_CREATE: Final = """
local state = redis.call('HGET', KEYS[1], 'state')
if state and state ~= 'failed' then return 0 end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
"""
# ARGV: owner, ttl ms, then field, value, ...
_UPDATE: Final = """
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
"""
_TAKE_OVER: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'state', 'running')
redis.call('HDEL', KEYS[1], 'cancel')
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
"""
# ARGV: owner, ttl ms, start, entries...
_APPEND: Final = """
local owner = redis.call('HGET', KEYS[1], 'owner')
if not owner then return 'unknown' end
if owner ~= ARGV[1] then return 'lost' end
local start = tonumber(ARGV[3])
local length = redis.call('LLEN', KEYS[2])
if start > length then return 'unknown' end
if start == 0 then redis.call('DEL', KEYS[2])
elseif start < length then redis.call('LTRIM', KEYS[2], 0, start - 1) end
for i = 4, #ARGV do redis.call('RPUSH', KEYS[2], ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 'held'
"""
_RENEW: Final = """
local owner = redis.call('HGET', KEYS[1], 'owner')
if not owner then return 'unknown' end
if owner ~= ARGV[1] then return 'lost' end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
if redis.call('HEXISTS', KEYS[1], 'cancel') == 1 then return 'cancel' end
return 'held'
"""
# Time is the server's, so that replicas whose clocks differ agree.
_RENEW_LEASE: Final = """
local now = redis.call('TIME')
redis.call('ZADD', KEYS[1], now[1] + now[2] / 1e6 + ARGV[2], ARGV[1])
redis.call('PEXPIRE', KEYS[1], math.floor(ARGV[2] * 2000))
return 1
"""
_CANCEL: Final = """
local session = redis.call('HMGET', KEYS[1], 'tenant', 'state')
if session[1] ~= ARGV[1] or session[2] ~= 'running' then return 0 end
redis.call('HSET', KEYS[1], 'cancel', '1')
return 1
"""
# KEYS: leases, token counter without its minute.
# ARGV: owner, the owner that it replaces, max requests, tokens per minute, lease s, window s.
# One shard holds both because of the hash tag. Returns which limit (0: admitted), used, now.
_ACQUIRE: Final = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local running = redis.call('ZCARD', KEYS[1])
if redis.call('ZSCORE', KEYS[1], ARGV[2]) then running = running - 1 end
if tonumber(ARGV[3]) > 0 and running >= tonumber(ARGV[3]) then return {1, running, tostring(now)} end
local used = tonumber(redis.call('GET', KEYS[2] .. math.floor(now / ARGV[6])) or '0')
if tonumber(ARGV[4]) > 0 and used >= tonumber(ARGV[4]) then return {2, used, tostring(now)} end
redis.call('ZREM', KEYS[1], ARGV[2])
redis.call('ZADD', KEYS[1], now + ARGV[5], ARGV[1])
redis.call('PEXPIRE', KEYS[1], math.floor(ARGV[5] * 2000))
return {0, running, tostring(now)}
"""
_ADD_TOKENS: Final = """
local key = KEYS[1] .. math.floor(redis.call('TIME')[1] / ARGV[2])
redis.call('INCRBY', key, ARGV[1])
redis.call('EXPIRE', key, ARGV[2] * 2)
return 1
"""


class RedisSessionStore(SessionStore):
    """Shared by all replicas of the router."""

    kind = "redis"

    def __init__(self, url: str, *, session_ttl_s: float = 600.0, prefix: str = "specpool") -> None:
        self._url = without_password(url)
        self._ttl_ms = int(session_ttl_s * 1000)
        self._prefix = prefix
        try:
            self._redis: Any = redis.Redis.from_url(
                url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S, retry=Retry(NoBackoff(), 1)
            )
        except ValueError as error:
            raise ConfigError(
                f"session_store is {self._url!r}: {error}",
                metadata={"field": "session_store", "value": self._url, "accepted": "redis://HOST:PORT or memory://"},
            ) from error

    async def start(self) -> None:
        """Connect, and learn which of the two it is."""
        info = await self._call(lambda: self._redis.info("server"))
        self.kind = "valkey" if "valkey_version" in info else "redis"

    async def ping(self) -> None:
        """See `SessionStore`."""
        await self._call(self._redis.ping)

    async def close(self) -> None:
        """See `SessionStore`."""
        await self._redis.aclose()

    async def create(self, session: Session) -> bool:
        """See `SessionStore`."""
        fields = [item for pair in _to_fields(session).items() for item in pair]
        return bool(await self._eval(_CREATE, self._keys(session.request_id), [self._ttl_ms, *fields]))

    async def load(self, request_id: str) -> Session | None:
        """See `SessionStore`."""
        fields = await self._call(lambda: self._redis.hgetall(self._keys(request_id)[0]))
        return _from_fields(request_id, fields) if fields else None

    async def take_over(self, request_id: str, owner: str) -> None:
        """See `SessionStore`."""
        await self._eval(_TAKE_OVER, self._keys(request_id), [owner, self._ttl_ms])

    async def pair(self, request_id: str, owner: str, target: str, speculator: str) -> bool:
        """See `SessionStore`."""
        fields = ["target", target, "speculator", speculator]
        return bool(await self._eval(_UPDATE, self._keys(request_id), [owner, self._ttl_ms, *fields]))

    async def append(self, request_id: str, owner: str, start: int, entries: Sequence[bytes]) -> LeaseState:
        """See `SessionStore`."""
        arguments = [owner, self._ttl_ms, start, *entries]
        return LeaseState((await self._eval(_APPEND, self._keys(request_id), arguments)).decode())

    async def read_journal(self, request_id: str) -> list[bytes]:
        """See `SessionStore`."""
        entries: list[bytes] = await self._call(lambda: self._redis.lrange(self._keys(request_id)[1], 0, -1))
        return entries

    async def finish(self, request_id: str, owner: str, state: SessionState, ending: bytes) -> None:
        """See `SessionStore`."""
        fields = ["state", state.value, "ending", ending]
        await self._eval(_UPDATE, self._keys(request_id), [owner, self._ttl_ms, *fields])

    async def renew(self, request_id: str, owner: str, tenant: str) -> LeaseState:
        """See `SessionStore`."""
        state = LeaseState((await self._eval(_RENEW, self._keys(request_id), [owner, self._ttl_ms])).decode())
        if state is not LeaseState.LOST:
            await self._eval(_RENEW_LEASE, [self._quota_key(tenant, "leases")], [owner, LEASE_S])
        return state

    async def request_cancel(self, request_id: str, tenant: str) -> bool:
        """See `SessionStore`."""
        return bool(await self._eval(_CANCEL, [self._keys(request_id)[0]], [tenant]))

    async def acquire(
        self, tenant: str, owner: str, limits: QuotaLimits, *, instead_of: str = ""
    ) -> QuotaRefusal | None:
        """See `SessionStore`."""
        keys = [self._quota_key(tenant, "leases"), self._quota_key(tenant, "")]
        wanted = [owner, instead_of, limits.max_concurrent_requests, limits.tokens_per_minute, LEASE_S, WINDOW_S]
        refused, used, now = await self._eval(_ACQUIRE, keys, wanted)
        if refused == 1:
            return concurrency_refusal(limits, used)
        return token_refusal(limits, used, float(now)) if refused == 2 else None

    async def release(self, tenant: str, owner: str) -> None:
        """See `SessionStore`."""
        await self._call(lambda: self._redis.zrem(self._quota_key(tenant, "leases"), owner))

    async def add_tokens(self, tenant: str, num_tokens: int) -> None:
        """See `SessionStore`."""
        await self._eval(_ADD_TOKENS, [self._quota_key(tenant, "")], [num_tokens, WINDOW_S])

    def _keys(self, request_id: str) -> list[str]:
        session = f"{self._prefix}:session:{{{request_id}}}"
        return [session, f"{session}:journal"]

    def _quota_key(self, tenant: str, name: str) -> str:
        return f"{self._prefix}:quota:{{{tenant}}}:{name}"

    async def _eval(self, script: str, keys: Sequence[str], arguments: Sequence[object]) -> Any:
        return await self._call(lambda: self._redis.eval(script, len(keys), *keys, *arguments))

    async def _call(self, operation: Callable[[], Awaitable[_T]]) -> _T:
        try:
            return await operation()
        except (RedisError, OSError) as error:
            raise SessionStoreUnavailable(
                f"session store {self._url} cannot be used: {str(error).rstrip('.')}. Start it, correct session_store, "
                "or set memory:// to run one router without it",
                metadata={"url": self._url},
            ) from error


def without_password(url: str) -> str:
    """The URL as it may be shown."""
    url = re.sub(r"(?<=://)([^/@:]*):[^/]*@", r"\1:***@", url)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", url)


def _to_fields(session: Session) -> dict[str, str | bytes]:
    return {
        "tenant": session.tenant,
        "owner": session.owner,
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
