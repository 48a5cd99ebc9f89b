"""One behaviour, three stores: memory, Valkey, and Redis where it is installed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from specpool_router.sessions.redis_store import RedisSessionStore
from specpool_router.sessions.session_store import (
    LeaseState,
    MemorySessionStore,
    QuotaLimits,
    Session,
    SessionState,
    SessionStore,
)
from specpool_tools.local.embedded_store import EmbeddedValkey, find_binary


@pytest.fixture(params=["memory", "valkey", "redis-server"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[SessionStore]:
    import shutil
    from pathlib import Path

    if request.param == "memory":
        yield MemorySessionStore(session_ttl_s=0.5)
        return
    found = str(find_binary()) if request.param == "valkey" else shutil.which("redis-server")
    if found is None:
        pytest.skip("redis-server is not on PATH")
    async with EmbeddedValkey(binary=Path(found)) as server:
        real = RedisSessionStore(server.url, session_ttl_s=0.5)
        await real.start()
        assert real.kind == request.param.removesuffix("-server")
        yield real
        await real.close()


def session(owner: str = "o", **fields: Any) -> Session:
    return Session(request_id="r", tenant="t", owner=owner, request=b"\x00\xff", **fields)


async def test_session_round_trip_and_expiry(store: SessionStore) -> None:
    assert await store.create(session())
    assert not await store.create(session("other"))
    assert await store.pair("r", "o", "target:1", "speculator:2")
    assert await store.load("r") == session(target="target:1", speculator="speculator:2")
    await store.finish("r", "o", SessionState.FINISHED, b"\xfe")
    assert await store.load("r") == session(
        target="target:1", speculator="speculator:2", state=SessionState.FINISHED, ending=b"\xfe"
    )
    await asyncio.sleep(0.6)
    assert await store.load("r") is None


async def test_failed_id_is_free_again_without_its_journal(store: SessionStore) -> None:
    await store.create(session())
    await store.append("r", "o", 0, [b"a"])
    await store.finish("r", "o", SessionState.FAILED, b"")
    assert await store.create(session("new"))
    assert await store.read_journal("r") == []


async def test_journal_is_idempotent_and_fenced(store: SessionStore) -> None:
    assert await store.append("r", "o", 0, [b"a"]) is LeaseState.UNKNOWN
    await store.create(session())
    assert await store.append("r", "o", 0, [b"a", b"b"]) is LeaseState.HELD
    assert await store.append("r", "o", 1, [b"B", b"c"]) is LeaseState.HELD  # a repeated write
    assert await store.append("r", "o", 9, [b"x"]) is LeaseState.UNKNOWN  # a gap
    await store.take_over("r", "new")
    assert await store.append("r", "o", 3, [b"d"]) is LeaseState.LOST
    assert not await store.pair("r", "o", "x", "y")
    assert await store.renew("r", "o", "t") is LeaseState.LOST
    assert await store.read_journal("r") == [b"a", b"B", b"c"]


async def test_cancel_reaches_the_owner_of_the_same_tenant_only(store: SessionStore) -> None:
    await store.create(session())
    assert not await store.request_cancel("r", "stranger")
    assert await store.renew("r", "o", "t") is LeaseState.HELD
    assert await store.request_cancel("r", "t")
    assert await store.renew("r", "o", "t") is LeaseState.CANCEL_REQUESTED
    await store.finish("r", "o", SessionState.FINISHED, b"e")
    assert not await store.request_cancel("r", "t")


async def test_quotas(store: SessionStore) -> None:
    limits = QuotaLimits(max_concurrent_requests=3)
    answers = await asyncio.gather(*(store.acquire("t", f"r{i}", limits) for i in range(10)))
    assert sum(answer is None for answer in answers) == 3
    await store.release("t", f"r{answers.index(None)}")
    assert await store.acquire("t", "again", limits) is None
    assert await store.acquire("other", "r", limits) is None


async def test_a_take_over_takes_the_place_too(store: SessionStore) -> None:
    limits = QuotaLimits(max_concurrent_requests=1)
    await store.create(session())
    assert await store.acquire("t", "o", limits) is None
    assert await store.acquire("t", "new", limits, instead_of="another") is not None
    assert await store.acquire("t", "new", limits, instead_of="o") is None
    await store.take_over("r", "new")
    assert await store.renew("r", "o", "t") is LeaseState.LOST  # and has no place any more
    await store.release("t", "o")
    assert (await store.acquire("t", "more", limits)).used == 1
    await store.release("t", "new")
    assert await store.acquire("t", "more", limits) is None


async def test_tokens_per_minute(store: SessionStore) -> None:
    limits = QuotaLimits(tokens_per_minute=10)
    await store.add_tokens("t", 9)
    assert await store.acquire("t", "a", limits) is None
    await store.add_tokens("t", 1)
    refusal = await store.acquire("t", "b", limits)
    if refusal is None:  # the minute ended just now
        pytest.skip("a minute ended during the test")
    assert (refusal.limit_name, refusal.used) == ("tokens_per_minute", 10)
    assert 0 < refusal.retry_after_s <= 60
