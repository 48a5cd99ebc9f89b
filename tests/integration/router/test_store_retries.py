"""A store that executes what it is asked and whose answer is lost: it is asked again, and nothing is done twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from store_servers import Proxy, redis_server

from specpool_router.sessions.redis_store import RedisSessionStore
from specpool_router.sessions.session_store import LeaseState, QuotaLimits, Session, SessionState

LIMITS = QuotaLimits(max_concurrent_requests=2, tokens_per_minute=100)


@pytest.fixture
async def spoiled(store_binary: Path, tmp_path: Path) -> AsyncIterator[tuple[RedisSessionStore, Proxy]]:
    async with redis_server(store_binary, tmp_path) as server, Proxy(server, tmp_path / "proxy.sock") as proxy:
        store = RedisSessionStore(proxy.url)
        await store.probe("test")  # connects, loads the scripts
        yield store, proxy
        await store.close()


def session(owner: str = "o") -> Session:
    return Session(request_id="r", tenant="t", owner=owner, request=b"request")


async def test_a_session_is_created_once(spoiled: tuple[RedisSessionStore, Proxy]) -> None:
    store, proxy = spoiled
    proxy.drop_answers()
    assert await store.create(session())
    assert proxy.dropped.is_set()
    assert not await store.create(session("another"))


async def test_a_place_is_taken_once(spoiled: tuple[RedisSessionStore, Proxy]) -> None:
    store, proxy = spoiled
    proxy.drop_answers()
    assert await store.acquire("t", "a", LIMITS) is None
    assert proxy.dropped.is_set()
    assert await store.acquire("t", "b", LIMITS) is None
    proxy.drop_answers()
    assert await store.acquire("t", "c", LIMITS, instead_of="a") is None
    assert proxy.dropped.is_set()
    refusal = await store.acquire("t", "d", LIMITS)
    assert refusal is not None
    assert refusal.used == 2
    proxy.drop_answers()
    await store.release("t", "b")
    assert await store.renew_places("t", ["b", "c"]) == ["b"]


async def test_the_last_place_is_not_refused_to_who_has_it(spoiled: tuple[RedisSessionStore, Proxy]) -> None:
    store, proxy = spoiled
    proxy.drop_answers()
    assert await store.acquire("t", "a", QuotaLimits(max_concurrent_requests=1)) is None
    assert proxy.dropped.is_set()


async def test_tokens_are_counted_once(spoiled: tuple[RedisSessionStore, Proxy]) -> None:
    store, proxy = spoiled
    total = 0
    for _ in range(3):
        proxy.drop_answers()
        await store.add_tokens("t", "router", total, total + 40)
        assert proxy.dropped.is_set()
        total += 40
    refusal = await store.acquire("t", "a", LIMITS)
    if refusal is None:
        pytest.skip("a minute ended during the test")
    assert refusal.used in (40, 80, 120)  # the first two if a minute ended between them


async def test_a_journal_has_every_entry_once(spoiled: tuple[RedisSessionStore, Proxy]) -> None:
    store, proxy = spoiled
    await store.create(session())
    for start in (0, 2):
        proxy.drop_answers()
        assert await store.append("r", "o", start, [b"%d" % start, b"%d" % (start + 1)]) is LeaseState.HELD
        assert proxy.dropped.is_set()
    assert await store.read_journal("r") == [b"0", b"1", b"2", b"3"]
    proxy.drop_answers()
    assert await store.take_over("r", "new", "o")
    proxy.drop_answers()
    assert await store.finish("r", "new", SessionState.FINISHED, b"end", b"outline")
    assert proxy.dropped.is_set()
    assert await store.append("r", "o", 0, [b"late"]) is LeaseState.LOST


async def test_a_server_that_forgot_the_scripts_gets_them_again_and_keeps_the_order(
    spoiled: tuple[RedisSessionStore, Proxy],
) -> None:
    store, _ = spoiled
    limits = QuotaLimits(max_concurrent_requests=1)
    await store._redis.script_flush()
    asked = [store.acquire("t", "a", limits), store.release("t", "a"), store.acquire("t", "b", limits)]
    answers = await asyncio.gather(*asked)
    assert answers == [None, None, None]
    assert await store.renew_places("t", ["a", "b"]) == ["a"]


async def test_many_requests_share_one_connection(spoiled: tuple[RedisSessionStore, Proxy]) -> None:
    store, proxy = spoiled
    before = proxy.num_round_trips
    await asyncio.gather(*(store.acquire("t", f"o{number}", QuotaLimits()) for number in range(1000)))
    assert proxy.num_connections <= 2
    assert proxy.num_round_trips - before < 100
