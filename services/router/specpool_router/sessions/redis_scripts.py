"""The Lua of the session store on Redis. Plain commands only: Redis from 6 on, Valkey, no HEXPIRE.

Every script may be executed twice: a client that got no answer in time sends it again, and the first one may have been
executed, or may be executed late. So each says who asks, and has done nothing new the second time.

Keys, each with a time to live ({...} keeps a session's or a tenant's keys on one shard):
    PREFIX:session:{ID}              hash: the session, "cancel" when cancellation was asked for
    PREFIX:session:{ID}:journal      list: one serialized delta per entry
    PREFIX:quota:{TENANT}:leases     sorted set: owner of a session by expiry
    PREFIX:quota:{TENANT}:N          tokens used in minute N
    PREFIX:quota:{TENANT}:from:ID    tokens that counter ID has reported in all
    PREFIX:probe                     what `PROBE` writes
"""

from __future__ import annotations

import hashlib
from typing import Final


class Script:
    """A Lua script and the digest under which the server keeps it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


# KEYS of all session scripts: the session, its journal. ARGV begins with owner, ttl ms.
# ARGV: then field, value, ... An owner that comes again created it already.
CREATE: Final = Script("""
local held = redis.call('HMGET', KEYS[1], 'owner', 'state')
if held[1] == ARGV[1] then return 1 end
if held[1] and held[2] ~= 'failed' then return 0 end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('HSET', KEYS[1], 'owner', ARGV[1], unpack(ARGV, 3))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
""")

# ARGV: then field, value, ...
UPDATE: Final = Script("""
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
""")

DELETE: Final = Script("""
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1], KEYS[2])
return 1
""")

# ARGV: then the owner that it is taken from: a take-over that arrives late takes nothing from a later one.
TAKE_OVER: Final = Script("""
local owner = redis.call('HGET', KEYS[1], 'owner')
if owner == ARGV[1] then return 1 end
if owner ~= ARGV[3] then return 0 end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'state', 'running')
redis.call('HDEL', KEYS[1], 'cancel')
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
""")

# ARGV: then start, entries... An owner that writes from the start for the first time replaces what there was; what it
# wrote before stays, so that a late repetition neither cuts the journal nor doubles entries.
APPEND: Final = Script("""
local session = redis.call('HMGET', KEYS[1], 'owner', 'writer', 'cancel')
if not session[1] then return 'unknown' end
if session[1] ~= ARGV[1] then return 'lost' end
local start = tonumber(ARGV[3])
if start == 0 and session[2] ~= ARGV[1] then
    redis.call('DEL', KEYS[2])
    redis.call('HSET', KEYS[1], 'writer', ARGV[1])
end
local length = redis.call('LLEN', KEYS[2])
if start > length then return 'unknown' end
for i = 4 + length - start, #ARGV do redis.call('RPUSH', KEYS[2], ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return session[3] and 'cancel' or 'held'
""")

RENEW: Final = Script("""
local session = redis.call('HMGET', KEYS[1], 'owner', 'cancel')
if not session[1] then return 'unknown' end
if session[1] ~= ARGV[1] then return 'lost' end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return session[2] and 'cancel' or 'held'
""")

# ARGV: tenant.
CANCEL: Final = Script("""
local session = redis.call('HMGET', KEYS[1], 'tenant', 'state')
if session[1] ~= ARGV[1] or session[2] ~= 'running' then return 0 end
redis.call('HSET', KEYS[1], 'cancel', '1')
return 1
""")

# KEYS: leases, token counter without its minute. Time is the server's, so that routers whose clocks differ agree.
# ARGV: owner, the owner that it replaces, max requests, tokens per minute, lease s, window s.
# Returns which limit (0: admitted), used, now. An owner that has a place keeps it.
ACQUIRE: Final = Script("""
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then
    local running = redis.call('ZCARD', KEYS[1])
    if redis.call('ZSCORE', KEYS[1], ARGV[2]) then running = running - 1 end
    if tonumber(ARGV[3]) > 0 and running >= tonumber(ARGV[3]) then return {1, running, tostring(now)} end
    local used = tonumber(redis.call('GET', KEYS[2] .. math.floor(now / ARGV[6])) or '0')
    if tonumber(ARGV[4]) > 0 and used >= tonumber(ARGV[4]) then return {2, used, tostring(now)} end
    redis.call('ZREM', KEYS[1], ARGV[2])
end
redis.call('ZADD', KEYS[1], now + ARGV[5], ARGV[1])
redis.call('PEXPIRE', KEYS[1], math.floor(ARGV[5] * 2000))
return {0, 0, tostring(now)}
""")

# KEYS: leases. ARGV: lease s, owners... Only places that there are: one that was released stays so. Returns the others.
RENEW_PLACES: Final = Script("""
local time = redis.call('TIME')
local missing = {}
for i = 2, #ARGV do
    if redis.call('ZSCORE', KEYS[1], ARGV[i]) then
        redis.call('ZADD', KEYS[1], 'XX', time[1] + time[2] / 1e6 + ARGV[1], ARGV[i])
    else missing[#missing + 1] = ARGV[i] end
end
redis.call('PEXPIRE', KEYS[1], math.floor(ARGV[1] * 2000))
return missing
""")

# KEYS: leases. ARGV: owner.
RELEASE: Final = Script("return redis.call('ZREM', KEYS[1], ARGV[1])")

# KEYS: what this counter reported, token counter without its minute.
# ARGV: what the counter knows to be counted, its total, window s. A total is counted once, however often it comes.
ADD_TOKENS: Final = Script("""
local counted = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), tonumber(ARGV[1]))
local new = tonumber(ARGV[2]) - counted
if new <= 0 then return 0 end
local key = KEYS[2] .. math.floor(redis.call('TIME')[1] / ARGV[3])
redis.call('INCRBY', key, string.format('%.0f', new))
redis.call('EXPIRE', key, ARGV[3] * 2)
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3] * 2)
return 1
""")

# KEYS: any key of its own. What the others do: a store that is out of memory or read-only fails here, too.
PROBE: Final = Script("""
redis.call('HSET', KEYS[1], 'writer', ARGV[1])
redis.call('PEXPIRE', KEYS[1], 60000)
return 1
""")

ALL: Final = (
    *(CREATE, UPDATE, DELETE, TAKE_OVER, APPEND, RENEW, CANCEL),
    *(ACQUIRE, RENEW_PLACES, RELEASE, ADD_TOKENS, PROBE),
)
