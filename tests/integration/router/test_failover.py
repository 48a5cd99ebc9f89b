"""What a stream outlives: targets that die, hang, are full, late or away; and what it does not."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from router_fakes import FakeTarget, running, start, text_of, tokens_of

from specpool import errors
from specpool.client import Client, Completion, ResumePolicy
from specpool.rpc.client import channel
from specpool.v1 import inference_pb2, inference_pb2_grpc, types_pb2
from specpool_router.metrics import RouterMetrics

NEVER = ResumePolicy(max_tries=0)


def request_of(seed: int = 11, **fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(text="x", sampling=types_pb2.SamplingParams(seed=seed), **fields)


def check_whole(completion: Completion, seed: int = 11) -> None:
    assert completion.token_ids == tokens_of(seed)
    assert completion.text == text_of(seed)


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


async def test_streams_of_a_dead_target_wait_for_a_full_one(start_router: Any) -> None:
    """Five tries in a row, without a pause, were over in a moment."""
    num_streams = 60
    dying, full = FakeTarget(delay_s=0.05), FakeTarget(delay_s=0.005)
    full.capacity = 0
    async with running(dying, full) as targets:
        router = await start_router(targets=tuple(targets), failover_wait_s=60.0)
        async with Client(router, resume=NEVER) as client:
            streams = [asyncio.create_task(client.complete(request_of(seed))) for seed in range(num_streams)]
            await until(lambda: dying.num_running == num_streams)
            dying.fail_at = 5
            await until(lambda: dying.fail_at is None and len(full.requests) >= num_streams)
            full.capacity = 8
            for seed, completion in enumerate(await asyncio.gather(*streams)):
                check_whole(completion, seed)
    assert any(request.committed_token_ids for request in full.requests)
    # What the dying one had taken goes before new requests, with or without a token.
    assert all(request.was_running for request in full.requests[-num_streams:])


async def test_a_late_status_is_not_death(start_router: Any) -> None:
    target = FakeTarget()
    async with running(target) as (endpoint,):
        router = await start_router(targets=(endpoint,))
        async with Client(router, resume=NEVER) as client:
            check_whole(await client.complete(request_of()))
            target.status_delay_s = 30.0
            num_told = len(target.told)
            await until(lambda: len(target.told) >= num_told + 2)  # the first of them was given up
            started = time.monotonic()
            check_whole(await client.complete(request_of()))
            assert time.monotonic() - started < 2.0


async def test_a_target_whose_streams_flow_is_alive(start_router: Any) -> None:
    target = FakeTarget(delay_s=0.5)
    async with running(target) as (endpoint,):
        router = await start_router(targets=(endpoint,), request_wait_s=0.0)
        async with Client(router, resume=NEVER) as client:
            stream = asyncio.create_task(client.complete(request_of()))
            await until(lambda: target.num_running == 1)
            target.status_delay_s = 60.0
            num_told = len(target.told)
            await until(lambda: len(target.told) >= num_told + 5)  # four were given up
            target.delay_s = 0.0
            check_whole(await client.complete(request_of()))
            check_whole(await stream)


async def test_a_new_request_waits_for_a_target(start_router: Any) -> None:
    address = free_address()
    router = await start_router(targets=(address,), request_wait_s=30.0)
    async with Client(router, resume=NEVER) as client:
        waiting = asyncio.create_task(client.complete(request_of()))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        server, _, _ = await start(FakeTarget(delay_s=0), address)
        check_whole(await waiting)
        await server.stop(None)


async def test_a_model_whose_only_target_is_replaced_is_waited_for(start_router: Any) -> None:
    rolled, other, address = FakeTarget(delay_s=0), FakeTarget(model="other"), free_address()
    server, _, _ = await start(rolled, address)
    async with running(other) as (second,):
        router = await start_router(targets=(address, second), request_wait_s=30.0)
        async with Client(router, resume=NEVER) as client:
            check_whole(await client.complete(request_of(model="m")))
            await server.stop(None)
            with pytest.raises(errors.ModelNotFound):
                await client.complete(request_of(model="never seen"))
            waiting = asyncio.create_task(client.complete(request_of(model="m")))
            await asyncio.sleep(0.5)
            server, _, _ = await start(rolled, address)
            check_whole(await waiting)
            await server.stop(None)


async def test_waiting_ends(start_router: Any) -> None:
    target = FakeTarget()
    target.state = types_pb2.SERVING_STATE_DRAINING
    async with running(target) as (endpoint,):
        router = await start_router(targets=(endpoint,), request_wait_s=0.5)
        async with Client(router, resume=NEVER) as client:
            with pytest.raises(errors.TargetUnavailable, match="no target for model 'm' can be reached now"):
                await client.complete(request_of())


@pytest.mark.parametrize("hang_at", [0, 7])
async def test_a_target_that_hangs_is_left(start_router: Any, hang_at: int) -> None:
    """Its status and its health are fine all the time."""
    hanging, other = FakeTarget(), FakeTarget()
    hanging.hang_at = hang_at
    other.num_reported = 3  # so that the hanging one is chosen
    async with running(hanging, other) as targets:
        router = await start_router(targets=tuple(targets), progress_timeout_s=1.0)
        async with Client(router, resume=NEVER) as client:
            check_whole(await asyncio.wait_for(client.complete(request_of()), 30))
    assert len(other.requests[0].committed_token_ids) == hang_at


async def test_a_target_that_does_not_get_on_is_the_last_choice(start_router: Any) -> None:
    stuck, other = FakeTarget(), FakeTarget()
    stuck.seconds_in_step, other.num_reported = 30.0, 3
    async with running(stuck, other) as targets:
        router = await start_router(targets=tuple(targets))
        num_told = len(stuck.told)
        await until(lambda: len(stuck.told) >= num_told + 2)
        async with Client(router, resume=NEVER) as client:
            check_whole(await client.complete(request_of()))
            assert not stuck.requests
            other.state = types_pb2.SERVING_STATE_DRAINING
            num_told = len(other.told)
            await until(lambda: len(other.told) >= num_told + 2)
            check_whole(await client.complete(request_of()))
            assert stuck.requests


@pytest.mark.parametrize("sign", ["steps", "a long step", "another stream"])
async def test_a_queue_or_a_prefill_may_take_as_long_as_it_likes(start_router: Any, sign: str) -> None:
    busy, other = FakeTarget(), FakeTarget()
    busy.hang_at = 7
    other.num_reported = 3
    async with running(busy, other) as targets:
        router = await start_router(targets=tuple(targets), progress_timeout_s=1.0)
        async with Client(router, resume=NEVER) as client:
            stream = asyncio.create_task(client.complete(request_of()))
            await until(lambda: busy.num_hanging == 1)
            busy.hang_at, beside = None, None
            if sign == "another stream":
                busy.delay_s = 0.1
                beside = asyncio.create_task(client.complete(request_of(12)))
            for _ in range(30):
                busy.num_steps += sign == "steps"
                busy.seconds_in_step = 0.2 if sign == "a long step" else 0.0
                await asyncio.sleep(0.1)
            assert not other.requests
            stream.cancel()
            if beside is not None:
                check_whole(await beside, 12)


async def test_a_request_that_cost_two_targets_is_not_given_to_a_third(start_router: Any) -> None:
    targets = [FakeTarget() for _ in range(3)]
    for target in targets:
        target.error_at = 0, errors.EngineFailed("the target engine failed: KeyError: 7")
    async with running(*targets) as endpoints:
        router = await start_router(targets=tuple(endpoints))
        async with Client(router) as client:
            with pytest.raises(errors.RequestCostTargets, match="2 targets were lost while they ran this request"):
                await client.complete(request_of())
    assert sum(len(target.requests) for target in targets) == 2


async def test_a_request_that_progresses_may_lose_many_targets(start_router: Any) -> None:
    targets = [FakeTarget() for _ in range(5)]
    for number, target in enumerate(targets[:-1]):
        target.num_reported = number
        target.error_at = 4 * number + 3, errors.EngineFailed("the target engine failed")
    targets[-1].num_reported = 9
    async with running(*targets) as endpoints:
        router = await start_router(targets=tuple(endpoints), poll_interval_s=60.0)
        async with Client(router, resume=NEVER) as client:
            check_whole(await client.complete(request_of()))


async def test_a_call_that_a_target_cancels_is_not_the_targets_death(start_router: Any) -> None:
    target = FakeTarget()
    target.cancel_at = 7
    # Polls are far apart: a target that is taken for dead would stay so.
    async with running(target) as (endpoint,):
        router = await start_router(targets=(endpoint,), poll_interval_s=60.0)
        async with Client(router, resume=NEVER) as client:
            check_whole(await asyncio.wait_for(client.complete(request_of()), 10))
    assert [len(request.committed_token_ids) for request in target.requests] == [0, 7]


def counted(metrics: RouterMetrics, kind: str) -> float:
    labels = {"tenant": "default", "kind": kind}
    return metrics.registry.get_sample_value("specpool_tenant_tokens_total", labels) or 0.0


async def resume_and_cancel(router: str, received: Completion) -> Completion:
    resumed = Completion()
    async with channel(router) as to:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(to)
        point = inference_pb2.ResumeRequest(request_id="r", num_tokens_received=len(received.token_ids))
        async for event in stub.Resume(point):
            if not resumed.token_ids and event.HasField("delta"):
                await stub.Cancel(inference_pb2.CancelRequest(request_id="r"))
            resumed.add(event)
    return resumed


async def test_tokens_of_every_stream_are_counted_however_it_ends(start_router: Any) -> None:
    """Finished, failed, left, cancelled, and resumed and then cancelled."""
    metrics, target = RouterMetrics(), FakeTarget(delay_s=0.05)
    async with (
        running(target) as (endpoint,),
        Client(router := await start_router(metrics, targets=(endpoint,))) as client,
    ):
        target.error_at = 7, errors.InvalidArgument("never mind")
        with pytest.raises(errors.InvalidArgument, match="never mind"):
            await client.complete(request_of())
        assert (counted(metrics, "prompt"), counted(metrics, "completion")) == (5, 7)

        target.error_at = None
        received = Completion()
        stream = client.stream(request_of(request_id="r"))
        async for event in stream:
            received.add(event)
            if len(received.token_ids) == 4:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        await until(lambda: target.num_running == 0)
        assert counted(metrics, "prompt") == 10
        num_completion_tokens = counted(metrics, "completion")
        assert num_completion_tokens >= 11

        resumed = await resume_and_cancel(router, received)
        assert resumed.finish_reason == types_pb2.FINISH_REASON_CANCELLED
        assert (resumed.usage.num_prompt_tokens, counted(metrics, "prompt")) == (5, 10)
        assert counted(metrics, "completion") == 7 + resumed.usage.num_completion_tokens
