"""Requests that end before anything came of them: their ids are free again, here and elsewhere."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from router_fakes import FakeTarget, running, text_of, tokens_of

from specpool import errors
from specpool.client import Client
from specpool.rpc.client import channel
from specpool.v1 import inference_pb2, router_pb2, router_pb2_grpc, types_pb2
from specpool_router.auth.tenants import Tenant
from specpool_router.metrics import RouterMetrics
from specpool_router.sessions.memory_store import MemorySessionStore
from specpool_router.sessions.session_store import Session
from specpool_router.sessions.sessions import Sessions


async def test_what_waits_at_a_router_that_stops_begins_at_another(start_router: Any, any_server: Any) -> None:
    full, free = FakeTarget(), FakeTarget()
    full.error = errors.Draining("not now")
    request = inference_pb2.GenerateRequest(request_id="r", text="x", sampling=types_pb2.SamplingParams(seed=11))
    async with running(full, free) as (one, two):
        stopping = await start_router(targets=(one,), session_store=any_server.url, request_wait_s=60.0)
        other = await start_router(targets=(two,), session_store=any_server.url)
        async with Client(f"{stopping},{other}") as client, asyncio.timeout(60), channel(stopping) as operator:
            stream = asyncio.create_task(client.complete(request))
            while not full.requests:
                await asyncio.sleep(0.01)
            await router_pb2_grpc.RouterServiceStub(operator).DrainRouter(
                router_pb2.DrainRouterRequest(grace_seconds=0.1)
            )
            completion = await stream
    assert (completion.token_ids, completion.text) == (tokens_of(11), text_of(11))


class SlowStore(MemorySessionStore):
    """Creates a session and does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.created = asyncio.Event()

    async def create(self, session: Session) -> bool:
        await super().create(session)
        self.created.set()
        await asyncio.sleep(600)
        return True


async def test_a_client_that_leaves_while_its_session_is_created_leaves_none_behind() -> None:
    store = SlowStore()
    sessions = Sessions(store, RouterMetrics())
    await sessions.start()
    session = Session(request_id="r", tenant="t", owner="o", request=b"x" * 1000)
    opening = asyncio.create_task(sessions.open(session, Tenant(name="t"), lambda _: None))
    await store.created.wait()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    async with asyncio.timeout(30):
        while await store.load("r") is not None:
            await asyncio.sleep(0.01)
    await sessions.close()
