"""Places of tenants: released once and for all, whatever comes between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from store_servers import redis_server

from specpool.errors import QuotaExceeded, SessionStoreUnavailable
from specpool_router.auth.tenants import Tenant
from specpool_router.metrics import RouterMetrics
from specpool_router.sessions import sessions as sessions_module
from specpool_router.sessions.memory_store import MemorySessionStore
from specpool_router.sessions.quotas import Quotas
from specpool_router.sessions.redis_store import RedisSessionStore
from specpool_router.sessions.session_store import QuotaLimits, QuotaRefusal, Session, SessionState
from specpool_router.sessions.sessions import Sessions
from specpool_router.sessions.store_state import StoreState

ONE = QuotaLimits(max_concurrent_requests=1)
TENANT = Tenant(name="t", limits=ONE)


@pytest.fixture
async def url(store_binary: Path, tmp_path: Path) -> AsyncIterator[str]:
    async with redis_server(store_binary, tmp_path) as server:
        yield f"unix://{server}"


def quotas_of(store: MemorySessionStore | RedisSessionStore) -> Quotas:
    metrics = RouterMetrics()
    return Quotas(store, StoreState(store, metrics), metrics)


class SlowStore(MemorySessionStore):
    """Its renewal takes a while before it is executed, and its answer takes a while, too."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go_on, self.executed, self.answer = (asyncio.Event() for _ in range(4))

    async def renew_places(self, tenant: str, owners: Sequence[str]) -> list[str]:
        self.asked.set()
        await self.go_on.wait()
        missing = await super().renew_places(tenant, owners)
        self.executed.set()
        await self.answer.wait()
        return missing


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_release_during_a_renewal_is_for_good(when: str) -> None:
    store = SlowStore()
    quotas = quotas_of(store)
    await quotas.admit(TENANT, "a")
    renewal = asyncio.create_task(quotas.renew())
    await store.asked.wait()
    if when == "before":
        await quotas.release(TENANT, "a")
    store.go_on.set()
    await store.executed.wait()
    if when == "after":
        await quotas.release(TENANT, "a")
    store.answer.set()
    await renewal
    await quotas.renew()
    await quotas.renew()
    await quotas.admit(TENANT, "b")


async def test_a_place_that_the_store_lost_is_taken_again(url: str) -> None:
    store, others = RedisSessionStore(url), RedisSessionStore(url)
    quotas = quotas_of(store)
    await quotas.admit(TENANT, "a")
    await store._redis.flushall()
    await quotas.renew()
    await quotas.renew()
    refusal = await others.acquire("t", "b", ONE)
    assert refusal is not None
    await quotas.release(TENANT, "a")
    assert await others.acquire("t", "b", ONE) is None
    for each in (store, others):
        await each.close()


async def test_a_place_that_another_router_took_over_is_not_taken_back(url: str) -> None:
    store, other = RedisSessionStore(url), RedisSessionStore(url)
    quotas = quotas_of(store)
    await quotas.admit(TENANT, "a")
    assert await other.acquire("t", "new", ONE, instead_of="a") is None
    await quotas.renew()
    quotas.forget(TENANT, "a")  # the renewal of its session says that it is lost
    await quotas.renew()
    await quotas.renew()
    assert await other.renew_places("t", ["a", "new"]) == ["a"]
    for each in (store, other):
        await each.close()


class StalledStore(MemorySessionStore):
    """Takes a place; its answer never comes."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = asyncio.Event()

    async def acquire(
        self, tenant: str, owner: str, limits: QuotaLimits, *, instead_of: str = ""
    ) -> QuotaRefusal | None:
        refusal = await super().acquire(tenant, owner, limits, instead_of=instead_of)
        if not self.taken.is_set():
            self.taken.set()
            await asyncio.Event().wait()
        return refusal


async def test_a_client_that_leaves_during_admission_leaves_no_place_behind() -> None:
    store = StalledStore()
    quotas = quotas_of(store)
    admission = asyncio.create_task(quotas.admit(TENANT, "a"))
    await store.taken.wait()
    admission.cancel()
    with pytest.raises(asyncio.CancelledError):
        await admission
    await quotas.admit(TENANT, "b")


async def test_tenants_that_keep_to_their_limit_are_never_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty tenants with one place each and one request at a time, while renewal runs as often as it can."""
    monkeypatch.setattr(sessions_module, "_RENEW_S", 0.0)
    sessions = Sessions(RedisSessionStore(url), RouterMetrics())
    await sessions.start()
    loop = asyncio.get_running_loop()
    end = loop.time() + 3.0
    num_answers = num_refused = 0

    async def client(name: str) -> None:
        nonlocal num_answers, num_refused
        tenant, number = Tenant(name=name, limits=ONE), 0
        while loop.time() < end:
            number += 1
            session = Session(request_id=f"{name}-{number}", tenant=name, owner=f"{name}-{number}", request=b"")
            try:
                await sessions.admit(tenant, session.owner)
            except QuotaExceeded:
                num_refused += 1
                await asyncio.sleep(0.05)
                continue
            lease = await sessions.open(session, tenant, lambda _: None)
            await asyncio.sleep(0.01)
            sessions.finish(lease, SessionState.FINISHED, b"end")
            await sessions.release(tenant, session.owner)
            num_answers += 1

    await asyncio.gather(*(client(f"t{number}") for number in range(20)))
    await sessions.close()
    assert (num_answers > 100, num_refused) == (True, 0)


async def test_tokens_of_an_outage_are_not_counted_at_its_end(url: str) -> None:
    store = RedisSessionStore(url)
    metrics = RouterMetrics()
    state = StoreState(store, metrics)
    quotas = Quotas(store, state, metrics)
    limited = Tenant(name="t", limits=QuotaLimits(tokens_per_minute=100))
    quotas.count(limited, 30)
    await quotas.write_tokens()
    state.failed(SessionStoreUnavailable("gone"))
    quotas.count(limited, 1000)
    await state.look()
    assert state.up
    quotas.count(limited, 30)
    await quotas.write_tokens()
    assert await store.acquire("t", "elsewhere", limited.limits) is None
    await store.close()
