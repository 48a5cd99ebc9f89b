"""Routers tell targets which speculators there are, and record what targets chose."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio
import pytest
from router_fakes import NUM_TOKENS, FakeSpeculator, FakeTarget, running

from specpool.client import Client
from specpool.discovery.discovery import Discovery, Endpoint, StaticDiscovery
from specpool.rpc.client import channel
from specpool.v1 import inference_pb2, router_pb2, router_pb2_grpc, types_pb2
from specpool_router.metrics import RouterMetrics
from specpool_router.placement.cluster import Cluster
from specpool_router.sessions.sessions import Sessions

Told = types_pb2.SpeculatorEndpoint


class Settable(Discovery):
    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def set(self, endpoints: Iterable[Endpoint]) -> None:
        self._publish(endpoints)


async def told(target: FakeTarget, *wanted: Told) -> None:
    async with asyncio.timeout(30):
        while not target.told or target.told[-1] != list(wanted):
            await asyncio.sleep(0.005)


async def test_targets_hear_of_a_change_at_once() -> None:
    """Not at the next poll: a running sequence is to find its new speculator."""
    target, speculators = FakeTarget(), Settable()
    async with running(target) as (endpoint,):
        cluster = Cluster(StaticDiscovery([endpoint]), speculators, RouterMetrics(), poll_interval_s=3600)
        await cluster.start()
        try:
            await told(target)
            speculators.set([Endpoint("b:2", "uid", labels={"zone": "z"}), Endpoint("a:1")])
            await told(target, Told(address="a:1"), Told(address="b:2", labels={"zone": "z"}))
            speculators.set([Endpoint("b:2", "uid", labels={"zone": "z"}, terminating=True)])
            await told(target, Told(address="b:2", labels={"zone": "z"}, terminating=True))
        finally:
            await cluster.close()


async def test_requests_carry_the_directory_and_the_pairing_is_recorded(start_router: Any, monkeypatch: Any) -> None:
    target = FakeTarget()
    target.pairs_with = "chosen:7"
    pairings = []
    pair = Sessions.pair

    def recorded(self: Any, lease: Any, target: str, speculator: str) -> None:
        pairings.append((target, speculator))
        pair(self, lease, target, speculator)

    monkeypatch.setattr(Sessions, "pair", recorded)
    async with running(target, FakeSpeculator()) as (endpoint, speculator):
        router = await start_router(targets=(endpoint,), speculators=(speculator, "127.0.0.1:1"))
        async with Client(router) as client:
            request = inference_pb2.GenerateRequest(text="x", sampling=types_pb2.SamplingParams(seed=1))
            completion = await client.complete(request)
    assert len(completion.token_ids) == NUM_TOKENS
    assert {each.address for each in target.requests[0].speculators} == {speculator, "127.0.0.1:1"}
    assert pairings[-1] == (endpoint, "chosen:7")


@pytest.mark.parametrize("grace_s", [math.nan, math.inf, -1.0, 1e300])
async def test_a_drain_of_no_time_that_there_is_is_refused_by_name(start_router: Any, grace_s: float) -> None:
    async with channel(await start_router()) as connection:
        stub = router_pb2_grpc.RouterServiceStub(connection)
        with pytest.raises(grpc.aio.AioRpcError, match="grace_seconds must be between 0 and") as caught:
            await stub.DrainRouter(router_pb2.DrainRouterRequest(grace_seconds=grace_s))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        status = await stub.GetClusterStatus(router_pb2.GetClusterStatusRequest())
    assert status.state == types_pb2.SERVING_STATE_SERVING


async def test_a_pod_that_leaves_while_it_is_asked_does_not_end_the_question() -> None:
    """Its channel is closed, and with it the call; the call of who asked for the status ended with a bare CANCELLED."""
    target, targets = FakeTarget(), Settable()
    async with running(target) as (endpoint,):
        cluster = Cluster(targets, StaticDiscovery(()), RouterMetrics(), poll_interval_s=3600)
        await cluster.start()
        targets.set([Endpoint(endpoint)])
        await told(target)
        try:
            target.status_delay_s, num_told = 600.0, len(target.told)
            asking = asyncio.create_task(cluster.targets.refresh())
            async with asyncio.timeout(30):
                while len(target.told) == num_told:
                    await asyncio.sleep(0.005)
                targets.set([])
                await asking
        finally:
            await cluster.close()
