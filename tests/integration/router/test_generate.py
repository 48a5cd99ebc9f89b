"""Streaming through a real router to fake targets."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from router_fakes import NUM_TOKENS, FakeSpeculator, FakeTarget, running, start, text_of, tokens_of

from specpool import errors
from specpool.client import Client, Completion
from specpool.rpc.client import channel
from specpool.v1 import inference_pb2, inference_pb2_grpc, types_pb2

SEED = 11


def request_of(**fields: Any) -> inference_pb2.GenerateRequest:
    fields = {"text": "hello", "sampling": types_pb2.SamplingParams(seed=SEED), **fields}
    return inference_pb2.GenerateRequest(**fields)


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def is_whole(completion: Completion) -> bool:
    assert completion.token_ids == tokens_of(completion.seed)
    assert completion.text == text_of(completion.seed)
    assert completion.usage.num_completion_tokens == NUM_TOKENS
    assert completion.usage.num_prompt_tokens == 5
    return True


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


async def _cancel(router: str, request_id: str) -> bool:
    async with channel(router) as to:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(to)
        return bool((await stub.Cancel(inference_pb2.CancelRequest(request_id=request_id))).cancelled)


async def _collect(
    router: str, request: inference_pb2.GenerateRequest, into: Completion, *, api_key: str = ""
) -> Completion:
    async with Client(router, api_key=api_key) as client:
        async for event in client.stream(request):
            into.add(event)
    return into


async def test_cancel_on_another_router(start_router: Any, any_server: Any) -> None:
    target = FakeTarget(delay_s=0.2)
    async with running(target) as (endpoint,):
        routers = [await start_router(targets=(endpoint,), session_store=any_server.url) for _ in range(2)]
        partial = Completion()
        task = asyncio.create_task(_collect(routers[0], request_of(request_id="r"), partial))
        await until(lambda: len(partial.token_ids) >= 2)
        assert not await _cancel(routers[1], "unknown")
        assert await _cancel(routers[1], "r")
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


async def _resume(router: str, request_id: str, num_tokens_received: int, api_key: str = "") -> Completion:
    completion = Completion()
    async with channel(router) as to:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(to)
        request = inference_pb2.ResumeRequest(request_id=request_id, num_tokens_received=num_tokens_received)
        metadata = [("authorization", f"Bearer {api_key}")] if api_key else None
        async for event in stub.Resume(request, metadata=metadata):
            completion.add(event)
    return completion


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
            rest = await _resume(routers[1], "r", 9)
            assert received.token_ids + rest.token_ids == tokens_of(SEED)
            assert received.text + rest.text == text_of(SEED)
            assert rest.usage.num_completion_tokens == NUM_TOKENS
            await asyncio.sleep(0.3)
        assert len(target.requests) == 2
        with pytest.raises(grpc.aio.AioRpcError, match="no session 'never'"):
            await _resume(routers[1], "never", 0)


async def test_resume_takes_over_a_stream_that_still_runs(start_router: Any, valkey: Any) -> None:
    target = FakeTarget(delay_s=0.05)
    async with running(target) as (endpoint,):
        routers = [await start_router(targets=(endpoint,), session_store=valkey.url) for _ in range(2)]
        partial = Completion()
        old = asyncio.create_task(_collect(routers[0], request_of(request_id="r"), partial))
        await until(lambda: len(partial.token_ids) >= 6)
        rest = await _resume(routers[1], "r", 6)
        assert partial.token_ids[:6] + rest.token_ids == tokens_of(SEED)
        with pytest.raises(errors.SpecPoolError, match="another stream resumed this request"):
            await old


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
            old = asyncio.create_task(_collect(routers[0], request_of(request_id="r"), partial, api_key="secret"))
            await until(lambda: len(partial.token_ids) >= 6)
            resumed = asyncio.create_task(_resume(routers[1], "r", 6, api_key="secret"))
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
        task = asyncio.create_task(_collect(router, request_of(request_id="r"), partial))
        await until(lambda: target.requests and target.num_running == 0)
        await asyncio.sleep(0.3)
        assert await _cancel(router, "r")
        completion = await asyncio.wait_for(task, 4)
    assert completion.finish_reason == types_pb2.FINISH_REASON_CANCELLED
    assert completion.token_ids == tokens_of(SEED)[:7]
