"""Requests that are refused leave nothing behind, and are not free."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis
from router_fakes import FakeTarget, running

from specpool import errors
from specpool.client import Client
from specpool.v1 import inference_pb2, types_pb2
from specpool_router.auth.tenants import Tenant
from specpool_router.metrics import RouterMetrics
from specpool_router.sessions.memory_store import MemorySessionStore
from specpool_router.sessions.session_store import Session, SessionState
from specpool_router.sessions.sessions import Sessions

MIB = 1 << 20


async def until_no_session(url: str) -> None:
    async with redis.Redis.from_url(url) as store, asyncio.timeout(30):
        while [key async for key in store.scan_iter("specpool:session:*")]:
            await asyncio.sleep(0.05)


async def test_requests_that_a_target_refuses_are_not_kept(start_router: Any, any_server: Any) -> None:
    target = FakeTarget()
    target.error = errors.InvalidArgument("the prompt is nothing for me")
    async with running(target) as (endpoint,):
        router = await start_router(targets=(endpoint,), session_store=any_server.url)
        async with Client(router) as client, redis.Redis.from_url(any_server.url) as store:
            for number in range(10):
                request = inference_pb2.GenerateRequest(request_id=f"r{number}", text="x" * MIB)
                with pytest.raises(errors.InvalidArgument, match="nothing for me"):
                    await client.complete(request)
            await until_no_session(any_server.url)
            assert (await store.info("memory"))["used_memory_dataset"] < 2 * MIB
            target.error = None
            assert (await client.complete(inference_pb2.GenerateRequest(request_id="r1", text="x"))).token_ids


async def test_a_request_that_is_too_large_is_refused_before_anything_is_done(
    start_router: Any, any_server: Any
) -> None:
    target = FakeTarget(delay_s=0)
    async with running(target) as (endpoint,):
        settings = {"targets": (endpoint,), "session_store": any_server.url, "max_request_bytes": 2000}
        async with Client(await start_router(**settings)) as client:
            with pytest.raises(errors.InvalidArgument, match="bytes; accepted: up to 2000") as caught:
                await client.complete(inference_pb2.GenerateRequest(text="x" * 2000))
            assert caught.value.reason == "REQUEST_TOO_LARGE"
            assert caught.value.metadata["accepted"] == "2000"
            await client.complete(inference_pb2.GenerateRequest(text="x" * 900, request_id="kept"))
        async with redis.Redis.from_url(any_server.url) as store:
            assert {key async for key in store.scan_iter("specpool:session:*")} <= {
                b"specpool:session:{kept}",
                b"specpool:session:{kept}:journal",
            }
    assert len(target.requests) == 1


async def test_an_ended_session_keeps_no_prompt(start_router: Any, any_server: Any) -> None:
    async with running(FakeTarget(delay_s=0)) as (endpoint,):
        router = await start_router(targets=(endpoint,), session_store=any_server.url)
        async with Client(router) as client, redis.Redis.from_url(any_server.url) as store:
            sampling = types_pb2.SamplingParams(seed=3)
            request = inference_pb2.GenerateRequest(request_id="r", text="x" * MIB, sampling=sampling)
            await client.complete(request)
            async with asyncio.timeout(30):
                while await store.hget("specpool:session:{r}", "state") != b"finished":
                    await asyncio.sleep(0.02)
            kept = await store.hget("specpool:session:{r}", "request")
    assert kept is not None
    outline = inference_pb2.GenerateRequest.FromString(kept)
    assert (outline.request_id, outline.model, outline.sampling.seed, outline.text) == ("r", "m", 3, "")


async def test_refused_requests_use_up_the_quota(start_router: Any, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text(f"tenants: [{{name: acme, key_sha256: {digest}, tokens_per_minute: 5000}}]")
    target = FakeTarget()
    target.error = errors.InvalidArgument("no")
    async with running(target) as (endpoint,):
        router = await start_router(targets=(endpoint,), tenants_file=str(tenants))
        async with Client(router, api_key="secret") as client:
            seen = []
            for _ in range(50):  # a quarter of a minute's tokens each, and a minute may end meanwhile
                try:
                    await client.complete(inference_pb2.GenerateRequest(text="x" * 5000))
                except errors.SpecPoolError as error:
                    seen.append(type(error))
                if errors.QuotaExceeded in seen:
                    break
    assert seen[-1] is errors.QuotaExceeded
    assert 4 <= len(seen) <= 9


@pytest.mark.parametrize(
    ("state", "began", "kept"),
    [
        (SessionState.FAILED, False, False),
        (SessionState.FAILED, True, True),
        (SessionState.DETACHED, False, True),  # its client may come back
    ],
)
async def test_what_is_forgotten(state: SessionState, began: bool, kept: bool) -> None:
    store = MemorySessionStore()
    sessions = Sessions(store, RouterMetrics())
    await sessions.start()
    tenant = Tenant(name="t")
    lease = await sessions.open(Session(request_id="r", tenant="t", owner="o", request=b""), tenant, lambda _: None)
    sessions.pair(lease, "target", "speculator")
    if began:
        sessions.count_tokens(lease, 5)
    sessions.finish(lease, state, b"")
    await asyncio.wait_for(lease.written.wait(), 30)
    assert (await store.load("r") is not None) is kept
    await sessions.open(Session(request_id="s", tenant="t", owner="p", request=b""), tenant, lambda _: None)
    await sessions.close()
