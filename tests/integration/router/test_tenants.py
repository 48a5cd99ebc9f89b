"""Tenants through real routers: credentials, quotas across routers, and a store that goes away."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest
from router_fakes import NUM_TOKENS, FakeTarget, running, tokens_of

from specpool import errors
from specpool.client import Client, Completion

from .calls import SEED, collect, is_whole, request_of, resume, until


def _tenants_file(folder: Path, **limits: int) -> str:
    lines = [f"    {key}: {value}" for key, value in limits.items()]
    digest = hashlib.sha256(b"secret").hexdigest()
    path = folder / "tenants.yaml"
    path.write_text("\n".join(["tenants:", "  - name: acme", f"    key_sha256: {digest}", "    weight: 2", *lines]))
    return str(path)


async def test_tenant_comes_from_the_key(start_router: Any, tmp_path: Path) -> None:
    target = FakeTarget(delay_s=0)
    async with running(target) as (endpoint,):
        router = await start_router(targets=(endpoint,), tenants_file=_tenants_file(tmp_path))
        async with Client(router) as client:
            with pytest.raises(errors.Unauthenticated, match="missing"):
                await client.complete(request_of())
        async with Client(router, api_key="wrong") as client:
            with pytest.raises(errors.Unauthenticated, match="not known"):
                await client.complete(request_of())
        async with Client(router, api_key="secret") as client:
            await client.complete(request_of())
    (request,) = target.requests
    assert (request.tenant, request.tenant_weight, request.cache_salt) == ("acme", 2.0, b"acme")


async def test_quota_holds_across_routers(start_router: Any, any_server: Any, tmp_path: Path) -> None:
    target = FakeTarget(delay_s=0.05)
    settings = {"tenants_file": _tenants_file(tmp_path, max_concurrent_requests=2), "session_store": any_server.url}
    async with running(target) as (endpoint,):
        routers = [await start_router(targets=(endpoint,), **settings) for _ in range(2)]
        async with Client(routers[0], api_key="secret") as one, Client(routers[1], api_key="secret") as two:
            running_calls = [asyncio.create_task(client.complete(request_of())) for client in (one, two)]
            await until(lambda: target.num_running == 2)
            with pytest.raises(errors.QuotaExceeded, match="max_concurrent_requests is 2, 2 in use; retry in 1 s"):
                await one.complete(request_of())
            await asyncio.gather(*running_calls)
            await one.complete(request_of())


async def test_a_repeated_request_id_does_not_free_the_place_of_the_running_request(
    start_router: Any, any_server: Any, tmp_path: Path
) -> None:
    target = FakeTarget(delay_s=0.05)
    tenants_file = _tenants_file(tmp_path, max_concurrent_requests=2)
    async with running(target) as (endpoint,):
        router = await start_router(targets=(endpoint,), tenants_file=tenants_file, session_store=any_server.url)
        async with Client(router, api_key="secret") as client:
            first = asyncio.create_task(client.complete(request_of(request_id="r")))
            await until(lambda: target.num_running == 1)
            with pytest.raises(errors.InvalidArgument, match="request_id 'r' is in use"):
                await client.complete(request_of(request_id="r"))
            second = asyncio.create_task(client.complete(request_of()))
            await until(lambda: target.num_running == 2)
            with pytest.raises(errors.QuotaExceeded):
                await client.complete(request_of())
            assert is_whole(await first)
            assert is_whole(await second)


async def test_resume_needs_no_second_place(start_router: Any, any_server: Any, tmp_path: Path) -> None:
    target = FakeTarget(delay_s=0.05)
    settings = {"tenants_file": _tenants_file(tmp_path, max_concurrent_requests=1), "session_store": any_server.url}
    async with running(target) as (endpoint,):
        routers = [await start_router(targets=(endpoint,), **settings) for _ in range(2)]
        async with Client(routers[0], api_key="secret") as client:
            partial = Completion()
            old = asyncio.create_task(collect(routers[0], request_of(request_id="r"), partial, api_key="secret"))
            await until(lambda: len(partial.token_ids) >= 6)
            resumed = asyncio.create_task(resume(routers[1], "r", 6, api_key="secret"))
            with pytest.raises(errors.SpecPoolError, match="another stream resumed this request"):
                await old
            with pytest.raises(errors.QuotaExceeded):  # the place is the new stream's now
                await client.complete(request_of())
            assert partial.token_ids[:6] + (await resumed).token_ids == tokens_of(SEED)
            assert is_whole(await client.complete(request_of()))


async def test_tokens_per_minute_hold_across_routers(start_router: Any, valkey: Any, tmp_path: Path) -> None:
    target = FakeTarget(delay_s=0)
    settings = {"tenants_file": _tenants_file(tmp_path, tokens_per_minute=NUM_TOKENS), "session_store": valkey.url}
    async with running(target) as (endpoint,):
        routers = [await start_router(targets=(endpoint,), **settings) for _ in range(2)]
        async with Client(routers[0], api_key="secret") as one, Client(routers[1], api_key="secret") as two:
            await one.complete(request_of())
            await asyncio.sleep(0.3)
            with pytest.raises(errors.QuotaExceeded) as caught:
                await two.complete(request_of())
    assert caught.value.metadata["limit"] == "tokens_per_minute"
    assert 0 < float(caught.value.metadata["retry_after_s"]) <= 60


async def test_store_dies_while_streaming_and_comes_back(start_router: Any, valkey: Any, tmp_path: Path) -> None:
    target = FakeTarget(delay_s=0.03)
    tenants_file = _tenants_file(tmp_path, max_concurrent_requests=1)
    async with running(target) as (endpoint,):
        router = await start_router(targets=(endpoint,), session_store=valkey.url, tenants_file=tenants_file)
        async with Client(router, api_key="secret") as client:
            task = asyncio.create_task(client.complete(request_of(request_id="r")))
            await until(lambda: target.num_running == 1)
            await valkey.kill()
            with pytest.raises(errors.QuotaExceeded):  # local limits hold
                await client.complete(request_of())
            assert is_whole(await task)
            assert is_whole(await client.complete(request_of(request_id="without-store")))
            status = await client.cluster_status()
            assert (status.session_store, status.session_store_reachable) == ("valkey", False)
            await valkey.start()
            async with asyncio.timeout(10):
                while not (await client.cluster_status()).session_store_reachable:
                    await asyncio.sleep(0.1)
