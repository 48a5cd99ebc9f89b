"""Streaming through a real router to fake targets."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
from router_fakes import NUM_TOKENS, FakeSpeculator, FakeTarget, running, start, text_of, tokens_of

from specpool import errors
from specpool.client import Client, Completion
from specpool.v1 import types_pb2

from .calls import SEED, cancel, collect, is_whole, request_of, resume, until


async def test_streams_of_a_tenant_name_the_speculators(start_router: Any) -> None:
    target = FakeTarget()
    async with running(target, FakeSpeculator("f")) as (endpoint, speculator):
        router = await start_router(targets=(endpoint,), speculators=(speculator,))
        async with Client(router) as client:
            assert is_whole(await client.complete(request_of()))
    assert [told.address for told in target.requests[0].speculators] == [speculator]
    assert target.requests[0].tenant == "default"
    assert target.requests[0].request.model == "m"


async def test_router_draws_the_seed(start_router: Any) -> None:
    target = FakeTarget(delay_s=0)
    async with running(target) as (endpoint,), Client(await start_router(targets=(endpoint,))) as client:
        completion = await client.complete(request_of(sampling=types_pb2.SamplingParams()))
    assert completion.seed == target.requests[0].request.sampling.seed != 0
    assert is_whole(completion)


async def test_unknown_model_names_the_served(start_router: Any) -> None:
    async with running(FakeTarget(model="alpha"), FakeTarget(model="beta")) as targets:
        router = await start_router(targets=tuple(targets))
        async with Client(router) as client:
            with pytest.raises(errors.ModelNotFound, match="model 'gamma' is not served here; served: alpha, beta"):
                await client.complete(request_of(model="gamma"))
            with pytest.raises(errors.ModelNotFound, match="names no model"):
                await client.complete(request_of())


async def test_no_target(start_router: Any) -> None:
    async with Client(await start_router(targets=("127.0.0.1:1",), request_wait_s=0.3)) as client:
        with pytest.raises(errors.TargetUnavailable):
            await client.complete(request_of())


async def test_targets_own_error_keeps_its_reason(start_router: Any) -> None:
    target = FakeTarget()
    target.error = errors.InvalidArgument("the prompt is empty", reason="EMPTY_PROMPT", metadata={"field": "text"})
    async with running(target) as (endpoint,), Client(await start_router(targets=(endpoint,))) as client:
        with pytest.raises(errors.InvalidArgument, match="the prompt is empty") as caught:
            await client.complete(request_of(request_id="a"))
        assert (caught.value.reason, caught.value.metadata) == ("EMPTY_PROMPT", {"field": "text"})
        target.error = None
        await asyncio.sleep(0.2)
        assert is_whole(await client.complete(request_of(request_id="a")))  # a failed id is free again


async def test_client_that_leaves_frees_the_target_at_once(start_router: Any) -> None:
    target = FakeTarget(delay_s=0.05)
    async with running(target) as (endpoint,), Client(await start_router(targets=(endpoint,))) as client:
        stream = client.stream(request_of())
        async for event in stream:
            if event.HasField("delta"):
                break
        await stream.aclose()  # type: ignore[attr-defined]
        await until(lambda: target.num_running == 0, 1.0)


async def test_cancel_on_another_router(start_router: Any, any_server: Any) -> None:
    target = FakeTarget(delay_s=0.2)
    async with running(target) as (endpoint,):
        routers = [await start_router(targets=(endpoint,), session_store=any_server.url) for _ in range(2)]
        partial = Completion()
        task = asyncio.create_task(collect(routers[0], request_of(request_id="r"), partial))
        await until(lambda: len(partial.token_ids) >= 2)
        assert not await cancel(routers[1], "unknown")
        assert await cancel(routers[1], "r")
        completion = await asyncio.wait_for(task, 4)
        assert completion.finish_reason == types_pb2.FINISH_REASON_CANCELLED
        assert completion.usage.num_completion_tokens == len(completion.token_ids) < NUM_TOKENS
        await until(lambda: target.num_running == 0, 1.0)


@pytest.mark.parametrize("fail_at", [0, 1, 13, NUM_TOKENS - 1])
async def test_lost_target_leaves_no_gap_and_no_duplicate(start_router: Any, fail_at: int) -> None:
    first, second = FakeTarget(), FakeTarget()
    second.num_reported = 3  # so that the first is chosen
    first.fail_at = fail_at
    async with running(first, second) as targets, Client(await start_router(targets=tuple(targets))) as client:
        events = [event async for event in client.stream(request_of())]
    completion = Completion()
    for event in events:
        completion.add(event)
    assert is_whole(completion)
    assert sum(event.HasField("started") for event in events) == 1
    assert len(second.requests[0].committed_token_ids) == fail_at


async def test_only_target_comes_back(start_router: Any) -> None:
    target = FakeTarget()
    target.fail_at = 7
    async with running(target) as (endpoint,), Client(await start_router(targets=(endpoint,))) as client:
        task = asyncio.create_task(client.complete(request_of()))
        await until(lambda: target.requests and target.num_running == 0)
        await asyncio.sleep(0.3)
        server, _, _ = await start(target, endpoint)
        assert is_whole(await asyncio.wait_for(task, 15))
        await server.stop(None)


async def test_draining_target_gets_nothing_new(start_router: Any) -> None:
    first, second = FakeTarget(delay_s=0), FakeTarget(delay_s=0)
    second.num_reported = 3
    first.state = types_pb2.SERVING_STATE_DRAINING
    async with running(first, second) as targets, Client(await start_router(targets=tuple(targets))) as client:
        await client.complete(request_of())
    assert (len(first.requests), len(second.requests)) == (0, 1)


async def test_resume_on_another_router_continues_and_replays(start_router: Any, any_server: Any) -> None:
    target = FakeTarget(delay_s=0.02)
    async with running(target) as (endpoint,):
        routers = [await start_router(targets=(endpoint,), session_store=any_server.url) for _ in range(2)]
        received = Completion()
        async with Client(routers[0]) as client:
            async for event in client.stream(request_of(request_id="r")):
                received.add(event)
                if len(received.token_ids) == 9:
                    break
        await asyncio.sleep(0.3)
        for _ in range(2):  # the second time everything is in the journal
            rest = await resume(routers[1], "r", 9)
            assert received.token_ids + rest.token_ids == tokens_of(SEED)
            assert received.text + rest.text == text_of(SEED)
            assert rest.usage.num_completion_tokens == NUM_TOKENS
            await asyncio.sleep(0.3)
        assert len(target.requests) == 2
        with pytest.raises(grpc.aio.AioRpcError, match="no session 'never'"):
            await resume(routers[1], "never", 0)


async def test_resume_takes_over_a_stream_that_still_runs(start_router: Any, valkey: Any) -> None:
    target = FakeTarget(delay_s=0.05)
    async with running(target) as (endpoint,):
        routers = [await start_router(targets=(endpoint,), session_store=valkey.url) for _ in range(2)]
        partial = Completion()
        old = asyncio.create_task(collect(routers[0], request_of(request_id="r"), partial))
        await until(lambda: len(partial.token_ids) >= 6)
        rest = await resume(routers[1], "r", 6)
        assert partial.token_ids[:6] + rest.token_ids == tokens_of(SEED)
        with pytest.raises(errors.SpecPoolError, match="another stream resumed this request"):
            await old


async def test_status_lists_what_is_away(start_router: Any) -> None:
    async with running(FakeTarget(), FakeSpeculator()) as (target, speculator):
        router = await start_router(targets=(target, "127.0.0.1:1"), speculators=(speculator,))
        async with Client(router) as client:
            status = await client.cluster_status()
    reachable = {entry.endpoint: entry.reachable for entry in status.targets}
    assert reachable == {target: True, "127.0.0.1:1": False}
    assert next(entry for entry in status.targets if not entry.reachable).error
    assert status.speculators[0].status.model.name == "d"
    assert (status.session_store, status.session_store_reachable) == ("memory", True)


def overloaded() -> errors.TargetUnavailable:
    return errors.TargetUnavailable("9 sequences are waiting already, at most 9 may", reason="TARGET_OVERLOADED")


async def test_an_overloaded_target_is_not_lost_and_its_error_is_the_clients(start_router: Any) -> None:
    target = FakeTarget()
    target.error = overloaded()
    # Polls are far apart: a target marked as lost would stay so.
    async with (
        running(target) as (endpoint,),
        Client(await start_router(targets=(endpoint,), poll_interval_s=60.0)) as client,
    ):
        with pytest.raises(errors.TargetUnavailable, match="9 sequences are waiting already") as caught:
            await client.complete(request_of())
        assert caught.value.reason == "TARGET_OVERLOADED"
        assert len(target.requests) == 1
        target.error = None
        assert is_whole(await client.complete(request_of()))


async def test_another_target_takes_what_an_overloaded_one_refuses(start_router: Any) -> None:
    busy, free = FakeTarget(), FakeTarget()
    busy.error = overloaded()
    free.num_reported = 3  # so that the busy one is tried first
    async with running(busy, free) as targets, Client(await start_router(targets=tuple(targets))) as client:
        assert is_whole(await client.complete(request_of()))
    assert (len(busy.requests), len(free.requests)) == (1, 1)


async def test_cancel_while_waiting_for_another_target(start_router: Any) -> None:
    target = FakeTarget()
    target.fail_at = 7
    async with running(target) as (endpoint,):
        router = await start_router(targets=(endpoint,), failover_wait_s=1.0)
        partial = Completion()
        task = asyncio.create_task(collect(router, request_of(request_id="r"), partial))
        await until(lambda: target.requests and target.num_running == 0)
        await asyncio.sleep(0.3)
        assert await cancel(router, "r")
        completion = await asyncio.wait_for(task, 4)
    assert completion.finish_reason == types_pb2.FINISH_REASON_CANCELLED
    assert completion.token_ids == tokens_of(SEED)[:7]
