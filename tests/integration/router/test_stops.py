"""Routers that are stopped, rolled and flooded: no request fails without a reason, and every router ends."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from router_fakes import FakeTarget, running, text_of

from specpool import errors
from specpool.client import Client, ResumePolicy
from specpool.discovery.discovery import StaticDiscovery
from specpool.rpc.client import channel
from specpool.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    target_pb2,
    target_pb2_grpc,
    types_pb2,
)
from specpool_router.config import RouterConfig
from specpool_router.metrics import RouterMetrics
from specpool_router.placement.pods import Pods
from specpool_router.server import serve

SEED = 3
NEVER = ResumePolicy(max_tries=0)
_MAIN = """
import asyncio, sys
from specpool.shutdown import StopEvent
from specpool_router.config import RouterConfig
from specpool_router.server import serve
config = RouterConfig(targets=(sys.argv[1],), poll_interval_s=0.05, drain_grace_s=1.0)
stop = StopEvent(drain_grace_s=config.drain_grace_s)
asyncio.run(serve(config, on_ready=lambda endpoint: print(endpoint, flush=True), stop=stop))
"""


def request_of(max_tokens: int) -> inference_pb2.GenerateRequest:
    sampling = types_pb2.SamplingParams(seed=SEED, max_tokens=max_tokens)
    return inference_pb2.GenerateRequest(text="x", sampling=sampling)


async def outcome_of(client: Client, max_tokens: int) -> str:
    try:
        completion = await client.complete(request_of(max_tokens))
    except errors.SpecPoolError as error:
        return error.reason
    assert completion.text == text_of(SEED, max_tokens)
    return "OK"


async def raw_outcome_of(stub: Any, max_tokens: int) -> str:
    """As a client sees it that does nothing about errors."""
    try:
        async for _ in stub.Generate(request_of(max_tokens)):
            pass
    except grpc.aio.AioRpcError as error:
        details = dict(error.trailing_metadata() or ())
        return "OK" if "grpc-status-details-bin" in details else f"{error.code().name} {error.details()}"
    return "OK"


async def test_two_thousand_requests_at_once_are_all_answered(start_router: Any) -> None:
    async with running(FakeTarget(delay_s=0)) as (target,):
        router = await start_router(targets=(target,))
        async with Client(router, resume=NEVER) as client:
            outcomes = Counter(await asyncio.gather(*(outcome_of(client, 2) for _ in range(2000))))
    assert outcomes == {"OK": 2000}


async def test_stops_under_load_end_in_time_and_give_reasons() -> None:
    """Processes, each with streams that outlive its grace and requests that go on coming."""
    async with running(FakeTarget(delay_s=0.05)) as (target,):
        results = await asyncio.gather(*(_stop_under_load(target, number) for number in range(4)))
    statuses, outcomes = [status for status, _ in results], sum((counts for _, counts in results), Counter())
    assert statuses == [0] * 4
    assert set(outcomes) <= {"OK", "DRAINING", "TARGET_UNAVAILABLE"}, outcomes
    assert outcomes["DRAINING"] > 0


async def _stop_under_load(target: str, number: int) -> tuple[int, Counter[str]]:
    command = [sys.executable, "-c", _MAIN, target]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        endpoint = (await asyncio.to_thread(process.stdout.readline)).strip()
        async with Client(endpoint, resume=NEVER) as client:
            long = [asyncio.create_task(outcome_of(client, 10_000)) for _ in range(30)]
            short = [asyncio.create_task(_keep_asking(client)) for _ in range(10)]
            await asyncio.sleep(0.5 + 0.1 * number)
            process.send_signal(signal.SIGTERM)
            status = await asyncio.to_thread(process.wait, 40)
            outcomes = Counter(await asyncio.gather(*long))
            for counts in await asyncio.gather(*short):
                outcomes += counts
        return status, outcomes
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


async def _keep_asking(client: Client) -> Counter[str]:
    """Until the router is gone."""
    outcomes: Counter[str] = Counter()
    while not outcomes["DRAINING"] and not outcomes["TARGET_UNAVAILABLE"]:
        outcomes[await outcome_of(client, 1)] += 1
    return outcomes


@asynccontextmanager
async def _rolling_router(target: str, listen: str) -> AsyncIterator[str]:
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    config = RouterConfig(targets=(target,), listen=listen, poll_interval_s=0.05, drain_grace_s=15.0)
    task = asyncio.create_task(serve(config, on_ready=ready.set_result, stop=stop))
    await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
    try:
        yield await ready
    finally:
        stop.set()
        await asyncio.wait_for(task, 40)


@pytest.mark.parametrize("resume", [ResumePolicy(), None], ids=["our client", "any client"])
async def test_rolling_two_routers_fails_no_request(resume: ResumePolicy | None) -> None:
    """Each router in turn is stopped and replaced, while requests go on through one channel."""
    outcomes: Counter[str] = Counter()
    done = asyncio.Event()
    async with running(FakeTarget(delay_s=0.01)) as (target,):
        routers = [_rolling_router(target, "127.0.0.1:0") for _ in range(2)]
        addresses = [await router.__aenter__() for router in routers]

        async def keep_asking(client: Client, stub: Any) -> None:
            while not done.is_set():
                outcomes[await (outcome_of(client, 20) if resume else raw_outcome_of(stub, 20))] += 1

        endpoint = ",".join(addresses)
        async with Client(endpoint, resume=NEVER) as client, channel(endpoint) as connection:
            stub = inference_pb2_grpc.InferenceServiceStub(connection)
            askers = [asyncio.create_task(keep_asking(client, stub)) for _ in range(8)]
            for number in (0, 1, 0, 1):
                await asyncio.sleep(0.3)
                await routers[number].__aexit__(None, None, None)
                routers[number] = _rolling_router(target, addresses[number])
                await routers[number].__aenter__()
            done.set()
            await asyncio.gather(*askers)
        for router in routers:
            await router.__aexit__(None, None, None)
    assert outcomes["OK"] == outcomes.total() > 50, outcomes


async def test_the_drain_call_stops_the_router_and_names_the_reason(start_router: Any) -> None:
    async with running(FakeTarget(delay_s=0.05)) as (target,):
        router = await start_router(targets=(target,), drain_grace_s=30.0)
        async with channel(router) as connection:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(connection)
            call = stub.Generate(request_of(10_000))
            await call.read()
            drain: Any = router_pb2_grpc.RouterServiceStub(connection)
            answer = await drain.DrainRouter(router_pb2.DrainRouterRequest(grace_seconds=0.3))
            assert answer.num_streams_running == 1
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(_read_all(call), 20)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert any(key == "grpc-status-details-bin" for key, _ in caught.value.trailing_metadata() or ())


async def _read_all(call: Any) -> None:
    async for _ in call:
        pass


async def _pods(fetch: Any) -> Pods[target_pb2.GetTargetStatusResponse]:
    pods: Pods[target_pb2.GetTargetStatusResponse] = Pods(
        "target", StaticDiscovery(("127.0.0.1:1",)), fetch, RouterMetrics(), 0.01
    )
    await pods.start(first_poll_s=0.05)
    return pods


async def test_closing_ends_polls_that_hide_their_cancellation() -> None:
    """A status call that fails in the very moment in which it is cancelled raises its failure."""

    async def fetch(_: Any) -> Any:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            empty = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, empty, empty, details="gone") from None

    pods = await _pods(fetch)
    await asyncio.wait_for(pods.close(), 20)


async def test_closing_does_not_wait_for_streams_that_never_end() -> None:
    async def fetch(_: Any) -> Any:
        return target_pb2.GetTargetStatusResponse(), True

    pods = await _pods(fetch)
    (pod,) = pods.all()
    pod.num_streams = 1
    await asyncio.wait_for(pods.close(timeout_s=0.2), 20)
    with pytest.raises(grpc.aio.UsageError):
        await target_pb2_grpc.TargetServiceStub(pod.channel).GetTargetStatus(target_pb2.GetTargetStatusRequest())
