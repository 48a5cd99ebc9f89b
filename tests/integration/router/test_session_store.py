"""One behaviour, three stores: memory, Valkey, and Redis where it is installed."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from embedded_valkey import EmbeddedValkey

from specpool.v1 import inference_pb2
from specpool_router.sessions.memory_store import MemorySessionStore
from specpool_router.sessions.redis_store import RedisSessionStore
from specpool_router.sessions.session_store import LeaseState, QuotaLimits, Session, SessionState, SessionStore
from specpool_tools.local.embedded_store import find_binary


@pytest.fixture(params=["memory", "valkey", "redis-server"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[SessionStore]:
    if request.param == "memory":
        yield MemorySessionStore(session_ttl_s=2.0)
        return
    found = str(find_binary()) if request.param == "valkey" else shutil.which("redis-server")
    if found is None:
        pytest.skip("redis-server is not on PATH")
    async with EmbeddedValkey(binary=Path(found)) as server:
        real = RedisSessionStore(server.url, session_ttl_s=2.0)
        await real.probe("test")
        assert real.kind == request.param.removesuffix("-server")
        yield real
        await real.close()


def session(owner: str = "o", **fields: Any) -> Session:
    return Session(request_id="r", tenant="t", owner=owner, **{"request": b"\x00\xff", **fields})


async def test_session_round_trip_and_expiry(store: SessionStore) -> None:
    assert await store.create(session())
    assert not await store.create(session("other"))
    assert await store.pair("r", "o", "target:1", "speculator:2")
    assert await store.load("r") == session(target="target:1", speculator="speculator:2")
    assert await store.finish("r", "o", SessionState.FINISHED, b"\xfe", b"outline")
    assert await store.load("r") == session(
        target="target:1",
        speculator="speculator:2",
        state=SessionState.FINISHED,
        ending=b"\xfe",
        request=b"outline",
    )
    await asyncio.sleep(2.1)
    assert await store.load("r") is None


async def test_what_can_be_resumed_keeps_its_request(store: SessionStore) -> None:
    await store.create(session())
    await store.finish("r", "o", SessionState.DETACHED, b"", b"outline")
    assert await store.load("r") == session(state=SessionState.DETACHED)


def test_outline_of_a_request() -> None:
    request = inference_pb2.GenerateRequest(request_id="r", model="m", text="long " * 1000)
    request.sampling.seed = 7
    outline = inference_pb2.GenerateRequest.FromString(session(request=request.SerializeToString()).outline())
    assert (outline.request_id, outline.model, outline.sampling.seed) == ("r", "m", 7)
    assert outline.ByteSize() < 20


async def test_failed_id_is_free_again_without_its_journal(store: SessionStore) -> None:
    await store.create(session())
    await store.append("r", "o", 0, [b"a"])
    await store.finish("r", "o", SessionState.FAILED, b"", b"")
    assert await store.create(session("new"))
    assert await store.read_journal("r") == []


async def test_journal_is_idempotent_and_fenced(store: SessionStore) -> None:
    assert await store.append("r", "o", 0, [b"a"]) is LeaseState.UNKNOWN
    await store.create(session())
    assert await store.append("r", "o", 0, [b"a", b"b"]) is LeaseState.HELD
    assert await store.append("r", "o", 1, [b"b", b"c"]) is LeaseState.HELD  # partly known
    assert await store.append("r", "o", 0, [b"a", b"b"]) is LeaseState.HELD  # a write that arrives late
    assert await store.append("r", "o", 9, [b"x"]) is LeaseState.UNKNOWN  # a gap
    assert await store.read_journal("r") == [b"a", b"b", b"c"]
    assert await store.take_over("r", "new", "o")
    assert await store.append("r", "o", 3, [b"d"]) is LeaseState.LOST
    assert not await store.pair("r", "o", "x", "y")
    assert await store.renew("r", "o") is LeaseState.LOST
    assert await store.append("r", "new", 3, [b"d"]) is LeaseState.HELD
    assert await store.read_journal("r") == [b"a", b"b", b"c", b"d"]


async def test_a_new_owner_may_replace_the_journal(store: SessionStore) -> None:
    await store.create(session())
    await store.append("r", "o", 0, [b"a", b"b", b"c"])
    await store.take_over("r", "new", "o")
    for _ in range(2):
        assert await store.append("r", "new", 0, [b"abc", b"d"]) is LeaseState.HELD
    assert await store.read_journal("r") == [b"abc", b"d"]


async def test_a_take_over_that_arrives_late_takes_nothing(store: SessionStore) -> None:
    await store.create(session())
    assert await store.take_over("r", "second", "o")
    assert await store.take_over("r", "second", "o")
    assert not await store.take_over("r", "first", "o")
    assert not await store.take_over("unknown", "first", "o")
    assert await store.renew("r", "second") is LeaseState.HELD


async def test_cancel_reaches_the_owner_of_the_same_tenant_only(store: SessionStore) -> None:
    await store.create(session())
    assert not await store.request_cancel("r", "stranger")
    assert await store.renew("r", "o") is LeaseState.HELD
    assert await store.request_cancel("r", "t")
    assert await store.renew("r", "o") is LeaseState.CANCEL_REQUESTED
    assert await store.append("r", "o", 0, [b"a"]) is LeaseState.CANCEL_REQUESTED
    await store.finish("r", "o", SessionState.FINISHED, b"e", b"")
    assert not await store.request_cancel("r", "t")


async def test_only_the_owner_forgets_a_session(store: SessionStore) -> None:
    await store.create(session())
    await store.delete("r", "stranger")
    assert await store.load("r") == session()
    for _ in range(2):
        await store.delete("r", "o")
    assert await store.load("r") is None


async def test_quotas(store: SessionStore) -> None:
    limits = QuotaLimits(max_concurrent_requests=3)
    answers = await asyncio.gather(*(store.acquire("t", f"r{i}", limits) for i in range(10)))
    assert sum(answer is None for answer in answers) == 3
    await store.release("t", f"r{answers.index(None)}")
    assert await store.acquire("t", "again", limits) is None
    assert await store.acquire("other", "r", limits) is None


async def test_a_place_is_taken_once(store: SessionStore) -> None:
    limits = QuotaLimits(max_concurrent_requests=2)
    for _ in range(3):
        assert await store.acquire("t", "a", limits) is None
    assert await store.acquire("t", "b", limits) is None
    refusal = await store.acquire("t", "c", limits)
    assert refusal is not None
    assert refusal.used == 2


async def test_renewal_revives_no_place(store: SessionStore) -> None:
    """A renewal that was on its way when the place was released."""
    limits = QuotaLimits(max_concurrent_requests=1)
    assert await store.acquire("t", "a", limits) is None
    assert await store.renew_places("t", ["a"]) == []
    await store.release("t", "a")
    assert await store.renew_places("t", ["a", "never"]) == ["a", "never"]
    assert await store.acquire("t", "b", limits) is None


async def test_a_take_over_takes_the_place_too(store: SessionStore) -> None:
    limits = QuotaLimits(max_concurrent_requests=1)
    await store.create(session())
    assert await store.acquire("t", "o", limits) is None
    assert await store.acquire("t", "new", limits, instead_of="another") is not None
    for _ in range(2):
        assert await store.acquire("t", "new", limits, instead_of="o") is None
    assert await store.renew_places("t", ["o"]) == ["o"]
    await store.release("t", "o")
    refusal = await store.acquire("t", "more", limits)
    assert refusal is not None
    assert refusal.used == 1
    await store.release("t", "new")
    assert await store.acquire("t", "more", limits) is None


async def test_tokens_per_minute(store: SessionStore) -> None:
    limits = QuotaLimits(tokens_per_minute=10)
    await store.add_tokens("t", "router", 0, 9)
    assert await store.acquire("t", "a", limits) is None
    for _ in range(3):  # repeated, and one that comes late
        await store.add_tokens("t", "router", 9, 10)
    await store.add_tokens("t", "router", 0, 9)
    refusal = await store.acquire("t", "b", limits)
    if refusal is None:  # the minute ended just now
        pytest.skip("a minute ended during the test")
    assert (refusal.limit_name, refusal.used) == ("tokens_per_minute", 10)
    assert 0 < refusal.retry_after_s <= 60
    await store.add_tokens("t", "another router", 0, 3)
    refusal = await store.acquire("t", "b", limits)
    if refusal is None:
        pytest.skip("a minute ended during the test")
    assert refusal.used == 13


async def test_memory_of_sessions_that_do_not_run_is_bounded() -> None:
    store = MemorySessionStore(max_bytes=1000)
    for number in range(5):
        each = Session(request_id=str(number), tenant="t", owner="o", request=b"x" * 300)
        await store.create(each)
        await store.finish(str(number), "o", SessionState.DETACHED, b"", b"")
    assert [number for number in range(5) if await store.load(str(number))] == [2, 3, 4]
