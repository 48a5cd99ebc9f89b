"""Journals behind many streams."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from store_servers import Proxy, redis_server

from specpool.errors import SessionStoreUnavailable
from specpool_router.auth.tenants import Tenant
from specpool_router.metrics import RouterMetrics
from specpool_router.sessions.journal import JournalWriter
from specpool_router.sessions.lease import Lease
from specpool_router.sessions.memory_store import MemorySessionStore
from specpool_router.sessions.redis_store import RedisSessionStore
from specpool_router.sessions.session_store import LeaseState, Session, SessionState
from specpool_router.sessions.sessions import Sessions
from specpool_router.sessions.store_state import StoreState
from specpool_tools.local.embedded_store import find_binary

NUM_LEASES = 2000
TENANT = Tenant(name="t")


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[Proxy]:
    binary = shutil.which("redis-server") or find_binary()
    async with (
        redis_server(binary, tmp_path) as server,
        Proxy(server, tmp_path / "proxy.sock", delay_s=0.001) as proxy,
    ):
        yield proxy


async def _open(sessions: Sessions, number: int, stopped: list[SessionState] | None = None) -> Lease:
    session = Session(request_id=f"r{number}", tenant="t", owner=f"o{number}", request=b"")
    return await sessions.open(session, TENANT, (stopped if stopped is not None else []).append)


def _lag_s(metrics: RouterMetrics) -> float:
    return metrics.registry.get_sample_value("specpool_journal_lag_seconds") or 0.0


async def _until_written(leases: list[Lease]) -> None:
    async with asyncio.timeout(60):
        for lease in leases:
            await lease.written.wait()


async def test_journals_of_2000_streams_lag_less_than_a_second(proxy: Proxy) -> None:
    """One millisecond there, and every stream has something new all the time."""
    metrics = RouterMetrics()
    sessions = Sessions(RedisSessionStore(proxy.url), metrics)
    await sessions.start()
    leases = await asyncio.gather(*(_open(sessions, number) for number in range(NUM_LEASES)))
    assert proxy.num_connections <= 2
    lags = []
    for tick in range(30):
        for lease in leases:
            sessions.append(lease, b"delta %d" % tick, 1)
        await asyncio.sleep(0.1)
        lags.append(_lag_s(metrics))
    # One that falls behind is seconds behind by now. The least, because this machine may be busy with other things.
    assert min(lags[len(lags) // 2 :]) < 1.0, lags
    await _until_written(leases)
    before = proxy.num_round_trips
    for lease in leases:
        sessions.append(lease, b"last", 1)
    await _until_written(leases)
    assert proxy.num_round_trips - before < 100
    assert _lag_s(metrics) == 0.0
    assert len(await sessions.store.read_journal("r1999")) == 31
    await sessions.close()


async def test_everything_is_written_at_the_end(proxy: Proxy) -> None:
    sessions = Sessions(RedisSessionStore(proxy.url), RouterMetrics())
    await sessions.start()
    leases = await asyncio.gather(*(_open(sessions, number) for number in range(300)))
    for lease in leases:
        for number in range(1500):
            sessions.append(lease, b"%d" % number, 1)
        sessions.finish(lease, SessionState.DETACHED, b"")
    await _until_written(leases)
    assert await sessions.store.read_journal("r7") == [b"%d" % number for number in range(1500)]
    session = await sessions.find("r7", TENANT)
    assert session.state is SessionState.DETACHED
    await sessions.close()


async def test_a_store_that_forgot_everything_gets_it_again(proxy: Proxy) -> None:
    store = RedisSessionStore(proxy.url)
    sessions = Sessions(store, RouterMetrics())
    await sessions.start()
    stopped: list[SessionState] = []
    lease = await _open(sessions, 0, stopped)
    sessions.append(lease, b"before", 1)
    await _until_written([lease])
    await store._redis.flushall()
    sessions.pair(lease, "target", "speculator")
    sessions.append(lease, b"after", 1)
    await _until_written([lease])
    assert await store.read_journal("r0") == [b"before", b"after"]
    session = await sessions.find("r0", TENANT)
    assert (session.target, session.speculator) == ("target", "speculator")
    assert not stopped
    await sessions.close()


async def test_a_refused_write_of_one_session_leaves_the_others_alone(
    proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    store = RedisSessionStore(proxy.url)
    sessions = Sessions(store, RouterMetrics())
    await sessions.start()
    broken, whole = await _open(sessions, 0), await _open(sessions, 1)
    for entry in (b"a", b"b"):
        for lease in (broken, whole):
            sessions.append(lease, entry, 1)
        await _until_written([broken, whole])
        await store._redis.set("specpool:session:{r0}:journal", "no list")
    assert sessions.reachable
    assert await store.read_journal("r1") == [b"a", b"b"]
    assert "going on without what the session store did not take" in caplog.text
    await sessions.close()


async def test_a_defect_in_a_background_task_is_told_and_survived(
    proxy: Proxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RedisSessionStore(proxy.url)
    sessions = Sessions(store, RouterMetrics())
    await sessions.start()
    failed = asyncio.Event()
    write_all = JournalWriter.write_all

    async def fail_once(writer: JournalWriter) -> None:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("nobody thought of this")
        await write_all(writer)

    monkeypatch.setattr(JournalWriter, "write_all", fail_once)
    lease = await _open(sessions, 0)
    sessions.append(lease, b"a", 1)
    await _until_written([lease])
    assert failed.is_set()
    assert await store.read_journal("r0") == [b"a"]
    assert "sessions: journal failed; it starts again" in caplog.text
    assert "nobody thought of this" in caplog.text
    await sessions.close()


class LateStore(MemorySessionStore):
    """Does not answer the first time it is asked for a session."""

    has_answered = False

    async def load(self, request_id: str) -> Session | None:
        if not self.has_answered:
            self.has_answered = True
            raise SessionStoreUnavailable("no answer")
        return await super().load(request_id)


async def test_an_adopted_session_is_taken_over_also_when_the_store_goes_away_in_between() -> None:
    store, states = LateStore(), list[LeaseState]()
    await store.create(Session(request_id="r", tenant="t", owner="former", request=b""))
    metrics = RouterMetrics()
    writer = JournalWriter(store, StoreState(store, metrics), metrics, lambda _, state: states.append(state))
    session = Session(request_id="r", tenant="t", owner="new", request=b"")
    lease = Lease(session, TENANT, lambda _: None, [b"delta"], is_adopted=True)
    writer.mark(lease)
    with pytest.raises(SessionStoreUnavailable):
        await writer.write_all()
    await writer.write_all()
    assert states == [LeaseState.HELD]
    assert await store.read_journal("r") == [b"delta"]
