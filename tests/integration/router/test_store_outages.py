"""Routers without their session store: at the start, out of memory, read-only; and what is refused at the start."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis
from embedded_valkey import EmbeddedValkey
from router_fakes import FakeTarget, running
from store_servers import redis_server

from specpool import errors
from specpool.client import Client
from specpool.v1 import inference_pb2
from specpool_router.auth.tenants import Tenant
from specpool_router.config import RouterConfig
from specpool_router.metrics import RouterMetrics
from specpool_router.server import serve
from specpool_router.sessions.redis_store import RedisSessionStore
from specpool_router.sessions.session_store import QuotaLimits, Session
from specpool_router.sessions.sessions import Sessions

TENANT = Tenant(name="t")


async def until(condition: Callable[[], bool | Awaitable[bool]], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not (met if isinstance(met := condition(), bool) else await met):
            await asyncio.sleep(0.05)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


async def refusal_at_start(url: str) -> errors.ConfigError:
    """Of a whole router."""
    config = RouterConfig(targets=("127.0.0.1:1",), session_store=url, drain_grace_s=0.1)
    with pytest.raises(errors.ConfigError) as caught:
        await asyncio.wait_for(serve(config), 30)
    return caught.value


async def test_a_router_starts_without_its_store_and_uses_it_once_it_answers(
    start_router: Any, any_server: EmbeddedValkey, caplog: pytest.LogCaptureFixture
) -> None:
    await any_server.kill()
    async with running(FakeTarget(delay_s=0)) as (endpoint,):
        router = await start_router(targets=(endpoint,), session_store=any_server.url)
        async with Client(router) as client:
            assert not (await client.cluster_status()).session_store_reachable
            assert (await client.complete(inference_pb2.GenerateRequest(text="x"))).token_ids
            assert len(warnings(caplog)) == 1
            await any_server.start()

            async def reachable() -> bool:
                return bool((await client.cluster_status()).session_store_reachable)

            await until(reachable)
            await client.complete(inference_pb2.GenerateRequest(text="x", request_id="kept"))
        store = RedisSessionStore(any_server.url)

        async def is_kept() -> bool:
            session = await store.load("kept")
            return session is not None and bool(session.ending)

        await until(is_kept)
        await store.close()


async def test_a_store_at_no_address_is_no_obstacle_and_its_password_is_not_shown(
    start_router: Any, caplog: pytest.LogCaptureFixture
) -> None:
    router = await start_router(targets=("127.0.0.1:1",), session_store="redis://user:hunter2@127.0.0.1:1/0")
    async with Client(router) as client:
        assert not (await client.cluster_status()).session_store_reachable
    (message,) = warnings(caplog)
    assert "session store redis://user:***@127.0.0.1:1/0 cannot be used: Error 111 connecting to" in message
    assert "hunter2" not in message


@pytest.fixture
async def server(store_binary: Path, tmp_path: Path) -> AsyncIterator[str]:
    async with redis_server(store_binary, tmp_path) as path:
        yield path


@pytest.mark.parametrize("cause", ["memory", "replica"])
async def test_writes_that_fail_while_ping_answers_are_one_outage(
    server: str, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    admin = redis.Redis(unix_socket_path=server)
    sessions = Sessions(RedisSessionStore(f"unix://{server}"), RouterMetrics())
    await sessions.start()
    if cause == "memory":
        await admin.config_set("maxmemory", "1")
    else:
        await admin.replicaof("127.0.0.1", "1")
    await until(lambda: not sessions.reachable)
    for number in range(8):  # seconds, in each of which a router has something to write
        session = Session(request_id=f"r{number}", tenant="t", owner=f"o{number}", request=b"x")
        await sessions.admit(TENANT, session.owner)
        lease = await sessions.open(session, TENANT, lambda _: None)
        sessions.append(lease, b"delta", 1)
        assert await admin.ping()
        await asyncio.sleep(0.5)
        assert not sessions.reachable
    assert len(warnings(caplog)) == 1
    if cause == "memory":
        await admin.config_set("maxmemory", "0")
    else:
        await admin.replicaof("NO", "ONE")
    await until(lambda: sessions.reachable)
    await until(lambda: lease.written.is_set())
    assert await sessions.store.read_journal("r0") == [b"delta"]
    assert len(warnings(caplog)) == 1
    await sessions.close()
    await admin.aclose()


async def test_a_replica_is_refused_at_the_start(store_binary: Path, tmp_path: Path) -> None:
    async with redis_server(store_binary, tmp_path, "--replicaof", "127.0.0.1 1") as path:
        error = await refusal_at_start(f"unix://{path}")
    assert "it is a replica of 127.0.0.1:1 and takes no writes; name the primary" in error.message
    assert error.metadata["field"] == "session_store"


async def test_a_sentinel_is_refused_at_the_start(tmp_path: Path) -> None:
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not on PATH")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "sentinel.conf"
    config.write_text(f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\n")
    process = await asyncio.create_subprocess_exec(binary, str(config), "--sentinel", stdout=asyncio.subprocess.DEVNULL)
    try:

        async def listens() -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionError:
                return False
            writer.close()
            return True

        await until(listens)
        error = await refusal_at_start(f"redis://127.0.0.1:{port}")
    finally:
        process.kill()
        await process.wait()
    assert "it is a Sentinel; name the primary that it watches" in error.message


async def test_wrong_credentials_and_databases_are_refused_at_the_start(store_binary: Path, tmp_path: Path) -> None:
    async with redis_server(store_binary, tmp_path, "--requirepass", "right", password="right") as path:
        for url in (f"unix://{path}", f"unix://{path}?password=hunter2", f"unix://{path}?username=u&password=hunter2"):
            error = await refusal_at_start(url)
            assert "it refuses this user" in error.message
            assert "hunter2" not in f"{error} {error.metadata}"
        error = await refusal_at_start(f"unix://{path}?password=right&db=99")
        assert "DB index is out of range" in error.message


async def test_what_is_no_redis_is_refused_at_the_start() -> None:
    async def serve_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1000):
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    listener = await asyncio.start_server(serve_http, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    error = await refusal_at_start(f"redis://127.0.0.1:{port}")
    assert "neither Redis nor Valkey" in error.message
    listener.close()


async def test_a_store_that_stops_for_a_moment_does_everything_once(any_server: EmbeddedValkey) -> None:
    """Longer than the client waits for an answer, shorter than it takes to give up."""
    sessions = Sessions(RedisSessionStore(any_server.url), RouterMetrics())
    await sessions.start()
    limited = Tenant(name="t", limits=QuotaLimits(max_concurrent_requests=50, tokens_per_minute=10_000))
    assert any_server.pid is not None
    os.kill(any_server.pid, signal.SIGSTOP)
    asyncio.get_running_loop().call_later(1.3, os.kill, any_server.pid, signal.SIGCONT)

    async def run(number: int) -> None:
        session = Session(request_id=f"r{number}", tenant="t", owner=f"o{number}", request=b"")
        await sessions.admit(limited, session.owner)
        lease = await sessions.open(session, limited, lambda _: None)
        sessions.append(lease, b"delta", 7)
        await lease.written.wait()

    async with asyncio.timeout(60):
        await asyncio.gather(*(run(number) for number in range(50)))
    assert await sessions.store.read_journal("r7") == [b"delta"]
    other = RedisSessionStore(any_server.url)
    refusal = await other.acquire("t", "more", limited.limits)
    assert refusal is not None
    assert refusal.used == 50
    for number in range(50):
        await sessions.release(limited, f"o{number}")
    await sessions.close()
    refusal = await other.acquire("t", "more", QuotaLimits(tokens_per_minute=1))
    assert refusal is None or refusal.used <= 7 * 50  # None if a minute ended during the test
    await other.close()


async def test_a_store_that_hangs_delays_nobody_for_long(any_server: EmbeddedValkey) -> None:
    """Stopped, not dead: connections stay open and nothing answers."""
    sessions = Sessions(RedisSessionStore(any_server.url), RouterMetrics())
    await sessions.start()
    assert any_server.pid is not None
    os.kill(any_server.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(30):
            await asyncio.gather(*(sessions.admit(TENANT, f"o{number}") for number in range(500)))
        assert not sessions.reachable
        await asyncio.gather(*(sessions.release(TENANT, f"o{number}") for number in range(500)))
        with pytest.raises(errors.SessionStoreUnavailable):
            await sessions.find("r", TENANT)
    finally:
        os.kill(any_server.pid, signal.SIGCONT)
    await until(lambda: sessions.reachable)
    limited = Tenant(name="t", limits=QuotaLimits(max_concurrent_requests=1))

    async def is_free() -> bool:
        try:
            await sessions.admit(limited, "one")
        except errors.QuotaExceeded:
            return False
        return True

    await until(is_free, 8.0)  # well before leases that nobody renews run out
    await sessions.close()
